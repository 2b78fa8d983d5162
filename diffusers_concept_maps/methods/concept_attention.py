"""ConceptAttention (arXiv 2502.04320): similarity of concept and image attention outputs."""

from __future__ import annotations

from typing import ClassVar

import torch

from diffusers_concept_maps import ops
from diffusers_concept_maps.methods._base import LayerTaps, Method


class ConceptAttention(Method):
    """Dot product of the attention outputs of concept and image tokens, heads concatenated, softmax over concepts."""

    name: ClassVar[str] = "concept_attention"
    default_normalize: ClassVar[str] = "softmax"

    def score(self, taps: LayerTaps, heads: torch.Tensor, *, standardize: bool) -> torch.Tensor:
        """See `Method.score`; heads are summed, as a dot product of concatenated heads does."""
        return ops.output_similarity(taps.concept_output, taps.image_output, heads, standardize=standardize)
