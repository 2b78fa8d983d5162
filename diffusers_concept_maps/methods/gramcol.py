"""GramCol (IMAP, arXiv 2603.02919): the Gram-matrix column of the token that best matches a concept."""

from __future__ import annotations

from typing import ClassVar

import torch

from diffusers_concept_maps import ops
from diffusers_concept_maps.methods._base import LayerTaps, Method, Rules, mean_weights


class GramCol(Method):
    """Per frame and head, inner products of all attention outputs with that of the concept's best-matching token.

    The default normalization standardizes every head's map over the whole clip. It keeps what differs between frames
    ("when") and does not depend on the other concepts, where the official z-score over the padded text axis turns a
    single concept into a binary map.
    """

    name: ClassVar[str] = "gramcol"
    default_normalize: ClassVar[str] = "zscore"

    def score(self, taps: LayerTaps, heads: torch.Tensor, rules: Rules) -> torch.Tensor:
        """See `Method.score`."""
        return ops.gram_columns(
            taps.image_output,
            taps.anchors,
            heads if rules.sum_heads else mean_weights(heads),
            standardize=rules.standardize,
            multiplicity=taps.multiplicity,
        )
