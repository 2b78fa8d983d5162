"""Which layer, in which step, knows where a point goes: matching in a pipeline that generates (DiffTrack)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from diffusers_concept_maps.backbones import find_backbone, find_transformers, uncompiled
from diffusers_concept_maps.correspondence.matching import Matches, MatchOptions, each_head, match_points
from diffusers_concept_maps.correspondence.points import check_points
from diffusers_concept_maps.correspondence.probe import LayerTokens, attach_probe
from diffusers_concept_maps.correspondence.readout import TokenGrid, covering_frames, covering_visibility
from diffusers_concept_maps.correspondence.scores import SegmentScores, segment_scores
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.fitting import fit_clip
from diffusers_concept_maps.indices import check_indices
from diffusers_concept_maps.media import read_frames
from diffusers_concept_maps.noising import check_levels
from diffusers_concept_maps.single_pass import SinglePass

__all__ = ["Cell", "Correspondence", "encode_correspondence", "trace_correspondence"]

PARITIES = ("difftrack",)


@dataclass(frozen=True)
class Cell:
    """What one layer knows in one step.

    Attributes:
        matches: of the points in every frame of tokens, in pixels; see `Matches`. Of single heads, rows become
            `[R, H]`.
        scores: attention and confidence of the points; None where their visibility was not given.
    """

    matches: Matches
    scores: SegmentScores | None


class Correspondence:
    """Matches of every layer and step that was asked for, filled while the pipeline runs.

    Attributes:
        points: float32 `[point, 3]`, (frame, x, y): a frame of the video, and its pixels by their centers.
        cover: int64 `[video frame]`, the frame of tokens that covers each; known once the pipeline has run.
        stride: pixels per token, (x, y); known once the pipeline has run.
    """

    def __init__(self, points: torch.Tensor) -> None:
        """Nothing has run yet."""
        self.points = points
        self.cover = torch.zeros(0, dtype=torch.int64)
        self.stride = (0.0, 0.0)
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


class _Reader:
    """Reads what was asked for out of every layer that is handed to it."""

    def __init__(
        self,
        transformer: Any,
        points: Any,
        *,
        size: tuple[int, int],
        num_frames: int,
        heads: Iterable[int] | None,
        options: MatchOptions | None,
        visibility: torch.Tensor | None,
        agreement: bool,
        per_head: bool,
        parity: str | None,
    ) -> None:
        """Check the arguments of `trace_correspondence`, of which these are some."""
        backbone = find_backbone(transformer)
        if parity not in (None, *PARITIES):
            raise ConceptMapsValueError(f"unknown parity {parity!r}; expected one of {', '.join(PARITIES)}")
        if parity and options is not None:
            raise ConceptMapsValueError(
                f"options {options} are there with parity {parity!r}, which has its own; drop one"
            )
        queries = check_points(points, frames=num_frames, size=size)
        expected = (len(queries), num_frames)
        if visibility is not None and (visibility.shape != expected or visibility.dtype != torch.bool):
            raise ConceptMapsValueError(
                f"visibility is {visibility.dtype} of shape {tuple(visibility.shape)}; expected torch.bool of shape "
                f"{expected}"
            )
        count = backbone.heads(transformer)
        self.found = Correspondence(queries)
        self.layers = range(len(backbone.matching_sites(transformer)))
        self._size, self._num_frames = size, num_frames
        self._geometry = backbone.geometry(transformer)
        self._heads = None if heads is None else sorted(check_indices("head", heads, count))
        self._options = MatchOptions("both", "difftrack") if parity else options
        self._visibility = None if visibility is None else visibility.cpu()
        self._agreement, self._per_head = agreement, per_head
        self._quirks = {"swap_axes": bool(parity), "all_points": bool(parity)}

    def consume(self, layer: LayerTokens) -> None:
        """Keep the matches and scores of a layer in `found`."""
        self.put(layer, layer.step)

    def put(self, layer: LayerTokens, step: int) -> None:
        """As `consume`, by another number of the step."""
        grid, found = layer.token_grid(self._size), self.found
        found.cover = covering_frames(self._num_frames, grid.frames, **self._geometry)
        found.stride = grid.stride
        queries = found.points.clone()
        queries[:, 0] = found.cover[queries[:, 0].long()]
        sides, heads, rows = self._sides(layer)
        matches = match_points(
            sides[0], sides[1], queries, grid, self._options, heads=heads, agreement=self._agreement
        )
        scores = None if self._visibility is None else self._score(layer, sides, queries, grid, heads)
        if rows is not None:
            matches = _split_rows(matches, rows)
            scores = None if scores is None else _split_rows(scores, rows)
        found.put(step, layer.layer, Cell(matches, scores))

    def _sides(
        self, layer: LayerTokens
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], list[int] | None, tuple[int, int] | None]:
        """Query, key and text key; the heads that are their mean; and rows and heads where each stands alone."""
        sides = layer.query, layer.key, layer.text_key
        if not self._per_head:
            return sides, self._heads, None
        chosen = sides if self._heads is None else tuple(side[:, self._heads] for side in sides)
        alone = each_head(chosen[0]), each_head(chosen[1]), each_head(chosen[2])
        return alone, None, (chosen[0].shape[0], chosen[0].shape[1])

    def _score(
        self,
        layer: LayerTokens,
        sides: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        queries: torch.Tensor,
        grid: TokenGrid,
        heads: list[int] | None,
    ) -> SegmentScores:
        assert self._visibility is not None
        query, key, text_key = sides
        mask = layer.text_mask
        if mask is not None:
            mask = mask.repeat_interleave(len(query) // len(mask), dim=0)
        return segment_scores(
            query,
            key,
            queries,
            covering_visibility(self._visibility, self.found.cover),
            grid,
            text_key=text_key if text_key.shape[2] else None,
            text_mask=mask,
            heads=heads,
            **self._quirks,
        )


@contextmanager
def trace_correspondence(
    pipe: Any,
    points: Any,
    *,
    size: tuple[int, int],
    num_frames: int,
    layers: Iterable[int] | None = None,
    steps: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    per_head: bool = False,
    options: MatchOptions | None = None,
    visibility: torch.Tensor | None = None,
    agreement: bool = False,
    parity: str | None = None,
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
        per_head: each of the heads by itself instead of their mean.
        options: how matches are made and read; None is `MatchOptions()`.
        visibility: bool `[point, num_frames]`, for the attention and confidence scores; None leaves them out.
        agreement: match every match back, too.
        parity: "difftrack" reads matches and counts scores as the official code does, see `docs/correspondence.md`.

    Yields:
        `Correspondence`, valid after the block.

    Raises:
        ConceptMapsError: the transformer cannot be listened to, or an argument is wrong; nothing has changed then.

    Example:
        >>> points = [(0, 120.0, 80.0)]
        >>> with dcm.trace_correspondence(pipe, points, size=(480, 720), num_frames=49, layers=[17]) as found:
        ...     pipe("a dog runs", generator=torch.Generator().manual_seed(42))
        >>> found.cell(step=49, layer=17).matches.positions  # [1, 1, 13, 2]
    """
    reader = _Reader(
        uncompiled(find_transformers(pipe)[0]),
        points,
        size=size,
        num_frames=num_frames,
        heads=heads,
        options=options,
        visibility=visibility,
        agreement=agreement,
        per_head=per_head,
        parity=parity,
    )
    chosen = reader.layers if layers is None else layers
    probe = attach_probe(pipe, reader.consume, layers=chosen, steps=steps, start=reader.found.restart)
    try:
        yield reader.found
    finally:
        probe.remove()


def encode_correspondence(
    pipe: Any,
    video: Any,
    points: Any,
    *,
    noise_level: float | Iterable[float] = 0.5,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    per_head: bool = False,
    options: MatchOptions | None = None,
    visibility: torch.Tensor | None = None,
    agreement: bool = False,
    parity: str | None = None,
    prompt: str = "",
    size: tuple[int, int] | None = None,
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
) -> Correspondence:
    """Match points of a real video between its frames: noise is added, and one pass per noise level made.

    Args:
        pipe: a video pipeline whose transformer is one of `supported()`.
        video: whatever `media.read_frames` reads, of as many frames as the model takes, or fewer.
        points: as for `trace_correspondence`.
        noise_level: fraction of the training schedule in (0, 1], or several: they are the steps of what is returned.
        layers: 0-based; None is all.
        heads: 0-based, of which the mean is taken; None is all.
        per_head: each of the heads by itself instead of their mean.
        options: how matches are made and read; None is `MatchOptions()`.
        visibility: as for `trace_correspondence`.
        agreement: match every match back, too.
        parity: as for `trace_correspondence`.
        prompt: what to tell the model of the video.
        size: `(height, width)` in pixels that the model gets; None keeps the aspect ratio, at no more than the area
            that the model makes by default. Points and matches are in pixels of the video all the same.
        seed: of the noise.
        call: further arguments of the pipeline's call.

    Returns:
        `Correspondence`, whose step is the position of a noise level.

    Raises:
        ConceptMapsError: the video cannot be read or is no length that the model takes, the transformer cannot be
            listened to, or an argument is wrong; the pipeline is as it was in any case.
    """
    frames, levels = read_frames(video).frames, check_levels(noise_level)
    single = SinglePass(pipe, prompt=prompt, call=call)
    shape = single.backbone.clip_shape(single.pipe)
    if (len(frames) - 1) % shape.frame_step or len(frames) > shape.frames:
        raise ConceptMapsValueError(
            f"the video has {len(frames)} frames; expected a multiple of {shape.frame_step} and one, at most "
            f"{shape.frames}: hand over as many of them"
        )
    reader = _Reader(
        uncompiled(single.pipe.transformer),
        points,
        size=(frames.shape[2], frames.shape[3]),
        num_frames=len(frames),
        heads=heads,
        options=options,
        visibility=visibility,
        agreement=agreement,
        per_head=per_head,
        parity=parity,
    )
    fitted, _ = fit_clip(frames, area=shape.area, multiple=shape.multiple, size=size)
    latents = single.encode(fitted.transpose(0, 1)[None])
    chosen = reader.layers if layers is None else list(layers)
    for step, level in enumerate(levels):
        probe = attach_probe(single.pipe, partial(reader.put, step=step), layers=chosen, single_passes=True)
        try:
            single.run(latents, level, fitted, seed=seed)
        finally:
            probe.remove()
    return reader.found


def _split_rows(result: Any, rows: tuple[int, int]) -> Any:
    """Matches or scores whose rows are `[R, H]`."""
    tensors = {f.name: getattr(result, f.name) for f in fields(result)}
    return replace(
        result, **{name: t.unflatten(0, rows) for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    )
