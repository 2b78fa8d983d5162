"""Cross-attention: image queries against concept keys, the baseline of every paper of the field."""

from __future__ import annotations

from typing import ClassVar

import torch

from diffusers_concept_maps import ops
from diffusers_concept_maps.methods._base import LayerTaps, Method, mean_weights


class CrossAttention(Method):
    """Attention logits `q k / sqrt(d)` of image tokens on concept tokens, mean over heads, softmax over concepts."""

    name: ClassVar[str] = "cross_attention"
    default_normalize: ClassVar[str] = "softmax"

    def score(self, taps: LayerTaps, heads: torch.Tensor, *, standardize: bool) -> torch.Tensor:
        """See `Method.score`."""
        weights = mean_weights(heads)
        return ops.query_key_similarity(taps.image_query, taps.concept_key, weights, standardize=standardize)
