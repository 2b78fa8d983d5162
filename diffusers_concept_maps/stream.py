"""Concept tokens through the blocks of one forward pass.

Concepts never enter the main tensors. When a block's attention has run, the block's own class forward is entered once
more with an empty image stream and the concepts as its text: every norm, modulation, projection, gate and
feed-forward is the block's own code, and the attention inside it is answered from the image keys and values of the
main call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffusers_concept_maps import ops
from diffusers_concept_maps.backbones import Backbone, Grid, Site


class ConceptStream:
    """State of the concept tokens in one forward pass.

    Attributes:
        grid: token grid of the pass.
        rows: rows of the batch that are recorded.
        answering: True while a block is re-entered; its attention processor then calls `answer`.
    """

    def __init__(self, backbone: Backbone, transformer: Any, embeds: torch.Tensor, grid: Grid, rows: slice) -> None:
        """Assign only; `embeds` are text encoder states `[row, concept, text_width]`."""
        self.grid = grid
        self.rows = rows
        self.answering = False
        self._backbone = backbone
        self._transformer = transformer
        self._embeds = embeds
        self._concepts: torch.Tensor | None = None
        self._image: tuple[torch.Tensor, torch.Tensor] | None = None
        self._answered: tuple[torch.Tensor, torch.Tensor] | None = None

    def advance(
        self, site: Site, arguments: Mapping[str, Any], image_key: torch.Tensor, image_value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the concepts through one block.

        Args:
            site: the block and its attention module.
            arguments: what the block was called with, by name.
            image_key: keys of the image tokens of the recorded rows `[R, H, N, D]`.
            image_value: values, likewise.

        Returns:
            Keys and attention outputs of the concepts in this block `[R, H, C, D]`.
        """
        if self._concepts is None:
            self._concepts = self._backbone.enter(self._transformer, self._embeds, arguments["hidden_states"])
        nested = self._backbone.reentry(arguments, self._concepts, self.rows)
        # Caches patch `forward` of attention modules in the instance; the nested call must not reach their state.
        patched = site.attention.__dict__.pop("forward", None)
        self._image, self.answering = (image_key, image_value), True
        try:
            self._concepts = self._backbone.leave(type(site.block).forward(site.block, **nested))
        finally:
            self._image, self.answering = None, False
            if patched is not None:
                site.attention.__dict__["forward"] = patched
        assert self._answered is not None  # the block's attention has called `answer`
        answered, self._answered = self._answered, None
        return answered

    def answer(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of the concepts over themselves and the image.

        Args:
            query: concept queries `[R, H, C, D]`.
            key: concept keys, likewise.
            value: concept values, likewise.

        Returns:
            Concept outputs before the output projection `[R, H, C, D]`.
        """
        assert self._image is not None  # only called while a block is re-entered
        output = ops.concept_attention(query, key, value, *self._image)
        self._answered = (key, output)
        return output
