"""ConceptAttention (arXiv 2502.04320): similarity of concept and image attention outputs."""

from __future__ import annotations

from typing import ClassVar

import torch

from diffusers_concept_maps import ops
from diffusers_concept_maps.methods._base import LayerTaps, Method, Rules


class ConceptAttention(Method):
    """Dot product of the attention outputs of concept and image tokens, heads concatenated, softmax over concepts.

    The paper's ablation compares values, or concept queries with image keys, instead (`Rules.space`).
    """

    name: ClassVar[str] = "concept_attention"
    default_normalize: ClassVar[str] = "softmax"
    reading: ClassVar[bool] = True

    def score(self, taps: LayerTaps, heads: torch.Tensor, rules: Rules) -> torch.Tensor:
        """See `Method.score`; heads are summed, as a dot product of concatenated heads does."""
        if rules.space == "output" and rules.standardize == "none":
            return taps.output_similarity(heads)
        text, image = {
            "output": (taps.text_output, taps.image_output),
            "value": (taps.text_value, taps.image_value),
            "query_key": (taps.text_query, taps.image_key),
        }[rules.space]
        assert text is not None  # the plan has refused cross-attention
        assert image is not None
        return ops.output_similarity(text, image, heads, standardize=rules.standardize, multiplicity=taps.multiplicity)
