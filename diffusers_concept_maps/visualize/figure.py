"""Contact sheets: a clip and its maps on one page."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.maps import upsample_map
from diffusers_concept_maps.visualize.overlay import COLORMAP, as_pictures, scale_of

_CELL, _LABEL, _LEGEND, _TITLE = 1.1, 1.35, 0.95, 0.42  # inches


def contact_sheet(
    frames: Any, maps: torch.Tensor, concepts: Sequence[str], *, title: str = "", columns: int = 8
) -> Image.Image:
    """The frames of a clip in the first row, and below them one row of maps for each concept.

    Every row has one color scale, from the lowest to the highest score of that concept over the whole clip, with a
    legend at its end. Of a longer clip evenly spaced frames are shown; their numbers stand above the columns.

    Args:
        frames: as for `overlay.as_pictures`.
        maps: float tensor `[concept, token_frame, height, width]`.
        concepts: their names, one for each row.
        title: text above the sheet.
        columns: number of frames to show at most.

    Returns:
        An RGB picture.

    Raises:
        ConceptMapsValueError: the number of names is not that of the maps.
        ConceptMapsError: matplotlib is not installed.
    """
    if maps.ndim != 4 or len(concepts) != maps.shape[0]:
        raise ConceptMapsValueError(
            f"maps of shape {tuple(maps.shape)} for {len(concepts)} concepts; expected [concept, frame, height, width]"
        )
    pictures = as_pictures(frames)
    shown = np.linspace(0, len(pictures) - 1, min(columns, len(pictures))).round().astype(int)
    width, height = pictures[0].size
    scores = upsample_map(maps.float().cpu(), (height, width), len(pictures)).numpy()
    sheet = _Sheet(len(concepts) + 1, len(shown), height / width, title)
    sheet.label(0, "video")
    for column, index in enumerate(shown):
        axes = sheet.cell(0, column)
        axes.imshow(pictures[index], interpolation="nearest")
        axes.set_title(f"frame {index}", fontsize=7, pad=2)
    for row, concept in enumerate(concepts, start=1):
        low, high = scale_of(maps[row - 1])
        sheet.label(row, concept)
        for column, index in enumerate(shown):
            shade = sheet.cell(row, column).imshow(scores[row - 1, index], cmap=COLORMAP, vmin=low, vmax=high)
        sheet.legend(row, shade, low, high)
    return sheet.picture()


class _Sheet:
    """A figure of equal cells with room for labels on the left, legends on the right and a title on top."""

    def __init__(self, rows: int, columns: int, aspect: float, title: str) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConceptMapsError(
                'contact sheets need matplotlib; install it with: pip install "diffusers-concept-maps[viz]"'
            ) from error
        self._width = _LABEL + _CELL * columns + _LEGEND
        self._row = _CELL * aspect
        self._height = _TITLE + self._row * rows + 0.1
        self._figure = Figure(figsize=(self._width, self._height), dpi=110, facecolor="white")
        FigureCanvasAgg(self._figure)
        self._figure.text(0.02, 1 - 0.35 * _TITLE / self._height, _plain(title), va="center", fontsize=9)

    def _bottom(self, row: int) -> float:
        return 1 - (_TITLE + self._row * (row + 1)) / self._height

    def label(self, row: int, text: str) -> None:
        middle = self._bottom(row) + self._row / self._height / 2
        self._figure.text(0.02, middle, _plain(_wrapped(text)), va="center", fontsize=9, weight="bold")

    def cell(self, row: int, column: int) -> Any:
        left = (_LABEL + column * _CELL) / self._width
        size = (_CELL / self._width * 0.96, self._row / self._height * 0.96)
        axes = self._figure.add_axes((left, self._bottom(row), *size))
        axes.set_axis_off()
        return axes

    def legend(self, row: int, shade: Any, low: float, high: float) -> None:
        height = self._row / self._height
        place = (1 - 0.78 * _LEGEND / self._width, self._bottom(row) + 0.08 * height, 0.1 / self._width, 0.8 * height)
        bar = self._figure.colorbar(shade, cax=self._figure.add_axes(place), ticks=[low, high])
        bar.ax.set_yticklabels([f"{low:.3g}", f"{high:.3g}"], fontsize=7)

    def picture(self) -> Image.Image:
        buffer = io.BytesIO()
        self._figure.savefig(buffer, format="png")
        return Image.open(buffer).convert("RGB")


def _plain(text: str) -> str:
    """Text that matplotlib neither reads as mathematics nor has no glyph for."""
    return "".join(character if character.isprintable() or character == "\n" else " " for character in text).replace(
        "$", r"\$"
    )


def _wrapped(text: str, width: int = 16, lines: int = 3) -> str:
    """A label in short lines, cut where it is too long."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))
