"""Concept tokens through the blocks of one forward pass.

Concepts never enter the main tensors. When a block's attention has run, the block's own class forward is entered once
more with an empty image stream and the concepts as its text: every norm, modulation, projection, gate and feed-forward
is the block's own code, and the attention inside it is answered from the image keys and values of the main call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from diffusers_concept_maps import ops
from diffusers_concept_maps.backbones import CrossBackbone, JointBackbone, Site, unpatched
from diffusers_concept_maps.parity import Parity

READS = ("both", "image", "concepts", "none")
"""What concept tokens attend to (ConceptAttention's ablation); "none" leaves each with its own value."""


class Heads(NamedTuple):
    """Query, key, value and attention output of some tokens `[R, H, S, D]`, the output before its projection."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor


class ConceptStream:
    """State of the concept tokens in one forward pass.

    Attributes:
        answering: True while a block is re-entered; its attention processor then calls `answer`.
    """

    def __init__(
        self,
        backbone: JointBackbone,
        transformer: Any,
        embeds: torch.Tensor,
        rows: slice,
        *,
        call: Mapping[str, Any],
        multiplicity: torch.Tensor | None,
        reads: str,
        parity: Parity | None,
    ) -> None:
        """Assign only.

        Args:
            backbone: of the transformer.
            transformer: the model.
            embeds: text encoder states `[row, concept, text_width]`.
            rows: rows of the batch that the concepts belong to.
            call: what the transformer was called with, by name.
            multiplicity: float `[concept]`, how many equal concepts each one stands for; None is one each.
            reads: one of `READS`.
            parity: the official implementation to equal, None for none.
        """
        self.answering = False
        self._backbone = backbone
        self._transformer = transformer
        self._embeds = embeds
        self._rows = rows
        self._call = call
        self._multiplicity = multiplicity
        self._reads = reads
        self._parity = parity
        self._concepts: torch.Tensor | None = None
        self._image: tuple[torch.Tensor, torch.Tensor] | None = None
        self._answered: Heads | None = None

    def advance(
        self, site: Site, arguments: Mapping[str, Any], image_key: torch.Tensor, image_value: torch.Tensor
    ) -> Heads:
        """Take the concepts through one block.

        Args:
            site: the block and its attention module.
            arguments: what the block was called with, by name.
            image_key: keys of the image tokens of the recorded rows `[R, H, N, D]`.
            image_value: values, likewise.

        Returns:
            What the concepts' attention was in this block.
        """
        if self._concepts is None:
            self._concepts = self._enter(self._backbone.image(arguments))
        if self._parity is not None and not self._parity.pooled:
            arguments = self._backbone.unpooled(self._transformer, arguments, self._call)
        nested = self._backbone.reentry(site.block, arguments, self._concepts, self._rows)
        self._image, self.answering = (image_key, image_value), True
        try:
            # Dropout of a block that is being trained draws for the concepts too.
            with (
                unpatched((site.attention, *site.others)),
                torch.random.fork_rng(_devices(image_key), enabled=site.block.training),
            ):
                self._concepts = self._backbone.leave(site.block, site.forward(site.block, **nested))
        finally:
            self._image, self.answering = None, False
        assert self._answered is not None  # the block's attention has called `answer`
        answered, self._answered = self._answered, None
        return answered

    def _enter(self, like: torch.Tensor) -> torch.Tensor:
        """The concepts before the first block."""
        where = (self._transformer, self._embeds, like, self._call, self._rows)
        if self._parity is not None and self._parity.quirks:
            return self._backbone.enter_with_quirks(*where, self._multiplicity)
        return self._backbone.enter(*where)

    def answer(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of the concepts over what they read.

        Args:
            query: concept queries `[R, H, C, D]`.
            key: concept keys, likewise.
            value: concept values, likewise.

        Returns:
            Concept outputs before the output projection `[R, H, C, D]`.
        """
        assert self._image is not None  # only called while a block is re-entered
        image_key, image_value = self._image
        if self._reads == "none":
            output = value
        elif self._reads == "image":
            nothing = query.new_zeros(query.shape[2])  # how often each concept's own key counts
            output = ops.concept_attention(query, key, value, image_key, image_value, nothing)
        else:
            seen = slice(None) if self._reads == "both" else slice(0, 0)
            output = ops.concept_attention(
                query, key, value, image_key[:, :, seen], image_value[:, :, seen], self._multiplicity
            )
        self._answered = Heads(query, key, value, output)
        return output


class FixedConcepts:
    """Concepts in one forward pass of a model whose text no block updates: each layer has keys for them."""

    def __init__(
        self,
        backbone: CrossBackbone,
        transformer: Any,
        embeds: torch.Tensor,
        rows: slice,
        *,
        call: Mapping[str, Any],
    ) -> None:
        """Assign only; see `ConceptStream`."""
        self._backbone = backbone
        self._transformer = transformer
        self._embeds = embeds
        self._rows = rows
        self._call = call
        self._context: torch.Tensor | None = None

    def keys(
        self, block: nn.Module, arguments: Mapping[str, Any], project: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Keys of the concepts in one layer `[R, H, C, D]`.

        Args:
            block: of the layer.
            arguments: what the block was called with, by name.
            project: from text as the layer's cross-attention takes it `[row, text, width]` to its keys.
        """
        like = self._backbone.image(arguments)
        # Dropout of a model that is being trained draws for the concepts too.
        with torch.random.fork_rng(_devices(like), enabled=self._transformer.training):
            if self._context is None:
                self._context = self._backbone.context(self._transformer, self._embeds, like, self._call, self._rows)
            return project(self._backbone.modulate(block, arguments, self._context, self._rows))


def _devices(tensor: torch.Tensor) -> list[torch.device]:
    """Devices beside the CPU whose random state a computation on the tensor may use."""
    return [] if tensor.device.type == "cpu" else [tensor.device]
