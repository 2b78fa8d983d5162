"""One capture at work: decides what is recorded, moves the concept stream, scores layers and accumulates maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils import logging
from torch import nn

from diffusers_concept_maps.accumulate import Accumulator
from diffusers_concept_maps.backbones import Backbone, Grid, Site
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.heads import HeadSelection
from diffusers_concept_maps.methods import LayerTaps
from diffusers_concept_maps.plan import CapturePlan, MethodPlan
from diffusers_concept_maps.progress import Place, RunTracker
from diffusers_concept_maps.stream import ConceptStream

logger = logging.get_logger(__name__)


class Recorder:
    """What hooks and attention processors of a traced transformer talk to."""

    def __init__(
        self, plan: CapturePlan, backbone: Backbone, transformer: Any, sites: list[Site], pipe: Any | None
    ) -> None:
        """Assign only."""
        self.plan = plan
        self._backbone = backbone
        self._transformer = transformer
        self._sites = sites
        self._layer = {site.attention: layer for layer, site in enumerate(sites)}
        self._tracker = RunTracker(pipe)
        self._stream: ConceptStream | None = None
        self._branches: dict[str, slice] = {}
        self._arguments: Mapping[str, Any] | None = None
        self._accumulators: dict[tuple[str, str], Accumulator] = {}

    def begin(self, call: Mapping[str, Any]) -> None:
        """A forward pass of the transformer starts; `call` are its arguments by name.

        Raises:
            ConceptMapsValueError: a step out of range, or embeddings of another batch size.
        """
        self.end()
        place = self._tracker.locate(self._backbone.batch(call))
        if place is None:
            return
        if place.starts_run:
            self._accumulators = {}
        if not self.plan.includes(place.step, place.steps):
            return
        rows = self._choose_rows(place)
        if rows is None:
            return
        grid = self._backbone.grid(self._transformer, call)
        self._restart_if_changed(grid)
        self._stream = ConceptStream(self._backbone, self._transformer, self._embeds(rows), grid, rows)

    def end(self) -> None:
        """The forward pass is over, or was cut short: let go of everything that belongs to it."""
        self._stream = self._arguments = None

    def hold(self, layer: int, arguments: Mapping[str, Any]) -> None:
        """A block is about to run; keep what its re-entry needs."""
        if self._stream is not None and not self._stream.answering and layer <= self.plan.deepest:
            self._arguments = arguments

    def records(self, attention: nn.Module) -> bool:
        """Whether this attention call, main or nested, is part of the capture."""
        return self._stream is not None and self._layer.get(attention, self.plan.deepest + 1) <= self.plan.deepest

    @property
    def answering(self) -> bool:
        """Whether the current attention call is the nested one of the concepts."""
        return self._stream is not None and self._stream.answering

    def answer(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Concept attention of the nested call; see `ConceptStream.answer`."""
        assert self._stream is not None  # `answering` is True
        return self._stream.answer(query, key, value)

    @torch.no_grad()
    def observe(
        self,
        attention: nn.Module,
        image_query: torch.Tensor,
        image_key: torch.Tensor,
        image_value: torch.Tensor,
        image_output: torch.Tensor,
    ) -> None:
        """The main attention call of a layer has run: advance the concepts and add the layer to the maps.

        Args:
            attention: the attention module.
            image_query: `[batch, H, N, D]` of the image tokens, after norms and rotary embedding.
            image_key: likewise.
            image_value: likewise.
            image_output: attention output before the output projection, likewise.
        """
        stream, arguments = self._stream, self._arguments
        assert stream is not None  # `records` is True
        if arguments is None:
            raise ConceptMapsError(
                "an attention module ran outside of its block, so that its layer cannot be traced; call the "
                "transformer itself"
            )
        layer, rows = self._layer[attention], stream.rows
        self._arguments = None
        concept_key, concept_output = stream.advance(self._sites[layer], arguments, image_key[rows], image_value[rows])
        taps = LayerTaps(image_query[rows], image_output[rows], concept_key, concept_output, stream.grid.frames)
        with torch.autocast(image_query.device.type, enabled=False):
            self._add(layer, taps, stream.grid)

    def read(self, branch: str, method: str) -> torch.Tensor:
        """The map of one method, float32 on the CPU `[row, concept, frame, height, width]`.

        Raises:
            ConceptMapsError: nothing has been recorded.
        """
        accumulator = self._accumulators.get((branch, method))
        if accumulator is None:
            raise ConceptMapsError(
                f"nothing has been recorded for branch {branch!r}; run the traced pipeline inside the `with` block"
                + (", with guidance" if branch == "uncond" else "")
            )
        return accumulator.mean()

    def _choose_rows(self, place: Place) -> slice | None:
        """Rows of the batch to record; the wanted branches are then slices of those rows."""
        wanted = {name: place.branches[name] for name in self.plan.branches if name in place.branches}
        if not wanted:
            return None
        start, stop = min(s.start for s in wanted.values()), max(s.stop for s in wanted.values())
        self._branches = {name: slice(s.start - start, s.stop - start) for name, s in wanted.items()}
        return slice(start, stop)

    def _embeds(self, rows: slice) -> torch.Tensor:
        """Concept embeddings of every recorded row; both branches of a video get the same."""
        count, embeds = rows.stop - rows.start, self.plan.embeds
        if embeds.ndim == 2:
            return embeds.expand(count, -1, -1)
        videos = count // len(self._branches)
        if embeds.shape[0] != videos:
            raise ConceptMapsValueError(
                f"concept_embeds has batch size {embeds.shape[0]}, but {videos} videos are generated; expected "
                f"[{videos}, concept, {embeds.shape[2]}] or [concept, {embeds.shape[2]}]"
            )
        return torch.cat([embeds] * len(self._branches))

    def _restart_if_changed(self, grid: Grid) -> None:
        rows = {branch: s.stop - s.start for branch, s in self._branches.items()}
        kept = [(a, rows[branch]) for (branch, _), a in self._accumulators.items() if branch in rows]
        if not all(accumulator.fits(grid, count) for accumulator, count in kept):
            logger.warning(
                "The size of the batch or of the token grid changed within a capture: its maps start anew. Use one "
                "capture per size to keep them all."
            )
            self._accumulators = {}

    def _add(self, layer: int, taps: LayerTaps, grid: Grid) -> None:
        chosen: dict[object, torch.Tensor] = {}
        for name, plan in self.plan.methods.items():
            if layer not in plan.layers:
                continue
            if plan.heads not in chosen:
                chosen[plan.heads] = _head_mask(plan.heads, taps)
            scores = _normalized(plan, taps, chosen[plan.heads])
            for branch, rows in self._branches.items():
                self._accumulators.setdefault((branch, name), Accumulator(grid)).add(scores[rows])


def _head_mask(heads: HeadSelection | tuple[int, ...] | None, taps: LayerTaps) -> torch.Tensor:
    """Ones for the heads to use, zeros for the others `[R, H]`."""
    if isinstance(heads, HeadSelection):
        return heads.choose(taps.image_output, taps.frames)
    shape, device = taps.image_output.shape[:2], taps.image_output.device
    if heads is None:
        return torch.ones(shape, device=device)
    mask = torch.zeros(shape, device=device)
    mask[:, list(heads)] = 1.0
    return mask


def _normalized(plan: MethodPlan, taps: LayerTaps, heads: torch.Tensor) -> torch.Tensor:
    scores = plan.method.score(taps, heads, standardize=plan.normalize == "zscore")
    return scores.softmax(dim=1) if plan.normalize == "softmax" else scores
