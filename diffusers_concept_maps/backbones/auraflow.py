"""AuraFlow.

Joint attention over text and image, text first and without positions, in blocks with projections of its own for text
and then in single blocks, which have one stream for both. Eight learned register tokens precede the text in the model:
they are no part of the prompt, and concepts see them as little as they see the prompt. Concepts are carried through
the single blocks as well, as streams of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from diffusers.models.attention_processor import Attention, AuraFlowAttnProcessor2_0, FusedAuraFlowAttnProcessor2_0
from torch import nn
from torch.nn import functional

from diffusers_concept_maps.backbones._base import Grid, JointBackbone, Site
from diffusers_concept_maps.backbones._real import ClipShape, ImageInput
from diffusers_concept_maps.processors._base import ConceptProcessor
from diffusers_concept_maps.tokens import check_encoders, undisturbed, word_tokens

if TYPE_CHECKING:
    from diffusers_concept_maps.compiled import Relay
    from diffusers_concept_maps.listener import PassListener

_REGISTERS = 8


class AuraFlowBackbone(ImageInput, JointBackbone):
    """AuraFlow; its layers are the blocks with a text stream, then the single ones."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("AuraFlowTransformer2DModel",)

    def sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.sites`."""
        blocks = (*transformer.joint_transformer_blocks, *transformer.single_transformer_blocks)
        return [Site(block, block.attn) for block in blocks]

    def heads(self, transformer: Any) -> int:
        """See `Backbone.heads`."""
        return int(transformer.config.num_attention_heads)

    def text_width(self, transformer: Any) -> int:
        """See `Backbone.text_width`."""
        return int(transformer.config.joint_attention_dim)

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`; padding is masked in the encoder."""
        check_encoders(pipe, "tokenizer", "text_encoder")
        start = pipe.tokenizer(texts[0], return_special_tokens_mask=True).special_tokens_mask.index(0)
        limit, length = 256 - start if length is None else None, length or 256
        counts = [min(word_tokens(pipe.tokenizer, text, limit), length - start - 1) for text in texts]
        with undisturbed(pipe.text_encoder):
            states, *_ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=length)
        return states[:, start:], counts

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`; latents are `[batch, channel, height, width]`."""
        _, _, height, width = call["hidden_states"].shape
        patch = int(transformer.config.patch_size)
        return Grid(1, height // patch, width // patch)

    def clip_shape(self, pipe: Any) -> ClipShape:
        """See `RealInput.clip_shape`."""
        factor, config = int(pipe.vae_scale_factor), pipe.transformer.config
        return ClipShape(2 * factor, (int(config.sample_size) * factor) ** 2)

    def timesteps(self, scheduled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `Backbone.timesteps`; a thousandth, rounded at the end."""
        return (scheduled / 1000).to(dtype)

    def text_tokens(self, block: nn.Module, arguments: Mapping[str, Any], call: Mapping[str, Any]) -> int:
        """See `JointBackbone.text_tokens`."""
        return _REGISTERS + self.text_length(call)

    def enter(
        self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor, call: Mapping[str, Any], rows: slice
    ) -> torch.Tensor:
        """See `JointBackbone.enter`."""
        return cast(torch.Tensor, transformer.context_embedder(embeds.to(like)))

    def reentry(
        self, block: nn.Module, arguments: Mapping[str, Any], concepts: torch.Tensor, rows: slice
    ) -> dict[str, Any]:
        """See `JointBackbone.reentry`; concepts are the only stream of a single block."""
        temb = arguments["temb"][rows]
        if "encoder_hidden_states" not in arguments:
            return {"hidden_states": concepts, "temb": temb}
        empty = concepts.new_empty(concepts.shape[0], 0, concepts.shape[2])
        return {"hidden_states": empty, "encoder_hidden_states": concepts, "temb": temb}

    def leave(self, block: nn.Module, block_output: Any) -> torch.Tensor:
        """See `JointBackbone.leave`; a block returns text, then image, and a single one its stream."""
        return cast(torch.Tensor, block_output[0] if isinstance(block_output, tuple) else block_output)


_Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _AuraFlowProcessor(ConceptProcessor, ABC):
    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Attention of `[text | image]`: text and image apart in and out, or one stream that holds both."""
        recorder, text_states = self.recorder, encoder_hidden_states
        if recorder is None or not recorder.records(attn):
            stock: Any = super()
            return stock.__call__(attn, hidden_states, text_states, *args, **kwargs)
        if recorder.answering:
            return self._answer(recorder, attn, hidden_states, text_states)
        heads = self._project(attn, hidden_states, text_states)
        query, key, value = (tensor.transpose(1, 2) for tensor in heads)
        output = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=0.0, scale=attn.scale, is_causal=False
        )
        states = _join_heads(output).to(query.dtype)
        count = recorder.text_tokens(attn)
        result: Any
        if text_states is None:
            result = _finish(attn, states)
        else:
            result = _finish(attn, states[:, count:]), attn.to_add_out(states[:, :count])
        text = slice(_REGISTERS, count)
        recorder.observe(attn, query, key, value, output, text=text, image=slice(count, None))
        return result

    def _answer(
        self,
        recorder: PassListener[Any] | Relay,
        attn: Attention,
        hidden_states: torch.Tensor,
        text_states: torch.Tensor | None,
    ) -> Any:
        """Attention of concepts, which are the text beside an empty image, or the one stream."""
        if text_states is None:
            heads = self._project(attn, hidden_states, None)
        else:
            heads = _norm_heads(attn, self._text_linear(attn, text_states), attn.norm_added_q, attn.norm_added_k)
        states = _join_heads(recorder.answer(*(tensor.transpose(1, 2) for tensor in heads)))
        return _finish(attn, states) if text_states is None else (hidden_states, attn.to_add_out(states))

    def _project(self, attn: Attention, states: torch.Tensor, text_states: torch.Tensor | None) -> _Heads:
        """Query, key and value `[batch, S, H, D]` of image, behind text that is apart, or of one stream."""
        linear = self._linear(attn, states)
        text_linear = None if text_states is None else self._text_linear(attn, text_states)
        heads = _norm_heads(attn, linear, attn.norm_q, attn.norm_k)
        if text_linear is None:
            return heads
        text_heads = _norm_heads(attn, text_linear, attn.norm_added_q, attn.norm_added_k)
        query, key, value = (torch.cat(parts, dim=1) for parts in zip(text_heads, heads, strict=True))
        return query, key, value

    @abstractmethod
    def _linear(self, attn: Attention, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Linear projections of image, or of one stream."""

    @abstractmethod
    def _text_linear(self, attn: Attention, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Linear projections of text that is apart."""


class ConceptAuraFlowAttnProcessor2_0(_AuraFlowProcessor, AuraFlowAttnProcessor2_0):
    """Drop-in for `AuraFlowAttnProcessor2_0`."""

    stock: ClassVar[type | None] = AuraFlowAttnProcessor2_0

    def _linear(self, attn: Attention, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return attn.to_q(states), attn.to_k(states), attn.to_v(states)

    def _text_linear(self, attn: Attention, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return attn.add_q_proj(states), attn.add_k_proj(states), attn.add_v_proj(states)


class ConceptFusedAuraFlowAttnProcessor2_0(_AuraFlowProcessor, FusedAuraFlowAttnProcessor2_0):
    """Drop-in for `FusedAuraFlowAttnProcessor2_0`, which `fuse_qkv_projections` puts in."""

    stock: ClassVar[type | None] = FusedAuraFlowAttnProcessor2_0

    def _linear(self, attn: Attention, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return cast("tuple[torch.Tensor, ...]", attn.to_qkv(states).chunk(3, -1))

    def _text_linear(self, attn: Attention, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return cast("tuple[torch.Tensor, ...]", attn.to_added_qkv(states).chunk(3, -1))


def _split_heads(attn: Attention, states: torch.Tensor) -> torch.Tensor:
    return states.view(states.shape[0], states.shape[1], attn.heads, -1)


def _norm_heads(attn: Attention, linear: tuple[torch.Tensor, ...], norm_query: Any, norm_key: Any) -> _Heads:
    """Query, key and value `[batch, S, H, D]`, from their linear projections."""
    query, key, value = (_split_heads(attn, part) for part in linear)
    return norm_query(query), norm_key(key), value


def _join_heads(output: torch.Tensor) -> torch.Tensor:
    return output.transpose(1, 2).reshape(output.shape[0], output.shape[2], -1)


def _finish(attn: Attention, states: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, attn.to_out[1](attn.to_out[0](states)))


BACKBONE = AuraFlowBackbone()
