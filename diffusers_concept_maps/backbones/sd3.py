"""Stable Diffusion 3 and 3.5.

Joint attention over image and text, image first, with projections of its own for text and without positions for it.
The text of the last block ends there, so that concepts are read from all blocks and carried through all but one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import nn
from torch.nn import functional

from diffusers_concept_maps.backbones._base import Grid, JointBackbone, Site
from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.processors._base import ConceptProcessor
from diffusers_concept_maps.tokens import token_spans, word_tokens

_CLIP_TOKENS = 77


class SD3Backbone(JointBackbone):
    """SD3, SD3.5 large, and SD3.5 medium, whose first blocks attend to the image once more without text."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("SD3Transformer2DModel",)

    def sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.sites`."""
        return [
            Site(block, block.attn, others=() if block.attn2 is None else (block.attn2,))
            for block in transformer.transformer_blocks
        ]

    def heads(self, transformer: Any) -> int:
        """See `Backbone.heads`."""
        return int(transformer.config.num_attention_heads)

    def text_width(self, transformer: Any) -> int:
        """See `Backbone.text_width`."""
        return int(transformer.config.joint_attention_dim)

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`; states of T5 where the pipeline has it, else of the two CLIP encoders."""
        if pipe.text_encoder is None or pipe.tokenizer is None:
            raise ConceptMapsError(
                f"this {type(pipe).__name__} has no tokenizer or text encoder to encode the concepts with; "
                f"pass concept_embeds instead"
            )
        length = length or 256
        with torch.no_grad(), torch.random.fork_rng(enabled=pipe.text_encoder.training):
            states, *_ = pipe.encode_prompt(
                texts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
            )
        if pipe.text_encoder_3 is None:  # its rows are zeros then
            counts = [word_tokens(pipe.tokenizer, text, _CLIP_TOKENS - 1) for text in texts]
            return states[:, 1:_CLIP_TOKENS], counts
        return states[:, _CLIP_TOKENS:], [word_tokens(pipe.tokenizer_3, text, length) for text in texts]

    def token_spans(self, pipe: Any, prompt: str, length: int) -> list[tuple[int, int]]:
        """See `Backbone.token_spans`; the tokens of the CLIP encoders, then those of T5."""
        spans = token_spans(pipe.tokenizer, prompt, _CLIP_TOKENS)
        spans += [(0, 0)] * (_CLIP_TOKENS - len(spans))
        if pipe.text_encoder_3 is not None:
            spans += token_spans(pipe.tokenizer_3, prompt, length - _CLIP_TOKENS)
        return spans

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`; latents are `[batch, channel, height, width]`."""
        _, _, height, width = call["hidden_states"].shape
        patch = int(transformer.config.patch_size)
        return Grid(1, height // patch, width // patch)

    def enter(
        self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor, call: Mapping[str, Any], rows: slice
    ) -> torch.Tensor:
        """See `JointBackbone.enter`."""
        return cast(torch.Tensor, transformer.context_embedder(embeds.to(like)))

    def reentry(
        self, block: nn.Module, arguments: Mapping[str, Any], concepts: torch.Tensor, rows: slice
    ) -> dict[str, Any]:
        """See `JointBackbone.reentry`."""
        return {
            "hidden_states": concepts.new_empty(concepts.shape[0], 0, concepts.shape[2]),
            "encoder_hidden_states": concepts,
            "temb": arguments["temb"][rows],
        }

    def leave(self, block: nn.Module, block_output: Any) -> torch.Tensor | None:
        """See `JointBackbone.leave`; a block returns text, then image, and the last one no text."""
        return cast("torch.Tensor | None", block_output[0])


class ConceptJointAttnProcessor2_0(ConceptProcessor, JointAttnProcessor2_0):
    """Drop-in for `JointAttnProcessor2_0`, in its order of operations."""

    stock: ClassVar[type | None] = JointAttnProcessor2_0

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Attention of `[image | text]`; image `[batch, N, width]` and text `[batch, T, width]` in, the same out."""
        recorder = self.recorder
        if recorder is not None and recorder.answering:
            if encoder_hidden_states is None:  # attention of an image that is empty here
                return hidden_states
            output = recorder.answer(*_project_text(attn, encoder_hidden_states))
            return hidden_states, _finish_text(attn, _join_heads(output))
        if recorder is None or encoder_hidden_states is None or not recorder.records(attn):
            stock: Any = super()
            return stock.__call__(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        text_heads = _project_text(attn, encoder_hidden_states)
        query, key, value = (
            torch.cat([image, text], dim=2)
            for image, text in zip(_project_image(attn, hidden_states), text_heads, strict=True)
        )
        output = functional.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=False)
        states = _join_heads(output).to(query.dtype)
        count = hidden_states.shape[1]
        image, text = states[:, :count], _finish_text(attn, states[:, count:])
        image = attn.to_out[1](attn.to_out[0](image))
        recorder.observe(attn, query, key, value, output, text=slice(count, None), image=slice(0, count))
        return image, text


def _split_heads(attn: Attention, states: torch.Tensor) -> torch.Tensor:
    return states.view(states.shape[0], states.shape[1], attn.heads, -1).transpose(1, 2)


def _join_heads(output: torch.Tensor) -> torch.Tensor:
    return output.transpose(1, 2).reshape(output.shape[0], output.shape[2], -1)


def _project_image(attn: Attention, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = (_split_heads(attn, linear(states)) for linear in (attn.to_q, attn.to_k, attn.to_v))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, value


def _project_text(attn: Attention, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    linears = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    query, key, value = (_split_heads(attn, linear(states)) for linear in linears)
    if attn.norm_added_q is not None:
        query = attn.norm_added_q(query)
    if attn.norm_added_k is not None:
        key = attn.norm_added_k(key)
    return query, key, value


def _finish_text(attn: Attention, states: torch.Tensor) -> torch.Tensor:
    return states if attn.context_pre_only else cast(torch.Tensor, attn.to_add_out(states))


BACKBONE = SD3Backbone()
