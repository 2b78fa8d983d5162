"""Contact sheets: a clip and its maps on one page."""

from __future__ import annotations

import io
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.upsample import upsample_map
from diffusers_concept_maps.visualize import require
from diffusers_concept_maps.visualize.colors import COLORMAP, colorize, score_labels
from diffusers_concept_maps.visualize.fonts import legible
from diffusers_concept_maps.visualize.frames import as_pictures
from diffusers_concept_maps.visualize.overlay import normalized, scale_of

_CELL, _LABEL, _LEGEND, _HEADING, _LOWEST = 1.1, 1.35, 0.95, 0.22, 0.44  # inches
_LINE = 0.16  # inches from one line of text to the next
_COLUMNS = 500  # as wide as matplotlib draws


def contact_sheet(
    frames: Any,
    maps: torch.Tensor,
    concepts: Sequence[str],
    *,
    title: str = "",
    columns: int | None = 8,
    colormap: str = COLORMAP,
) -> Image.Image:
    """The frames of a clip in the first row, and below them one row of maps for each concept.

    Every row has one color scale, from the lowest to the highest score of that concept over the whole clip, with a
    legend at its end. Of a longer clip evenly spaced frames are shown; their numbers stand above the columns, and the
    label of the first row says how many of how many they are. Characters that no installed font has are shown as their
    codes, with a warning.

    Args:
        frames: as for `frames.as_pictures`.
        maps: float tensor `[concept, token_frame, height, width]`.
        concepts: their names, one for each row.
        title: text above the sheet.
        columns: number of frames to show at most; None shows every one.
        colormap: one of `colors.COLORMAPS`.

    Returns:
        An RGB picture.

    Raises:
        ConceptMapsValueError: the number of names is not that of the maps, no columns or more than 500, no such
            color map, or scores that are not finite.
        ConceptMapsError: matplotlib is not installed.
    """
    if maps.ndim != 4 or len(concepts) != maps.shape[0]:
        raise ConceptMapsValueError(
            f"maps of shape {tuple(maps.shape)} for {len(concepts)} concepts; expected [concept, frame, height, width]"
        )
    if columns is not None and columns < 1:
        raise ConceptMapsValueError(f"columns is {columns}; expected at least 1, or None for every frame")
    pictures = as_pictures(frames)
    shown = np.linspace(0, len(pictures) - 1, min(columns or len(pictures), len(pictures))).round().astype(int)
    if len(shown) > _COLUMNS:
        raise ConceptMapsValueError(
            f"a sheet of {len(shown)} columns; expected at most {_COLUMNS}, such as columns=100"
        )
    width, height = pictures[0].size
    (title, *names), fonts = legible([title, *concepts])
    sheet = _Sheet(len(concepts) + 1, len(shown), height / width, title, fonts, colormap)
    sheet.label(0, "video" if len(shown) == len(pictures) else f"video, {len(shown)} of {len(pictures)} frames")
    for column, index in enumerate(shown):
        sheet.cell(0, column, np.asarray(pictures[index])).set_title(f"frame {index}", fontsize=7, pad=2)
    for row, (name, concept_map) in enumerate(zip(names, maps.float().cpu(), strict=True), start=1):
        scores = upsample_map(normalized(concept_map), (height, width), len(pictures))[shown]
        sheet.label(row, name)
        for column, score in enumerate(scores.numpy()):
            sheet.cell(row, column, colorize(score, colormap))
        sheet.legend(row, *scale_of(concept_map))
    return sheet.picture()


class _Sheet:
    """A figure of equal cells with room for labels on the left, legends on the right and a title on top."""

    def __init__(self, rows: int, columns: int, aspect: float, title: str, fonts: list[str], colormap: str) -> None:
        self._colormap = colormap
        self._width = _LABEL + _CELL * columns + _LEGEND
        self._row = max(_CELL * aspect, _LOWEST)
        heading = textwrap.fill(title, _letters(title, int(self._width / 0.075)))
        self._top = _LINE * (heading.count("\n") + 1) + _HEADING
        self._height = self._top + self._row * rows + 0.1
        size = (self._width, self._height)
        self._figure = require("matplotlib.figure").Figure(figsize=size, dpi=110, facecolor="white")
        self._style = {"fontsize": 9, "fontfamily": fonts, "parse_math": False}
        self._figure.text(0.1 / self._width, 1 - 0.06 / self._height, heading, va="top", **self._style)

    def _bottom(self, row: int) -> float:
        return 1 - (self._top + self._row * (row + 1)) / self._height

    def label(self, row: int, text: str) -> None:
        """As many lines as the row has room for; cells lie above, so that a wide label never covers them."""
        middle = self._bottom(row) + self._row / self._height / 2
        lines = textwrap.wrap(text, _letters(text, 16), max_lines=int(self._row / _LINE), placeholder=" ...")
        usual = self._style["fontfamily"] == list(require("matplotlib").rcParams["font.family"])
        weight = "bold" if usual else "normal"  # of another font there may be no bold one
        style = self._style | {"weight": weight, "linespacing": 1.1, "zorder": -1}
        self._figure.text(0.1 / self._width, middle, "\n".join(lines), va="center", **style)

    def cell(self, row: int, column: int, pixels: np.ndarray) -> Any:
        left = (_LABEL + column * _CELL) / self._width
        size = (_CELL / self._width * 0.96, self._row / self._height * 0.96)
        axes = self._figure.add_axes((left, self._bottom(row), *size))
        axes.set_axis_off()
        axes.imshow(pixels, interpolation="nearest")
        return axes

    def legend(self, row: int, low: float, high: float) -> None:
        """The colors from the highest score at the top to the lowest; of a constant map its one color."""
        height = self._row / self._height
        place = (1 - 0.78 * _LEGEND / self._width, self._bottom(row) + 0.1 * height, 0.1 / self._width, 0.76 * height)
        axes = self._figure.add_axes(place)
        scores = np.linspace(0, 1, 256) if high > low else np.zeros(256)
        axes.imshow(colorize(scores, self._colormap)[:, None], aspect="auto", origin="lower", extent=(0, 1, 0, 1))
        ticks = {0.0: low, 1.0: high} if high > low else {0.5: low}
        axes.set_xticks([])
        axes.set_yticks(list(ticks), score_labels(list(ticks.values())), fontsize=7)
        axes.yaxis.tick_right()
        axes.tick_params(length=2, pad=2)

    def picture(self) -> Image.Image:
        buffer = io.BytesIO()
        self._figure.savefig(buffer, format="png")
        return Image.open(buffer).convert("RGB")


def _letters(text: str, room: int) -> int:
    """How many letters of a text there is room for, of which that many Latin ones would fit."""
    return room // 2 if any(unicodedata.east_asian_width(letter) in "WF" for letter in text) else room
