"""How well every layer, in every step, knows where points go: the analysis of DiffTrack (arXiv 2506.17220), in tables.

A clip is scored by its tracks; scores of all clips become means with intervals, CSV files and heat maps. The controls
are what no model has to be asked for: points that stay where they are, and the tracks of another clip.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from diffusers_concept_maps.correspondence.readout import video_positions
from diffusers_concept_maps.correspondence.scores import harmonic_mean, matching_accuracy
from diffusers_concept_maps.correspondence.tracing import Correspondence
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.files import whole_file
from diffusers_concept_maps.visualize import require

__all__ = ["Summary", "TrackedClip", "score_clip", "summarize"]

COMBINED = ("accuracy", "confidence_cross", "attention_cross")
"""The scores whose harmonic mean is taken."""

CONTROLS = ("accuracy_still", "accuracy_shuffled")
"""What no model has to be asked for: points that stay where they are, and the tracks of another clip."""

_DRAWS = 1000  # of the bootstrap


@dataclass(frozen=True)
class TrackedClip:
    """A clip with points whose way is known.

    Attributes:
        name: of the clip.
        points: float32 `[point, 3]`, the queries (frame, x, y).
        tracks: float32 `[point, frame, 2]`, (x, y) in pixel-center coordinates.
        visibility: bool `[point, frame]`.
        size: `(height, width)` of the clip in pixels.
    """

    name: str
    points: torch.Tensor
    tracks: torch.Tensor
    visibility: torch.Tensor
    size: tuple[int, int]

    @classmethod
    def of(
        cls,
        name: str,
        tracks: torch.Tensor,
        visibility: torch.Tensor,
        size: tuple[int, int],
        *,
        first_frame: bool = False,
        every_point: bool = False,
    ) -> TrackedClip:
        """Ask for every point where it is first seen.

        Args:
            name: of the clip.
            tracks: float `[point, frame, 2]`.
            visibility: bool `[point, frame]`.
            size: `(height, width)` of the clip in pixels.
            first_frame: ask in the first frame alone, for the points that are visible there.
            every_point: keep points that are not visible where they are asked for, as the official code does.

        Raises:
            ConceptMapsValueError: shapes do not fit, or no point is visible in two frames.
        """
        if tracks.ndim != 3 or tracks.shape[2] != 2 or visibility.shape != tracks.shape[:2]:
            raise ConceptMapsValueError(
                f"{name} has tracks of shape {tuple(tracks.shape)} and visibility of shape {tuple(visibility.shape)}; "
                f"expected [point, frame, 2] and [point, frame]"
            )
        start = torch.zeros(len(tracks), dtype=torch.int64) if first_frame else visibility.int().argmax(1)
        seen = visibility.gather(1, start[:, None])[:, 0] & (visibility.sum(1) > 1)
        if not bool(seen.any()):
            raise ConceptMapsValueError(f"{name} has no point that is visible where it starts and in another frame")
        kept = torch.ones_like(seen) if every_point else seen
        tracks, visibility, start = tracks[kept].float(), visibility[kept], start[kept]
        place = tracks[torch.arange(len(tracks)), start]
        return cls(name, torch.cat([start[:, None].float(), place], dim=1), tracks, visibility, size)

    def scored(self, include_query: bool) -> torch.Tensor:
        """Where points are scored, bool `[point, frame]`: where they are visible, but for the frame of the query."""
        if include_query:
            return self.visibility
        own = torch.nn.functional.one_hot(self.points[:, 0].long(), self.visibility.shape[1]).bool()
        return self.visibility & ~own


def score_clip(
    found: Correspondence,
    clip: TrackedClip,
    other: TrackedClip,
    *,
    threshold: float,
    parity: str | None = None,
) -> dict[str, torch.Tensor]:
    """Score what every layer and step has found of one clip.

    Args:
        found: with scores, for the points of the clip.
        clip: what is true.
        other: a clip of as many frames, whose tracks are the control at chance.
        threshold: pixels that a match may be off.
        parity: "difftrack" interpolates in time as the official code does, and counts the frame of the query, in which
            every point is right by definition.

    Returns:
        By name, float64 `[layer, step]`: "accuracy", "accuracy_shuffled" and "accuracy_still" in 0..100, and of every
        segment "attention_<segment>" and "confidence_<segment>".
    """
    count = min(len(clip.points), len(other.points))
    scored, others = clip.scored(parity is not None), other.scored(parity is not None)[:count]
    still = clip.points[:, None, 1:].expand_as(clip.tracks)
    table: dict[str, torch.Tensor] = {}

    def put(name: str, place: tuple[int, int], value: float) -> None:
        shape = len(found.layers), len(found.steps)
        table.setdefault(name, torch.zeros(shape, dtype=torch.float64))[place] = value

    for row, layer in enumerate(found.layers):
        for column, step in enumerate(found.steps):
            cell = found.cell(step, layer)
            time = "difftrack" if parity else "center"
            ways = video_positions(cell.matches.positions[0].cpu(), found.cover, time=time)
            place = row, column
            put("accuracy", place, matching_accuracy(ways, clip.tracks, scored, threshold=threshold))
            wrong = matching_accuracy(ways[:count], other.tracks[:count], others, threshold=threshold)
            put("accuracy_shuffled", place, wrong)
            put("accuracy_still", place, matching_accuracy(still, clip.tracks, scored, threshold=threshold))
            assert cell.scores is not None  # were asked for
            for index, segment in enumerate(cell.scores.segments):
                put(f"attention_{segment}", place, float(cell.scores.attention[0, index]))
                put(f"confidence_{segment}", place, float(cell.scores.confidence[0, index]))
    return table


@dataclass(frozen=True)
class Summary:
    """Scores of all clips.

    Attributes:
        layers: 0-based, the lines of a table.
        columns: the steps, or the noise levels.
        axis: what the columns are: "step" or "noise level".
        clips: names of the clips.
        scores: by name, float64 `[clip, layer, column]`.
    """

    layers: tuple[int, ...]
    columns: tuple[float, ...]
    axis: str
    clips: tuple[str, ...]
    scores: dict[str, torch.Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """The scores, and "harmonic_mean"."""
        return (*self.scores, "harmonic_mean")

    def mean(self, name: str, clips: torch.Tensor | None = None) -> torch.Tensor:
        """Mean over clips, float64 `[layer, column]`; the harmonic mean is that of such means.

        Args:
            name: of `names`.
            clips: int64 `[n]`, which to take, some perhaps more than once; None is all.
        """
        if name == "harmonic_mean":
            return harmonic_mean(*(self.mean(part, clips) for part in COMBINED))
        return (self.scores[name] if clips is None else self.scores[name][clips]).mean(0)

    def interval(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ends of the 95% percentile bootstrap interval over clips, float64 `[layer, column]` each."""
        generator = torch.Generator().manual_seed(0)
        draws = torch.randint(len(self.clips), (_DRAWS, len(self.clips)), generator=generator)
        means = torch.stack([self.mean(name, draw) for draw in draws])
        low, high = torch.quantile(means, means.new_tensor([0.025, 0.975]), dim=0)
        return low, high

    def best(self, name: str) -> tuple[int, int]:
        """Line and column of the highest mean."""
        line, column = divmod(int(self.mean(name).argmax()), len(self.columns))
        return line, column

    def describe(self, name: str, place: tuple[int, int] | None = None) -> str:
        """One line on the best layer and column, or those at a place."""
        line, column = self.best(name) if place is None else place
        low, high = (float(end[line, column]) for end in self.interval(name))
        value = float(self.mean(name)[line, column])
        where = f"layer {self.layers[line]}, {self.axis} {self.columns[column]:g}"
        return f"{name}: {value:.3f} ({low:.3f} to {high:.3f}) at {where}"

    def write(self, folder: Path) -> None:
        """Write a CSV file and a heat map of every score; existing ones are replaced.

        Args:
            folder: where to; it is made if it is not there.

        Raises:
            ConceptMapsError: matplotlib is not installed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.names:
            mean, (low, high) = self.mean(name), self.interval(name)
            with whole_file(folder / f"{name}.csv") as partial, open(partial, "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["layer", self.axis, "mean", "low", "high", "clips"])
                for place in np.ndindex(*mean.shape):
                    values = [f"{float(side[place]):.6g}" for side in (mean, low, high)]
                    writer.writerow([self.layers[place[0]], f"{self.columns[place[1]]:g}", *values, len(self.clips)])
            _plot(mean, name, self, folder / f"{name}.png")


def _plot(mean: torch.Tensor, name: str, summary: Summary, path: Path) -> None:
    """A heat map: layers from the bottom up, columns from left to right, the best marked by a ring."""
    lines, columns = mean.shape
    figure = require("matplotlib.figure").Figure(figsize=(2 + 0.28 * max(columns, 8), 1.6 + 0.28 * max(lines, 5)))
    axes = figure.add_subplot()
    picture = axes.imshow(mean.numpy(), aspect="auto", origin="lower", cmap="viridis")
    line, column = summary.best(name)
    axes.plot(column, line, "o", mfc="none", mec="white", ms=9)
    every = max(1, columns // 12)
    axes.set_xticks(range(0, columns, every), [f"{value:g}" for value in summary.columns[::every]], fontsize=7)
    every = max(1, lines // 14)
    axes.set_yticks(range(0, lines, every), [str(layer) for layer in summary.layers[::every]], fontsize=7)
    axes.set(xlabel=summary.axis, ylabel="layer", title=f"{name.replace('_', ' ')}, {len(summary.clips)} clips")
    figure.colorbar(picture)
    figure.tight_layout()
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110)


def summarize(
    clips: Sequence[TrackedClip],
    match: Callable[[int], Correspondence],
    *,
    columns: Sequence[float] | None = None,
    axis: str = "step",
    threshold: float | None = None,
    parity: str | None = None,
    tell: Callable[[str], None] | None = None,
) -> Summary:
    """Score clips one after another.

    Args:
        clips: at least one; the control of each is the next one's tracks, or of a single clip its points the other
            way round.
        match: from the number of a clip to what was found of its points, with scores.
        columns: what the steps are called; None is by their number.
        axis: what the columns are.
        threshold: pixels that a match may be off; None is half the width of a token, which in the official models is
            the official 8 pixels.
        parity: as for `score_clip`.
        tell: is told of every clip that is done.

    Raises:
        ConceptMapsValueError: there is no clip.
    """
    if not clips:
        raise ConceptMapsValueError("there is no clip to score; expected at least one with tracks")
    tables: list[dict[str, torch.Tensor]] = []
    layers: tuple[int, ...] = ()
    steps: tuple[float, ...] = ()
    for number, clip in enumerate(clips):
        found = match(number)
        other = clips[(number + 1) % len(clips)] if len(clips) > 1 else _turned(clip)
        off = found.stride[0] / 2 if threshold is None else threshold
        tables.append(score_clip(found, clip, other, threshold=off, parity=parity))
        layers, steps = found.layers, found.steps
        if tell is not None:
            tell(f"{number + 1} of {len(clips)}: {clip.name}")
    scores = {name: torch.stack([table[name] for table in tables]) for name in tables[0]}
    named = steps if columns is None else tuple(columns)
    return Summary(layers, named, axis, tuple(clip.name for clip in clips), scores)


def _turned(clip: TrackedClip) -> TrackedClip:
    """The points of a clip in reversed order."""
    return replace(clip, points=clip.points.flip(0), tracks=clip.tracks.flip(0), visibility=clip.visibility.flip(0))
