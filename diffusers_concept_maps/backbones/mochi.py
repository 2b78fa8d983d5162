"""Mochi.

Joint attention over video and text, video first, with projections of its own and a smaller width for text, which has
no position. Attention is called for every row by itself, without the padding of its prompt. The text of the last block
ends there, so that concepts are read from all blocks and carried through all but one. The transformer neither lists
nor sets processors: `concept_attn_processors` finds them all the same, and `ConceptMapsMixin.set_attn_processor` sets
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0
from torch import nn
from torch.nn import functional

from diffusers_concept_maps.backbones._base import Grid, JointBackbone, Site
from diffusers_concept_maps.backbones._real import ClipShape, default_shape
from diffusers_concept_maps.processors._base import ConceptProcessor
from diffusers_concept_maps.tokens import check_encoders, undisturbed, word_tokens

_FRAMES_PER_LATENT = 6

Projected = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value `[batch, H, S, D]`."""


class MochiBackbone(JointBackbone):
    """Mochi 1; nothing is published of its layers."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("MochiTransformer3DModel",)
    editable: ClassVar[bool] = True

    def sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.sites`."""
        return [Site(block, block.attn1) for block in transformer.transformer_blocks]

    def heads(self, transformer: Any) -> int:
        """See `Backbone.heads`."""
        return int(transformer.config.num_attention_heads)

    def text_width(self, transformer: Any) -> int:
        """See `Backbone.text_width`."""
        return int(transformer.config.text_embed_dim)

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`; T5 has a mask here, so that padding is of no matter."""
        check_encoders(pipe, "tokenizer", "text_encoder")
        length = length or int(pipe.transformer.config.max_sequence_length)
        counts = [word_tokens(pipe.tokenizer, text, length) for text in texts]
        with undisturbed(pipe.text_encoder):
            states, *_ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=length)
        return states, counts

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`; latents are `[batch, channel, frame, height, width]`."""
        _, _, frames, height, width = call["hidden_states"].shape
        patch = int(transformer.config.patch_size)
        return Grid(frames, height // patch, width // patch)

    def geometry(self, transformer: Any) -> dict[str, int]:
        """See `Backbone.geometry`; the temporal factor is that of the family's VAE."""
        return {"frames_per_latent": _FRAMES_PER_LATENT, "latents_per_token": 1}

    def timesteps(self, scheduled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `Backbone.timesteps`; the pipeline writes down another number, counted from the other end."""
        return scheduled.to(dtype)

    def clip_shape(self, pipe: Any) -> ClipShape:
        """See `RealInput.clip_shape`."""
        multiple = int(pipe.vae_spatial_scale_factor) * int(pipe.patch_size)
        return default_shape(
            pipe, multiple, int(pipe.vae_temporal_scale_factor), area=pipe.default_height * pipe.default_width
        )

    def real_arguments(self, pipe: Any, frames: int) -> dict[str, Any]:
        """See `RealInput.real_arguments`; the schedule of the pipeline has two parts, of a step at least."""
        return super().real_arguments(pipe, frames) | {"num_inference_steps": 2}

    def enter(
        self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor, call: Mapping[str, Any], rows: slice
    ) -> torch.Tensor:
        """See `JointBackbone.enter`."""
        return cast(torch.Tensor, transformer.time_embed.caption_proj(embeds.to(like)))

    def reentry(
        self, block: nn.Module, arguments: Mapping[str, Any], concepts: torch.Tensor, rows: slice
    ) -> dict[str, Any]:
        """See `JointBackbone.reentry`."""
        video = arguments["hidden_states"]
        return {
            "hidden_states": video.new_empty(concepts.shape[0], 0, video.shape[2]),
            "encoder_hidden_states": concepts,
            "temb": arguments["temb"][rows],
            "encoder_attention_mask": arguments["encoder_attention_mask"][rows],
        }

    def leave(self, block: nn.Module, block_output: Any) -> torch.Tensor:
        """See `JointBackbone.leave`; a block returns video, then text, and the last one the text that it was given."""
        return cast(torch.Tensor, block_output[1])


class ConceptMochiAttnProcessor2_0(ConceptProcessor, MochiAttnProcessor2_0):
    """Drop-in for `MochiAttnProcessor2_0`, in its order of operations."""

    stock: ClassVar[type | None] = MochiAttnProcessor2_0

    def __call__(
        self,
        attn: MochiAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        """Attention of `[video | text]`; video `[batch, N, width]` and text `[batch, T, text]` in, the same out."""
        recorder = self.listener(attn)
        if recorder is None:
            stock: Any = super()
            return stock.__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if recorder.answering:
            output = recorder.answer(*_project_text(attn, encoder_hidden_states))
            return hidden_states, _finish_text(attn, output.transpose(1, 2).flatten(2, 3))
        video, text = _project_video(attn, hidden_states), _project_text(attn, encoder_hidden_states)
        if image_rotary_emb is not None:
            video = _rotate(video[0], *image_rotary_emb), _rotate(video[1], *image_rotary_emb), video[2]
        count = hidden_states.shape[1]
        at_text, at_image = slice(count, None), slice(0, count)
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(video, text, strict=True))
        mask = functional.pad(attention_mask.bool(), (count, 0), value=True)[:, None, None]
        if recorder.restricts:
            output = recorder.restrict(query, key, value, text=at_text, image=at_image, mask=mask)
            output = output.masked_fill(~mask.mT, 0)
        else:
            rows = range(hidden_states.shape[0])
            output = torch.cat([_attend_row(video, text, attention_mask, row) for row in rows], dim=0)
        output = self.amend(attn, (query, key, value), output, text=at_text, image=at_image, mask=mask)
        states, text_states = output.transpose(1, 2).flatten(2, 3).tensor_split([count], dim=1)
        result = attn.to_out[1](attn.to_out[0](states)), _finish_text(attn, text_states)
        recorder.observe(attn, query, key, value, output, text=at_text, image=at_image, mask=mask)
        return result


def _attend_row(video: Projected, text: Projected, attention_mask: torch.Tensor, row: int) -> torch.Tensor:
    """Attention outputs `[1, H, N + T, D]` of one row of the batch; those of its padding are zeros at the end."""
    valid = torch.nonzero(attention_mask[row], as_tuple=False).flatten()
    query, key, value = (
        torch.cat([own[row : row + 1], other[row : row + 1, :, valid, :]], dim=2)
        for own, other in zip(video, text, strict=True)
    )
    output = functional.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=False)
    return functional.pad(output, (0, 0, 0, attention_mask.shape[1] - valid.shape[0]))


def _project_video(attn: MochiAttention, states: torch.Tensor) -> Projected:
    query, key, value = (linear(states).unflatten(2, (attn.heads, -1)) for linear in (attn.to_q, attn.to_k, attn.to_v))
    query, key = attn.norm_q(query), attn.norm_k(key)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _project_text(attn: MochiAttention, states: torch.Tensor) -> Projected:
    linears = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    query, key, value = (linear(states).unflatten(2, (attn.heads, -1)) for linear in linears)
    query, key = attn.norm_added_q(query), attn.norm_added_k(key)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Neighboring channels of `[batch, H, S, D]`, turned in float32 by angles `[S, H, D / 2]`."""
    states = states.transpose(1, 2)
    even, odd = states[..., 0::2].float(), states[..., 1::2].float()
    turned = ((even * cosine - odd * sine).to(states.dtype), (even * sine + odd * cosine).to(states.dtype))
    return torch.stack(turned, dim=-1).flatten(-2).transpose(1, 2)


def _finish_text(attn: MochiAttention, states: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, attn.to_add_out(states)) if hasattr(attn, "to_add_out") else states


BACKBONE = MochiBackbone()
