"""`attention="one_pass"`: concept rows that ride along in the blocks' own calls instead of re-entering the blocks.

Before a block they are put behind its text, so that its norms, projections and feed-forward take them in the calls
they make anyway; its attention processor lets them read and not be read; behind the block they are taken off again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffusers_concept_maps.backbones import Backbone, JoiningBackbone, uncompiled
from diffusers_concept_maps.compiled import is_compiled
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.one_directional import Layout, one_directional_attention


class JoinedConcepts:
    """The concept tokens of one forward pass, in every row of the batch.

    Attributes:
        riding: True from the start of a block that carries them until its attention has taken them.
    """

    def __init__(
        self,
        backbone: JoiningBackbone,
        transformer: Any,
        embeds: torch.Tensor,
        *,
        call: Mapping[str, Any],
        multiplicity: torch.Tensor | None,
        reads: str,
    ) -> None:
        """Assign only.

        Args:
            backbone: of the transformer.
            transformer: the model.
            embeds: text encoder states `[batch, concept, text_width]`.
            call: what the transformer was called with, by name.
            multiplicity: float `[concept]`, how many equal concepts each one stands for; None is one each.
            reads: what concept tokens attend to, one of `stream.READS`.
        """
        self.riding = False
        self._carried = False
        self._backbone = backbone
        self._transformer = transformer
        self._embeds = embeds
        self._call = call
        self._multiplicity = multiplicity
        self._reads = reads
        self._concepts: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """Number of concept rows."""
        return self._embeds.shape[1]

    def join(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What to call the next block with: its arguments, by name, with the concepts behind the text."""
        if self._concepts is None:
            like, rows = arguments["hidden_states"], slice(None)
            with torch.no_grad():
                self._concepts = self._backbone.enter(self._transformer, self._embeds, like, self._call, rows)
        self.riding = self._carried = True
        return self._backbone.join(arguments, self._concepts)

    def part(self, block_output: Any) -> Any:
        """What the block would have returned without the concepts, which move on to the next one.

        Raises:
            ConceptMapsError: the block did not call its attention processor.
        """
        if not self._carried:
            return block_output
        self._carried = False
        if self.riding:
            raise ConceptMapsError(
                "a block returned without calling its attention processor, so that the concepts in it have read "
                "nothing; something skips attention or takes it from a cache. Use attention='exact'"
            )
        stock, concepts = self._backbone.part(block_output, self.count)
        self._concepts = concepts.detach()
        return stock

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, text: int, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of a block that carries the concepts; see `one_directional_attention`.

        Args:
            query: `[batch, H, S, D]` of text, image and concept tokens in this order.
            key: likewise.
            value: likewise.
            text: number of text tokens.
            mask: of the block's own attention, over text and image.
        """
        self.riding = False
        layout = Layout(text, query.shape[2] - text - self.count, self.count)
        return one_directional_attention(
            query, key, value, layout, mask=mask, reads=self._reads, multiplicity=self._multiplicity
        )


def check_one_pass(backbone: Backbone, transformer: Any) -> None:
    """Refuse a transformer whose blocks cannot carry concepts.

    Raises:
        ConceptMapsValueError: the model family has no way to do it.
        ConceptMapsError: the state of this transformer is in the way; the message says what.
    """
    if not isinstance(backbone, JoiningBackbone):
        raise ConceptMapsValueError(
            f"attention is 'one_pass', but the blocks of {type(uncompiled(transformer)).__name__} have no text "
            f"stream that concepts could join; use attention='exact'"
        )
    obstacle = _obstacle(transformer)
    if obstacle is not None:
        raise ConceptMapsError(
            f"attention='one_pass' sends the concepts through the blocks' own calls, which does not work with "
            f"{obstacle}; do without, or use attention='exact'"
        )


def check_call(backbone: Backbone, transformer: Any) -> None:
    """As `check_one_pass`, before a forward pass that will be recorded: what may have changed since the attach."""
    check_one_pass(backbone, transformer)
    if torch.is_grad_enabled() and getattr(transformer, "gradient_checkpointing", False):
        raise ConceptMapsError(
            "attention='one_pass' changes the blocks' inputs, which gradient checkpointing would have to see again; "
            "run under torch.no_grad(), or use attention='exact'"
        )


def _obstacle(transformer: Any) -> str | None:
    """What keeps the concepts out of the blocks' own calls."""
    if transformer.training:
        return "training mode, in which dropout would draw for them too"
    if any(is_compiled(module) for module in transformer.modules()):
        return "torch.compile, whose graphs hold the stock calls"
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in () if registry is None else registry.hooks.values():
            kind = type(hook).__name__
            if kind.startswith("ContextParallel"):
                return "context parallelism, which shards the sequence"
            if hook._is_stateful:  # of diffusers' hooks the caches, and only they, keep something between calls
                return f"a cache ({kind}), which would keep or leave out their rows"
    return None
