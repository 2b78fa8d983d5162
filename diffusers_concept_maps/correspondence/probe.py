"""Queries and keys of image tokens as they go into attention, layer by layer, while a pipeline runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusers_concept_maps.attachment import Attachment, check_alike, check_free
from diffusers_concept_maps.backbones import Backbone, Grid, Site, find_backbone, find_transformers, uncompiled
from diffusers_concept_maps.compiled import is_compiled
from diffusers_concept_maps.correspondence.readout import TokenGrid
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.indices import check_indices
from diffusers_concept_maps.listener import Announced, Pass, PassListener
from diffusers_concept_maps.progress import Place


@dataclass(frozen=True)
class LayerTokens:
    """What the attention of one layer works with, in the conditional rows.

    Attributes:
        step: 0-based denoising step.
        layer: 0-based.
        grid: of the image tokens, in the order of which these are.
        query: `[row, H, F * h * w, D]` of the image tokens, after norms and rotary embedding.
        key: likewise.
        text_key: `[row, H, text, D]`; no token where image tokens attend to themselves alone.
        text_mask: bool `[row, text]`, False for padding that nothing attends to; None where all is attended to.
    """

    step: int
    layer: int
    grid: Grid
    query: torch.Tensor
    key: torch.Tensor
    text_key: torch.Tensor
    text_mask: torch.Tensor | None

    def token_grid(self, size: tuple[int, int]) -> TokenGrid:
        """The grid over a video of that `(height, width)` in pixels."""
        stride = size[1] / self.grid.width, size[0] / self.grid.height
        return TokenGrid(self.grid.frames, self.grid.height, self.grid.width, stride)


class Probe(PassListener[Pass]):
    """Hands every layer that is asked for to a consumer, and keeps nothing."""

    def __init__(
        self,
        backbone: Backbone,
        sites: Mapping[nn.Module, list[Site]],
        pipe: Any | None,
        *,
        layers: frozenset[int],
        steps: frozenset[int] | None,
        consume: Callable[[LayerTokens], None],
        start: Callable[[], None] | None,
    ) -> None:
        """Assign only.

        Args:
            backbone: of the transformers.
            sites: layers of every transformer.
            pipe: the pipeline; None if every forward pass counts as a step.
            layers: which to hand over.
            steps: likewise; None is all.
            consume: what they are handed to.
            start: called where a run begins.
        """
        super().__init__(backbone, sites, pipe, layers=layers, branches=("cond",))
        self._steps = steps
        self._consume = consume
        self._begin_run = start

    def includes(self, place: Place) -> bool:
        """See `PassListener.includes`."""
        return self._steps is None or place.step in self._steps

    def start_run(self, place: Place) -> None:
        """See `PassListener.start_run`.

        Raises:
            ConceptMapsValueError: a step was asked for that the run does not have.
        """
        if self._steps is not None and place.steps is not None and max(self._steps) >= place.steps:
            raise ConceptMapsValueError(
                f"step {max(self._steps)} is out of range; this run has {place.steps} steps, 0 to {place.steps - 1}"
            )
        if self._begin_run is not None:
            self._begin_run()

    def open(self, announced: Announced, current: Pass, present: Mapping[str, slice], device: torch.device) -> Pass:
        """See `PassListener.open`.

        Raises:
            ConceptMapsValueError: there is one frame only.
        """
        if current.grid.frames == 1:
            raise ConceptMapsValueError("there is only one frame, and nothing to match it with; use a video")
        return current

    @torch.no_grad()
    def observe(
        self,
        attention: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        *,
        text: slice,
        image: slice,
        concepts: slice | None = None,
        mask: torch.Tensor | None = None,
    ) -> None:
        """See `PassListener.observe`."""
        current = self._pass
        assert current is not None  # `records` is True
        rows, grid = current.rows, current.grid
        text_key = key[rows, :, text]
        self._consume(
            LayerTokens(
                step=current.step,
                layer=self._layer[attention],
                grid=grid,
                query=grid.select(query[rows, :, image]),
                key=grid.select(key[rows, :, image]),
                text_key=text_key,
                text_mask=_text_mask(mask, rows, text, text_key),
            )
        )
        current.arguments = None


def _text_mask(mask: torch.Tensor | None, rows: slice, text: slice, text_key: torch.Tensor) -> torch.Tensor | None:
    """Which text tokens the first query that sees any sees `[row, text]`."""
    if mask is None or not text_key.shape[2]:
        return None
    seen = mask if mask.dtype == torch.bool else mask > -1
    own = seen.expand(-1, 1, -1, -1)[rows, 0]  # [row, S or 1, S]
    return own[..., text].any(1).expand(text_key.shape[0], -1)


def attach_probe(
    pipe: Any,
    consume: Callable[[LayerTokens], None],
    *,
    layers: Iterable[int],
    steps: Iterable[int] | None = None,
    single_passes: bool = False,
    start: Callable[[], None] | None = None,
) -> Attachment:
    """Attach a probe to a pipeline, or to a bare transformer, of which every pass counts as a step.

    Args:
        pipe: a video pipeline whose transformer is one of `supported()`, or such a transformer.
        consume: is handed the layers as the transformer runs.
        layers: 0-based.
        steps: 0-based; None is all.
        single_passes: every pass counts as a step, and ends behind the deepest layer with
            `attachment.DeepestLayerReached`.
        start: called where a run begins.

    Returns:
        What `remove()` takes out again.

    Raises:
        ConceptMapsError: the transformer cannot be listened to, or an argument is wrong; nothing has changed then.
    """
    outer = find_transformers(pipe)
    transformers = [uncompiled(transformer) for transformer in outer]
    backbone = find_backbone(transformers[0])
    sites = {transformer: find_backbone(transformer).matching_sites(transformer) for transformer in transformers}
    for transformer, own in sites.items():
        check_free(transformer, own)
        if any(is_compiled(module) for module in transformer.modules()):
            raise ConceptMapsError(
                "frames cannot be matched in what torch.compile has compiled; use the pipeline uncompiled"
            )
    check_alike(backbone, sites)
    chosen = check_indices("layer", layers, len(sites[transformers[0]]))
    wanted = None if steps is None else check_indices("step", steps, None)
    listened = None if single_passes or outer[0] is pipe else pipe
    probe = Probe(backbone, sites, listened, layers=chosen, steps=wanted, consume=consume, start=start)
    attached = dict(zip(outer, sites.values(), strict=True))
    return Attachment(probe, backbone, attached, deepest=max(chosen), stops=single_passes)
