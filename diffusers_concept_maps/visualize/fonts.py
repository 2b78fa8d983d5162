"""Text for pictures: fonts that have its characters, and codes for characters that no font has."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.utils import logging

from diffusers_concept_maps.visualize import require

logger = logging.get_logger(__name__)

_BOXES = "Last Resort"
"""matplotlib's own fonts that have a box for every character."""


def legible(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts that can be drawn, and the font families to draw them with.

    matplotlib takes a character from the first of the families that has it. Fonts beside its usual one are looked for
    only where that lacks a character. One that no installed font has becomes its code, and a warning names them all.

    Args:
        texts: any text.

    Returns:
        The texts, control characters and codes replaced, and font families for all of them.

    Raises:
        ConceptMapsError: matplotlib is not installed.
    """
    plain = ["".join(character if character.isprintable() else " " for character in text) for text in texts]
    families, missing = _families({ord(character) for text in plain for character in text})
    if missing:
        logger.warning(
            f"No installed font has the characters {' '.join(map(chr, sorted(missing)))}, so that pictures show their "
            f"codes. Install one that has them, such as Noto Sans CJK for Chinese, Japanese and Korean, and remove "
            f"the list of fonts that matplotlib keeps in {require('matplotlib').get_cachedir()}."
        )
    codes = {point: chr(point).encode("ascii", "backslashreplace").decode() for point in missing}
    return [text.translate(codes) for text in plain], families


def _families(points: set[int]) -> tuple[list[str], set[int]]:
    """Font families that together have characters, the usual ones first, and the characters that are in none."""
    families = list(require("matplotlib").rcParams["font.family"])
    for family in families:
        points = points - _characters(family)
    for font in require("matplotlib.font_manager").fontManager.ttflist:
        if not points:
            break
        if font.name not in families and not font.name.startswith(_BOXES) and points & _characters(font.name):
            families.append(font.name)
            points = points - _characters(font.name)
    return families, points


def _characters(family: str) -> set[int]:
    """The characters of the font that matplotlib takes for a family."""
    fonts = require("matplotlib.font_manager")
    file = fonts.fontManager.findfont(fonts.FontProperties(family=[family]))
    return set(require("matplotlib.ft2font").FT2Font(file).get_charmap())
