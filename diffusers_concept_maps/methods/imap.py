"""IMAP (arXiv 2603.02919): GramCol restricted to motion heads and, where a preset names them, to chosen layers."""

from __future__ import annotations

from typing import ClassVar

from diffusers_concept_maps.heads import HeadSelection
from diffusers_concept_maps.methods.gramcol import GramCol


class IMAP(GramCol):
    """GramCol over the five heads whose features separate the frames best (Calinski-Harabasz index)."""

    name: ClassVar[str] = "imap"
    default_heads: ClassVar[HeadSelection | None] = HeadSelection(top_k=5)
