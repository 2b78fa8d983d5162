"""Which layer, in which step, knows where a point goes: matching in a pipeline that generates (DiffTrack)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_concept_maps.backbones import find_backbone, find_transformers, uncompiled
from diffusers_concept_maps.correspondence.matching import Matches, MatchOptions, match_points
from diffusers_concept_maps.correspondence.probe import LayerTokens, attach_probe
from diffusers_concept_maps.correspondence.readout import TokenGrid, covering_frames, covering_visibility
from diffusers_concept_maps.correspondence.scores import SegmentScores, segment_scores
from diffusers_concept_maps.errors import ConceptMapsValueError


@dataclass(frozen=True)
class Cell:
    """What one layer knows in one step.

    Attributes:
        matches: of the points in every frame of tokens, in pixels; see `Matches`.
        scores: attention and confidence of the points; None where their visibility was not given.
    """

    matches: Matches
    scores: SegmentScores | None


class Correspondence:
    """Matches of every layer and step that was asked for, filled while the pipeline runs.

    Attributes:
        points: float32 `[point, 3]`, (frame, x, y): a frame of the video, and its pixels by their centers.
        cover: int64 `[video frame]`, the frame of tokens that covers each; known once the pipeline has run.
    """

    def __init__(self, points: torch.Tensor) -> None:
        """Nothing has run yet."""
        self.points = points
        self.cover = torch.zeros(0, dtype=torch.int64)
        self._cells: dict[tuple[int, int], Cell] = {}

    @property
    def steps(self) -> tuple[int, ...]:
        """The 0-based steps that were recorded."""
        return tuple(sorted({step for step, _ in self._cells}))

    @property
    def layers(self) -> tuple[int, ...]:
        """The 0-based layers that were recorded."""
        return tuple(sorted({layer for _, layer in self._cells}))

    def cell(self, step: int, layer: int) -> Cell:
        """What one layer knows in one step, on the device of the model.

        Raises:
            ConceptMapsValueError: it was not recorded.
        """
        if (step, layer) not in self._cells:
            raise ConceptMapsValueError(
                f"step {step} of layer {layer} was not recorded; recorded were steps {list(self.steps)} of layers "
                f"{list(self.layers)}"
            )
        return self._cells[step, layer]

    def restart(self) -> None:
        """A run of the pipeline begins: what an earlier one left is dropped."""
        self._cells = {}

    def put(self, step: int, layer: int, cell: Cell) -> None:
        """Keep what one layer knows in one step."""
        self._cells[step, layer] = cell


@contextmanager
def trace_correspondence(
    pipe: Any,
    points: Any,
    *,
    size: tuple[int, int],
    num_frames: int,
    layers: Iterable[int] | None = None,
    steps: Iterable[int] | None = None,
    heads: Sequence[int] | None = None,
    options: MatchOptions | None = None,
    visibility: torch.Tensor | None = None,
    agreement: bool = False,
) -> Iterator[Correspondence]:
    """Match points of a video between its frames while an unmodified pipeline generates it.

    Of every layer only the rows of the points are computed. The frames are those of the pipeline alone, bit for bit.

    Args:
        pipe: a video pipeline whose transformer is one of `supported()`, or such a transformer.
        points: float `[point, 3]`, (frame, x, y): a frame of the video, and its pixels by their centers.
        size: `(height, width)` of the video in pixels.
        num_frames: of the video.
        layers: 0-based; None is all.
        steps: 0-based; None is all.
        heads: 0-based, of which the mean is taken; None is all.
        options: how matches are made and read; None is `MatchOptions()`.
        visibility: bool `[point, num_frames]`, for the attention and confidence scores; None leaves them out.
        agreement: match every match back, too.

    Yields:
        `Correspondence`, valid after the block.

    Raises:
        ConceptMapsError: the transformer cannot be listened to, or an argument is wrong; nothing has changed then.
    """
    queries = torch.as_tensor(points, dtype=torch.float32)
    if queries.ndim != 2 or queries.shape[1] != 3 or not len(queries):
        raise ConceptMapsValueError(
            f"points have shape {tuple(queries.shape)}; expected [point, 3], of which each is (frame, x, y)"
        )
    if not 0 <= int(queries[:, 0].min()) <= int(queries[:, 0].max()) < num_frames:
        raise ConceptMapsValueError(f"a point is in a frame outside of the video; expected 0 to {num_frames - 1}")
    if visibility is not None and visibility.shape != (len(queries), num_frames):
        raise ConceptMapsValueError(
            f"visibility has shape {tuple(visibility.shape)}; expected {(len(queries), num_frames)}"
        )
    found = Correspondence(queries)
    transformer = uncompiled(find_transformers(pipe)[0])
    geometry = find_backbone(transformer).geometry(transformer)

    def consume(layer: LayerTokens) -> None:
        grid = layer.token_grid(size)
        found.cover = covering_frames(num_frames, grid.frames, **geometry)
        own = queries.clone()
        own[:, 0] = found.cover[queries[:, 0].long()]
        matches = match_points(layer.query, layer.key, own, grid, options, heads=heads, agreement=agreement)
        found.put(layer.step, layer.layer, Cell(matches, None if visibility is None else score(layer, own, grid)))

    def score(layer: LayerTokens, own: torch.Tensor, grid: TokenGrid) -> SegmentScores:
        assert visibility is not None
        text_key = layer.text_key if layer.text_key.shape[2] else None
        return segment_scores(
            layer.query,
            layer.key,
            own,
            covering_visibility(visibility, found.cover),
            grid,
            text_key=text_key,
            text_mask=layer.text_mask,
            heads=heads,
        )

    count = len(find_backbone(transformer).matching_sites(transformer))
    chosen = range(count) if layers is None else layers
    probe = attach_probe(pipe, consume, layers=chosen, steps=steps, start=found.restart)
    try:
        yield found
    finally:
        probe.remove()
