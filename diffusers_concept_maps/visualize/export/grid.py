"""One video of all maps: a row for each concept, a column for each layer, step or head."""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_concept_maps.upsample import upsample_map
from diffusers_concept_maps.visualize import require
from diffusers_concept_maps.visualize.export._base import Picture
from diffusers_concept_maps.visualize.export.clips import Clips
from diffusers_concept_maps.visualize.export.looks import Scale, scaled
from diffusers_concept_maps.visualize.export.manifest import Manifest
from diffusers_concept_maps.visualize.fonts import legible
from diffusers_concept_maps.visualize.overlay import colorize

_CELL, _GAP, _LABEL, _HEADING = 96, 4, 132, 28  # pixels; a cell is about so wide
_LETTERS, _LINE = 16, 15  # letters in a line of a label, and pixels from one line to the next
_DPI = 64  # a power of two, so that pixels to inches and back is exact
_MISSING = 0.5  # gray, which no color of a map is


def write_grid(clips: Clips, folder: Path, manifest: Manifest) -> None:
    """A labeled video `grid_step.mkv` of all concepts, or a sequence; every row has one scale over all its cells."""
    axis, settings = clips.settings.columns, clips.settings
    columns = _spread(clips.axes[axis], settings.most_columns)
    scales = [
        clips.scale_of(clips.scores(concept, {axis: column}) for column in columns) for concept in clips.concepts
    ]
    layout = _Layout(len(clips.concepts), len(columns), clips.source.grid[1:])
    page = _labeled(layout, clips, columns, scales)
    path = folder / f"grid_{axis}{settings.format.suffix}"
    with settings.format.open(path, Picture(layout.size, 3, settings.fps)) as write:
        drawn = None
        for frame in clips.canvas.token_frames:
            if frame != drawn:
                _draw(page, layout, clips, columns, scales, frame)
                drawn = frame
            write(page)
    manifest.add(
        {
            "kind": "grid",
            "path": path.relative_to(folder).as_posix(),
            "frames": len(clips.canvas.token_frames),
            "size": layout.size,
            "rows": [clips.source.concepts[concept] for concept in clips.concepts],
            "scales": scales,
            "columns": {axis: columns},
        }
    )


@dataclass(frozen=True)
class _Layout:
    """Where the cells are: their number down and across, and the token grid of each."""

    rows: int
    columns: int
    grid: tuple[int, int]

    @property
    def cell(self) -> tuple[int, int]:
        """Height and width, a whole number of pixels for each token."""
        factor = max(1, round(_CELL / self.grid[1]))
        return self.grid[0] * factor, self.grid[1] * factor

    @property
    def row(self) -> int:
        """Height of a row, in which two lines of a label have room."""
        return max(self.cell[0], 3 * _LINE) + _GAP

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the page, both even."""
        height = _HEADING + self.rows * self.row + _GAP
        width = _LABEL + self.columns * (self.cell[1] + _GAP) + _GAP
        return height + height % 2, width + width % 2

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """The first row and column of pixels of a cell."""
        middle = (self.row - _GAP - self.cell[0]) // 2
        return _HEADING + row * self.row + middle, _LABEL + column * (self.cell[1] + _GAP)


def _spread(numbers: tuple[int, ...], most: int) -> list[int]:
    """At most so many numbers, evenly spaced, the first and the last among them."""
    places = np.linspace(0, len(numbers) - 1, min(most, len(numbers))).round().astype(int)
    return [numbers[place] for place in places]


def _labeled(layout: _Layout, clips: Clips, columns: list[int], scales: list[Scale]) -> np.ndarray:
    """The page without its cells, float `[height, width, 3]`."""
    height, width = layout.size
    names, fonts = legible([clips.source.concepts[concept] for concept in clips.concepts])
    figure = require("matplotlib.figure").Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    style = {"fontsize": 11, "fontfamily": fonts, "parse_math": False}
    for column, number in enumerate(columns):
        left = layout.corner(0, column)[1]
        across = (left + layout.cell[1] / 2) / width
        text = f"{clips.settings.columns} {number}"
        figure.text(across, 1 - _HEADING / 2 / height, text, ha="center", va="center", **style)
    for row, (name, (low, high)) in enumerate(zip(names, scales, strict=True)):
        lines = textwrap.wrap(name, _LETTERS, max_lines=2, placeholder=" ...")
        label = "\n".join([*lines, f"{low:.3g} to {high:.3g}"])
        down = _HEADING + row * layout.row + layout.row / 2
        figure.text(8 / width, 1 - down / height, label, va="center", linespacing=1.1, **style)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB")) / 255


def _draw(
    page: np.ndarray, layout: _Layout, clips: Clips, columns: list[int], scales: list[Scale], frame: int
) -> None:
    """Put the maps of one token frame into their cells."""
    height, width = layout.cell
    for row, (concept, scale) in enumerate(zip(clips.concepts, scales, strict=True)):
        for column, number in enumerate(columns):
            scores = clips.scores(concept, {clips.settings.columns: number}, frame)
            top, left = layout.corner(row, column)
            cell = page[top : top + height, left : left + width]
            if np.isnan(scores).all():
                cell[:] = _MISSING
            else:
                large = upsample_map(torch.from_numpy(scores[None]), layout.cell, 1, mode=clips.canvas.mode)[0]
                cell[:] = colorize(scaled(large.numpy(), scale))
