"""Cross-attention: image queries against concept keys, the baseline of every paper of the field."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from diffusers_concept_maps import ops
from diffusers_concept_maps.methods._base import LayerTaps, Method, Rules, mean_weights


class CrossAttention(Method):
    """Attention logits `q k / sqrt(d)` of image tokens on concept tokens, mean over heads, softmax over concepts."""

    name: ClassVar[str] = "cross_attention"
    default_normalize: ClassVar[str] = "softmax"

    def score(self, taps: LayerTaps, heads: torch.Tensor, rules: Rules) -> torch.Tensor:
        """See `Method.score`."""
        if rules.probabilities:
            tokens = torch.arange(taps.text_key.shape[2], device=taps.text_key.device)
            query = taps.image_query / math.sqrt(taps.image_query.shape[-1])  # for the second time, in the op
            return ops.attention_probabilities(query, taps.text_key, tokens, mean_weights(heads))
        return ops.query_key_similarity(
            taps.image_query,
            taps.text_key,
            mean_weights(heads),
            scaled=rules.scaled,
            standardize=rules.standardize,
            multiplicity=taps.multiplicity,
        )
