"""Stable Diffusion 3 and 3.5.

Joint attention over image and text, image first, with projections of its own for text and without positions for it.
The text of the last block ends there, so that concepts are read from all blocks and carried through all but one. Their
modulation is that of the prompt, its pooled embedding included. Of skip-layer guidance, whose third pass leaves layers
out, the maps are those of the two full passes; of runs with perturbed attention, whose rows share the batch, there are
none.

The published code of ConceptAttention (arXiv 2502.04320) for SD3 is not what `parity="concept_attention"` reproduces,
which is its code for CogVideoX: for SD3 it encodes all concepts as one text by the CLIP encoders alone, takes image
outputs from a second attention in which the image reads concepts instead of the prompt, scales concept outputs to unit
length, and averages outputs over steps before it compares them. The concept outputs themselves are the same as here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from diffusers.models.attention_processor import (
    Attention,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.normalization import FP32LayerNorm
from torch import nn
from torch.nn import functional

from diffusers_concept_maps.backbones._base import Grid, JointBackbone, Site
from diffusers_concept_maps.backbones._real import ClipShape, ImageInput
from diffusers_concept_maps.processors._base import ConceptProcessor
from diffusers_concept_maps.tokens import check_encoders, token_spans, undisturbed, word_tokens

_CLIP_TOKENS = 77


class SD3Backbone(ImageInput, JointBackbone):
    """SD3, SD3.5 large, and SD3.5 medium, whose first blocks attend to the image once more without text."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("SD3Transformer2DModel",)
    editable: ClassVar[bool] = True

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
        needed = ["tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"]
        needed += [] if getattr(pipe, "text_encoder_3", None) is None else ["tokenizer_3"]
        check_encoders(pipe, *needed)
        cut, length = length is not None, length or 256
        encoders = (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3)
        with undisturbed(*(encoder for encoder in encoders if encoder is not None)):
            states, *_ = pipe.encode_prompt(
                texts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
            )
        if pipe.text_encoder_3 is None:  # its rows are zeros then
            states, tokenizer, room = states[:, 1:_CLIP_TOKENS], pipe.tokenizer, _CLIP_TOKENS - 1
        else:
            states, tokenizer, room = states[:, _CLIP_TOKENS:], pipe.tokenizer_3, length
        counts = [word_tokens(tokenizer, text, None if cut else room) for text in texts]
        return states, [min(count, room - 1) for count in counts]

    def token_spans(self, pipe: Any, prompt: str, length: int) -> list[tuple[int, int]]:
        """See `Backbone.token_spans`; the tokens of the CLIP encoders, then those of T5, all of the same prompt."""
        spans = token_spans(pipe.tokenizer, prompt, _CLIP_TOKENS)
        spans += [(0, 0)] * (_CLIP_TOKENS - len(spans))
        if pipe.text_encoder_3 is not None:
            spans += token_spans(pipe.tokenizer_3, prompt, length - _CLIP_TOKENS)
        return spans

    def misleading(self, pipe: Any, arguments: Mapping[str, Any]) -> str | None:
        """See `Backbone.misleading`; encoders that are given prompts of their own."""
        others = ("prompt_2",) if pipe.text_encoder_3 is None else ("prompt_2", "prompt_3")
        prompt = arguments.get("prompt")
        return next((name for name in others if arguments.get(name) and arguments[name] != prompt), None)

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`; latents are `[batch, channel, height, width]`."""
        _, _, height, width = call["hidden_states"].shape
        patch = int(transformer.config.patch_size)
        return Grid(1, height // patch, width // patch)

    def clip_shape(self, pipe: Any) -> ClipShape:
        """See `RealInput.clip_shape`."""
        factor, config = int(pipe.vae_scale_factor), pipe.transformer.config
        return ClipShape(factor * int(config.patch_size), (int(config.sample_size) * factor) ** 2)

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


class _JointProcessor(ConceptProcessor, ABC):
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
            output = recorder.answer(*self._project_text(attn, encoder_hidden_states))
            return hidden_states, _finish_text(attn, _join_heads(output))
        if encoder_hidden_states is None or self.listener(attn) is None:
            stock: Any = super()
            return stock.__call__(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        return self._record(attn, hidden_states, encoder_hidden_states)

    def _record(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        adapt: Callable[[torch.Tensor], torch.Tensor] = lambda image: image,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A call that is listened to; `adapt` changes what the image has read, before its output projection."""
        recorder = self.listener(attn)
        assert recorder is not None  # `__call__` has looked
        query, key, value = self._project(attn, hidden_states, encoder_hidden_states)
        output = functional.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=False)
        count = hidden_states.shape[1]
        at_text, at_image = slice(count, None), slice(0, count)
        output = self.amend(attn, (query, key, value), output, text=at_text, image=at_image)
        states = _join_heads(output).to(query.dtype)
        image, text = self._finish(attn, adapt(states[:, :count]), states[:, count:])
        recorder.observe(attn, query, key, value, output, text=at_text, image=at_image)
        return image, text

    @abstractmethod
    def _project(
        self, attn: Attention, image: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value `[batch, H, S, D]` of image and text."""

    @abstractmethod
    def _project_text(self, attn: Attention, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same of text alone."""

    def _finish(self, attn: Attention, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The output projections; a checkpoint that runs the stock code again wants its order here too."""
        text = _finish_text(attn, text)
        return attn.to_out[1](attn.to_out[0](image)), text


class _SeparateProcessor(_JointProcessor):
    """Every projection is a module of its own."""

    def _project(
        self, attn: Attention, image: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = (_split_heads(attn, linear(image)) for linear in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        text_query, text_key, text_value = self._project_text(attn, text)
        return torch.cat([query, text_query], 2), torch.cat([key, text_key], 2), torch.cat([value, text_value], 2)

    def _project_text(self, attn: Attention, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        linears = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        query, key, value = (_split_heads(attn, linear(text)) for linear in linears)
        if attn.norm_added_q is not None:
            query = attn.norm_added_q(query)
        if attn.norm_added_k is not None:
            key = attn.norm_added_k(key)
        return query, key, value


class ConceptJointAttnProcessor2_0(_SeparateProcessor, JointAttnProcessor2_0):
    """Drop-in for `JointAttnProcessor2_0`."""

    stock: ClassVar[type | None] = JointAttnProcessor2_0
    fused: ClassVar[bool | None] = False

    @classmethod
    def serves(cls, attention: nn.Module, given: Mapping[str, Any]) -> bool:
        """See `ConceptProcessor.serves`."""
        return _is_separate_joint(attention, given) and bool(attention.fused_projections) == cls.fused


class ConceptSD3IPAdapterJointAttnProcessor2_0(_SeparateProcessor, SD3IPAdapterJointAttnProcessor2_0):
    """Drop-in for `SD3IPAdapterJointAttnProcessor2_0`, in which the image reads another image as well."""

    stock: ClassVar[type | None] = SD3IPAdapterJointAttnProcessor2_0

    @classmethod
    def serves(cls, attention: nn.Module, given: Mapping[str, Any]) -> bool:
        """See `ConceptProcessor.serves`; it has weights of its own, which the router has not."""
        return False

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        ip_hidden_states: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> Any:
        """As `ConceptJointAttnProcessor2_0`; tokens of the other image `[batch, token, width]` and of their time."""
        answering = self.recorder is not None and self.recorder.answering
        if answering or encoder_hidden_states is None or self.listener(attn) is None:
            given = (hidden_states, encoder_hidden_states, attention_mask, ip_hidden_states, temb)
            return super().__call__(attn, *given)

        def adapt(image: torch.Tensor) -> torch.Tensor:
            if self.scale == 0 or ip_hidden_states is None:
                return image
            read = self._read(attn, hidden_states, self.norm_ip(ip_hidden_states, temb=temb))
            return cast(torch.Tensor, image + read * self.scale)

        return self._record(attn, hidden_states, encoder_hidden_states, adapt)

    def _read(self, attn: Attention, image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Attention of an image to itself and the other one."""
        query, key, value = (_split_heads(attn, linear(image)) for linear in (attn.to_q, attn.to_k, attn.to_v))
        other_key, other_value = (_split_heads(attn, linear(other)) for linear in (self.to_k_ip, self.to_v_ip))
        keys = torch.cat([self.norm_k(key), self.norm_ip_k(other_key)], dim=2)
        values = torch.cat([value, other_value], dim=2)
        query = self.norm_q(query)
        output = functional.scaled_dot_product_attention(query, keys, values, dropout_p=0.0, is_causal=False)
        return _join_heads(output).to(query.dtype)


class ConceptFusedJointAttnProcessor2_0(_JointProcessor, FusedJointAttnProcessor2_0):
    """Drop-in for `FusedJointAttnProcessor2_0`, which `fuse_qkv_projections` puts in.

    As there, queries and keys are not normed, and the image cannot attend to itself without text (SD3.5 medium).
    """

    stock: ClassVar[type | None] = FusedJointAttnProcessor2_0
    fused: ClassVar[bool | None] = True

    @classmethod
    def serves(cls, attention: nn.Module, given: Mapping[str, Any]) -> bool:
        """See `ConceptProcessor.serves`."""
        return _is_separate_joint(attention, given) and bool(attention.fused_projections) == cls.fused

    def _project(
        self, attn: Attention, image: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = zip(attn.to_qkv(image).chunk(3, -1), attn.to_added_qkv(text).chunk(3, -1), strict=True)
        query, key, value = (_split_heads(attn, torch.cat(part, dim=1)) for part in parts)
        return query, key, value

    def _project_text(self, attn: Attention, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = (_split_heads(attn, part) for part in attn.to_added_qkv(text).chunk(3, -1))
        return query, key, value

    def _finish(self, attn: Attention, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image = attn.to_out[1](attn.to_out[0](image))
        return image, _finish_text(attn, text)


def _is_separate_joint(attention: nn.Module, given: Mapping[str, Any]) -> bool:
    """Self-attention with projections of its own for text and without positions; that of AuraFlow has other norms."""
    return (
        isinstance(attention, Attention)
        and attention.added_kv_proj_dim is not None
        and attention.context_pre_only is not None
        and not isinstance(attention.norm_q, FP32LayerNorm)
        and set(given) == {"encoder_hidden_states"}
    )


def _split_heads(attn: Attention, states: torch.Tensor) -> torch.Tensor:
    return states.view(states.shape[0], states.shape[1], attn.heads, -1).transpose(1, 2)


def _join_heads(output: torch.Tensor) -> torch.Tensor:
    return output.transpose(1, 2).reshape(output.shape[0], output.shape[2], -1)


def _finish_text(attn: Attention, states: torch.Tensor) -> torch.Tensor:
    return states if attn.context_pre_only else cast(torch.Tensor, attn.to_add_out(states))


BACKBONE = SD3Backbone()
