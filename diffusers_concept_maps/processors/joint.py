"""Processors for joint attention over text and image with shared weights (CogVideoX).

They perform the operations of their stock class in its order, so that q, k, v and the output before its projection are
at hand; while nothing is captured they are the stock class. Tests compare both bit for bit with every host version.
"""

from __future__ import annotations

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


def _is_shared_joint(attention: nn.Module, has_text: bool) -> bool:
    """Self-attention that is handed text but has no projections of its own for it."""
    return (
        has_text
        and isinstance(attention, Attention)
        and not attention.is_cross_attention
        and attention.added_kv_proj_dim is None
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
        recorder = self.recorder
        if recorder is None or not recorder.records(attn):
            stock: Any = super()
            return cast(
                "tuple[torch.Tensor, torch.Tensor]",
                stock.__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb),
            )
        text = encoder_hidden_states.size(1)
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = self._project(attn, joint)
        if recorder.answering:
            output = recorder.answer(query, key, value)
            return self._finish(attn, output, text)
        mask = self._prepare_mask(attn, attention_mask, joint, encoder_hidden_states)
        if image_rotary_emb is not None:
            query[:, :, text:] = apply_rotary_emb(query[:, :, text:], image_rotary_emb)
            if not attn.is_cross_attention:
                key[:, :, text:] = apply_rotary_emb(key[:, :, text:], image_rotary_emb)
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False
        )
        result = self._finish(attn, output, text)
        recorder.observe(attn, query, key, value, output, text=slice(0, text), image=slice(text, None))
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
        self, attn: Attention, mask: torch.Tensor | None, joint: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor | None:
        if mask is None:
            return None
        prepared: torch.Tensor = attn.prepare_attention_mask(mask, joint.shape[1], joint.shape[0])
        return prepared.view(joint.shape[0], attn.heads, -1, prepared.shape[-1])

    @staticmethod
    def _finish(attn: Attention, output: torch.Tensor, text: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Output projection and dropout of `[batch, H, S, D]`, split into image and text."""
        states = output.transpose(1, 2).reshape(output.shape[0], -1, output.shape[1] * output.shape[3])
        states = attn.to_out[1](attn.to_out[0](states))
        text_states, image_states = states.split([text, states.size(1) - text], dim=1)
        return image_states, text_states


class ConceptCogVideoXAttnProcessor2_0(_SharedJointProcessor, CogVideoXAttnProcessor2_0):
    """Drop-in for `CogVideoXAttnProcessor2_0`."""

    stock: ClassVar[type | None] = CogVideoXAttnProcessor2_0

    @classmethod
    def serves(cls, attention: nn.Module, has_text: bool) -> bool:
        """See `ConceptProcessor.serves`."""
        return _is_shared_joint(attention, has_text) and not attention.fused_projections


class ConceptFusedCogVideoXAttnProcessor2_0(_SharedJointProcessor, FusedCogVideoXAttnProcessor2_0):
    """Drop-in for `FusedCogVideoXAttnProcessor2_0`, after `fuse_qkv_projections`."""

    stock: ClassVar[type | None] = FusedCogVideoXAttnProcessor2_0

    @classmethod
    def serves(cls, attention: nn.Module, has_text: bool) -> bool:
        """See `ConceptProcessor.serves`."""
        return _is_shared_joint(attention, has_text) and bool(attention.fused_projections)

    def _linear(self, attn: Attention, joint: torch.Tensor) -> tuple[torch.Tensor, ...]:
        projected = attn.to_qkv(joint)
        return torch.split(projected, projected.shape[-1] // 3, dim=-1)

    def _prepare_mask(
        self, attn: Attention, mask: torch.Tensor | None, joint: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor | None:
        if mask is None:
            return None
        # The stock fused class takes the length from the text alone; a drop-in does the same.
        prepared: torch.Tensor = attn.prepare_attention_mask(mask, text.shape[1], text.shape[0])
        return prepared.view(text.shape[0], attn.heads, -1, prepared.shape[-1])
