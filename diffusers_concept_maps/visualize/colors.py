"""Scores as colors: perceptually uniform color maps by name, and the legend that says which color is which score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.visualize import require

COLORMAPS = ("inferno", "viridis", "cividis", "magma", "plasma")
"""Perceptually uniform color maps of matplotlib: equal steps of score look equal, in gray and to any color vision."""

COLORMAP = COLORMAPS[0]
"""The default, whose brightness rises from black with the score."""


def check_colormap(name: str) -> None:
    """Refuse what is not one of `COLORMAPS`.

    Raises:
        ConceptMapsValueError: it is not.
    """
    if name not in COLORMAPS:
        raise ConceptMapsValueError(f"colormap is {name!r}; expected one of {', '.join(COLORMAPS)}")


def colorize(scores: np.ndarray, colormap: str = COLORMAP) -> np.ndarray:
    """Colors of scores in 0..1, `[...]` to float `[..., 3]`.

    Args:
        scores: any shape; what lies outside 0..1 takes the color of the nearer end.
        colormap: one of `COLORMAPS`.

    Raises:
        ConceptMapsValueError: there is no such color map.
        ConceptMapsError: matplotlib is not installed.
    """
    check_colormap(colormap)
    return np.asarray(require("matplotlib").colormaps[colormap](scores))[..., :3]


def score_labels(values: Sequence[float]) -> list[str]:
    """Numbers with three digits, or with as many as it takes to tell them apart."""
    digits = next(n for n in range(3, 18) if len({f"{value:.{n}g}" for value in values}) == len(values))
    return [f"{value:.{digits}g}" for value in values]


def draw_legend(low: float, high: float, size: tuple[int, int], colormap: str = COLORMAP) -> np.ndarray:
    """A color bar with the scores of its ends, to lie in a corner of frames.

    Its text is as high as a 24th of the frames, and never too small to read. Of a constant map it shows the one color
    and the one score.

    Args:
        low: the lowest score of the scale.
        high: the highest.
        size: `(height, width)` of the frames in pixels.
        colormap: one of `COLORMAPS`.

    Returns:
        uint8 `[height, width, 3]`, smaller than the frames.

    Raises:
        ConceptMapsValueError: the frames are too small for it, or there is no such color map.
        ConceptMapsError: matplotlib is not installed.
    """
    letter = max(10, round(min(size) / 24))
    font = ImageFont.load_default(letter)
    labels = score_labels([high, low] if high > low else [low])
    gap = letter // 2
    text = 2 * gap + letter  # where it starts, behind the bar
    width = text + int(max(np.ceil(font.getlength(label)) for label in labels)) + gap
    height = min(8 * letter, size[0] - 2 * gap)
    if height < 4 * letter or width > size[1] - 2 * gap:
        raise ConceptMapsValueError(
            f"frames of {size[1]} x {size[0]} pixels are too small for a legend, which takes {width + 2 * gap} x "
            f"{4 * letter + 2 * gap}; enlarge them (visualize.overlay.enlarge does), or leave the legend out"
        )
    picture = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(picture)
    for label, anchor, y in zip(labels, ("lt", "lb"), (gap, height - gap), strict=False):
        draw.text((text, y), label, fill="white", font=font, anchor=anchor)
    pixels = np.array(picture)
    steps = np.linspace(1, 0, height - 2 * gap) if high > low else np.zeros(height - 2 * gap)
    pixels[gap:-gap, gap : gap + letter] = (colorize(steps, colormap) * 255).round()[:, None]
    return pixels
