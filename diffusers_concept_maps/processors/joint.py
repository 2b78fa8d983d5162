"""Processors for joint attention over text and image with shared weights (CogVideoX).

They perform the operations of their stock class in its order, so that q, k, v and the output before its projection are
at hand; while nothing is captured they are the stock class. Tests compare both bit for bit with every host version.
Where concepts come along behind the text (`attention="one_pass"`), they go behind the image for the attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from diffusers.models.attention_processor import (
    Attention,
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
)
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn
from torch.nn import functional

from diffusers_concept_maps.processors._base import ConceptProcessor


def _is_shared_joint(attention: nn.Module, given: Mapping[str, Any]) -> bool:
    """Self-attention that is handed text but has no input projections of its own for it, and an output projection."""
    return (
        "encoder_hidden_states" in given
        and isinstance(attention, Attention)
        and not attention.is_cross_attention
        and attention.added_kv_proj_dim is None
        and not attention.pre_only
    )


class _SharedJointProcessor(ConceptProcessor):
    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of `[text | image]`; image `[batch, N, width]` and text `[batch, T, width]` in, the same out."""
        recorder = self.listener(attn)
        if recorder is None:
            stock: Any = super()
            return cast(
                "tuple[torch.Tensor, torch.Tensor]",
                stock.__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb),
            )
        joined = recorder.joined
        count = 0 if joined is None else joined.count
        text_states, concept_states = encoder_hidden_states.tensor_split(
            [encoder_hidden_states.size(1) - count], dim=1
        )
        query, key, value = self._project(attn, torch.cat([text_states, hidden_states, concept_states], dim=1))
        text, image = text_states.size(1), hidden_states.size(1)
        if recorder.answering:
            return self._finish(attn, recorder.answer(query, key, value), text, image)
        mask = self._prepare_mask(attn, attention_mask, text_states, text + image)
        at_image = slice(text, text + image)
        if image_rotary_emb is not None:
            query[:, :, at_image] = apply_rotary_emb(query[:, :, at_image], image_rotary_emb)
            if not attn.is_cross_attention:
                key[:, :, at_image] = apply_rotary_emb(key[:, :, at_image], image_rotary_emb)
        if recorder.restricts:
            output = recorder.restrict(query, key, value, text=slice(0, text), image=at_image, mask=mask)
        elif joined is not None:
            output = joined.attend(query, key, value, text, mask)
        else:
            output = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False
            )
        output = self.amend(attn, (query, key, value), output, text=slice(0, text), image=at_image, mask=mask)
        result = self._finish(attn, output, text, image)
        at_concepts = slice(text + image, None) if joined is not None else None
        recorder.observe(
            attn, query, key, value, output, text=slice(0, text), image=at_image, concepts=at_concepts, mask=mask
        )
        return result

    def _project(self, attn: Attention, joint: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value `[batch, H, S, D]`, normed where the model does so."""
        query, key, value = (
            tensor.view(joint.shape[0], -1, attn.heads, tensor.shape[-1] // attn.heads).transpose(1, 2)
            for tensor in self._linear(attn, joint)
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        return query, key, value

    def _linear(self, attn: Attention, joint: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return attn.to_q(joint), attn.to_k(joint), attn.to_v(joint)

    def _prepare_mask(
        self, attn: Attention, mask: torch.Tensor | None, text: torch.Tensor, tokens: int
    ) -> torch.Tensor | None:
        if mask is None:
            return None
        prepared: torch.Tensor = attn.prepare_attention_mask(mask, tokens, text.shape[0])
        return prepared.view(text.shape[0], attn.heads, -1, prepared.shape[-1])

    @staticmethod
    def _finish(attn: Attention, output: torch.Tensor, text: int, image: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Output projection and dropout of `[batch, H, S, D]`, split into image and text with concepts behind it."""
        states = output.transpose(1, 2).reshape(output.shape[0], -1, output.shape[1] * output.shape[3])
        states = attn.to_out[1](attn.to_out[0](states))
        text_states, image_states, concept_states = states.tensor_split([text, text + image], dim=1)
        if concept_states.size(1):
            text_states = torch.cat([text_states, concept_states], dim=1)
        return image_states, text_states


class ConceptCogVideoXAttnProcessor2_0(_SharedJointProcessor, CogVideoXAttnProcessor2_0):
    """Drop-in for `CogVideoXAttnProcessor2_0`."""

    stock: ClassVar[type | None] = CogVideoXAttnProcessor2_0
    fused: ClassVar[bool | None] = False

    @classmethod
    def serves(cls, attention: nn.Module, given: Mapping[str, Any]) -> bool:
        """See `ConceptProcessor.serves`."""
        return _is_shared_joint(attention, given) and not attention.fused_projections


class ConceptFusedCogVideoXAttnProcessor2_0(_SharedJointProcessor, FusedCogVideoXAttnProcessor2_0):
    """Drop-in for `FusedCogVideoXAttnProcessor2_0`, after `fuse_qkv_projections`."""

    stock: ClassVar[type | None] = FusedCogVideoXAttnProcessor2_0
    fused: ClassVar[bool | None] = True

    @classmethod
    def serves(cls, attention: nn.Module, given: Mapping[str, Any]) -> bool:
        """See `ConceptProcessor.serves`."""
        return _is_shared_joint(attention, given) and bool(attention.fused_projections)

    def _linear(self, attn: Attention, joint: torch.Tensor) -> tuple[torch.Tensor, ...]:
        projected = attn.to_qkv(joint)
        return torch.split(projected, projected.shape[-1] // 3, dim=-1)

    def _prepare_mask(
        self, attn: Attention, mask: torch.Tensor | None, text: torch.Tensor, tokens: int
    ) -> torch.Tensor | None:
        if mask is None:
            return None
        # The stock fused class takes the length from the text alone; a drop-in does the same.
        prepared: torch.Tensor = attn.prepare_attention_mask(mask, text.shape[1], text.shape[0])
        return prepared.view(text.shape[0], attn.heads, -1, prepared.shape[-1])
