"""The published algorithms of concept maps on one CogVideoX block, written plainly, to time against.

As IMAP (arXiv 2603.02919) and ConceptAttention (arXiv 2502.04320) publish them: concepts padded to the prompt's
length, for every row of the batch; a second attention of all concept and image tokens, of which the concept rows are
kept; a map of every head and text row in memory; head scores by scikit-learn on the host.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from sklearn.metrics import calinski_harabasz_score
from torch.nn import functional

TOP_HEADS = 5
RECORDED_ROW = 1  # the conditional one


class _KeepingProcessor(CogVideoXAttnProcessor2_0):
    """The stock attention; keeps queries, keys, values and outputs of the image tokens."""

    kept: tuple[torch.Tensor, ...] = ()

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text = encoder_hidden_states.shape[1]
        query, key, value = project(attn, torch.cat([encoder_hidden_states, hidden_states], dim=1))
        query[:, :, text:] = apply_rotary_emb(query[:, :, text:], image_rotary_emb)
        key[:, :, text:] = apply_rotary_emb(key[:, :, text:], image_rotary_emb)
        output = functional.scaled_dot_product_attention(query, key, value)
        self.kept = tuple(tensor[:, :, text:] for tensor in (query, key, value, output))
        states = finish(attn, output)
        return states[:, text:], states[:, :text]


def project(attn: Attention, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value `[batch, H, tokens, D]`."""
    query, key, value = (
        linear(states).unflatten(2, (attn.heads, -1)).transpose(1, 2) for linear in (attn.to_q, attn.to_k, attn.to_v)
    )
    return attn.norm_q(query), attn.norm_k(key), value


def finish(attn: Attention, output: torch.Tensor) -> torch.Tensor:
    """Output projection `[batch, tokens, width]`."""
    return attn.to_out[1](attn.to_out[0](output.transpose(1, 2).flatten(2)))


class OfficialBlocks:
    """While entered, every block also runs the concepts and makes the maps.

    Attributes:
        maps: of every layer, on the device until the next forward pass.
    """

    def __init__(self, transformer: Any, concepts: torch.Tensor, frames: int) -> None:
        """Assign only.

        Args:
            transformer: a CogVideoX transformer.
            concepts: embeddings of the text encoder `[C, width]`.
            frames: latent frames F.
        """
        self.maps: list[tuple[torch.Tensor, ...]] = []
        self._transformer = transformer
        self._concepts = concepts
        self._frames = frames
        self._states = concepts

    def __enter__(self) -> OfficialBlocks:
        for index, block in enumerate(self._transformer.transformer_blocks):
            block.attn1.processor = _KeepingProcessor()
            block.forward = self._forward(block, first=index == 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for block in self._transformer.transformer_blocks:
            block.attn1.processor = CogVideoXAttnProcessor2_0()
            del block.forward

    def _forward(self, block: Any, *, first: bool) -> Any:
        stock = block.forward

        def forward(
            hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor, **rest: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if first:
                self._start(encoder_hidden_states)
            result = stock(hidden_states, encoder_hidden_states, temb, **rest)
            concept_key, concept_output = self._advance(block, hidden_states, result[0], temb)
            query, _, _, output = block.attn1.processor.kept
            pair = [x[RECORDED_ROW] for x in (concept_key, concept_output, query, output)]
            self.maps.append(_maps(*pair, self._frames))
            return result

        return forward

    def _start(self, text: torch.Tensor) -> None:
        self.maps.clear()
        padded = self._concepts.new_zeros(text.shape[0], text.shape[1], self._concepts.shape[1])
        padded[:, : len(self._concepts)] = self._concepts
        self._states = self._transformer.patch_embed.text_proj(padded)

    def _advance(
        self, block: Any, before: torch.Tensor, after: torch.Tensor, temb: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the concepts through a block; their keys and attention outputs."""
        _, normed, _, gate = block.norm1(before, self._states, temb)
        query, key, value = project(block.attn1, normed)
        image_query, image_key, image_value, _ = block.attn1.processor.kept
        both = functional.scaled_dot_product_attention(
            torch.cat([query, image_query], 2), torch.cat([key, image_key], 2), torch.cat([value, image_value], 2)
        )
        output = both[:, :, : query.shape[2]]
        states = self._states + gate * finish(block.attn1, output)
        _, normed, _, gate = block.norm2(after, states, temb)
        self._states = states + gate * block.ff(normed)
        return key, output


def _maps(
    concept_key: torch.Tensor,
    concept_output: torch.Tensor,
    query: torch.Tensor,
    output: torch.Tensor,
    frames: int,
) -> tuple[torch.Tensor, ...]:
    """Similarity of outputs, Gram columns of all heads, and of the motion heads, `[text row, N]` each."""
    similarity = torch.einsum("htd,hnd->htn", concept_output, output).sum(0)
    logits = torch.einsum("htd,hnd->htn", concept_key, query) * query.shape[-1] ** -0.5
    anchor = logits.unflatten(2, (frames, -1)).argmax(-1)  # [H, T, F]
    feature = output.unflatten(1, (frames, -1))  # [H, F, P, D]
    picked = torch.take_along_dim(feature, anchor.transpose(1, 2)[..., None], 2)  # [H, F, T, D]
    columns = torch.einsum("hftd,hfpd->htfp", picked, feature).flatten(2)
    columns = (columns - columns.mean(1, keepdim=True)) / (columns.std(1, keepdim=True) + 1e-6)
    chosen = _motion_heads(output, frames)
    return similarity, columns.sum(0), columns[chosen].mean(0)


def _motion_heads(output: torch.Tensor, frames: int) -> torch.Tensor:
    """The heads whose features separate the frames best, scored on the host."""
    labels = torch.arange(frames).repeat_interleave(output.shape[1] // frames).numpy()
    scores = [calinski_harabasz_score(head.float().cpu().numpy(), labels) for head in output]
    return torch.tensor(scores).topk(min(TOP_HEADS, len(scores))).indices.to(output.device)
