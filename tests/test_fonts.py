"""Characters that matplotlib's own font has not: another font has them, or their codes are shown and named."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from PIL import Image

from diffusers_concept_maps.visualize.figure import contact_sheet
from diffusers_concept_maps.visualize.fonts import legible

DOG, CAT = "\u72d7", "\u732b"


@pytest.fixture(autouse=True)
def own_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What matplotlib brings along, whatever else is installed here."""
    fonts = [font for font in fontManager.ttflist if "mpl-data" in font.fname]
    assert any(font.name.startswith("Last Resort") for font in fonts)
    monkeypatch.setattr(fontManager, "ttflist", fonts)


def square() -> object:
    """A glyph that is black all over."""
    pen = TTGlyphPen(None)
    corners = [(0, -100), (0, 800), (1000, 800), (1000, -100)]
    pen.moveTo(corners[0])
    for corner in corners[1:]:
        pen.lineTo(corner)
    pen.closePath()
    return pen.glyph()


def install(folder: Path, characters: str) -> None:
    """A font of black squares for these characters."""
    names = [".notdef", *(f"glyph{i}" for i in range(len(characters)))]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(dict(zip(map(ord, characters), names[1:], strict=True)))
    builder.setupGlyf({name: square() for name in names})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": f"Squares {len(characters)}", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(folder / "squares.ttf")
    fontManager.addfont(folder / "squares.ttf")


def squares(sheet: Image.Image) -> int:
    """Pixels whose surroundings of 7 x 7 are all black: no letter has them."""
    black = (np.asarray(sheet)[:, :140] == 0).all(-1)
    return int(np.lib.stride_tricks.sliding_window_view(black, (7, 7)).all((2, 3)).sum())


def sheet_of(*concepts: str, title: str = "") -> Image.Image:
    maps = torch.rand(len(concepts), 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's own, one for every character
        return contact_sheet([Image.new("RGB", (16, 16), (200, 200, 200))] * 2, maps, concepts, title=title)


def test_another_font_has_the_characters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(tmp_path, DOG + CAT)
    assert squares(sheet_of("dog", "cat")) == 0
    one, both, as_title = sheet_of("dog", DOG), sheet_of(f"dog {CAT}", DOG), sheet_of("dog", "cat", title=f"{DOG} dog")
    assert 0 < squares(one) < squares(both) <= 2 * squares(one)
    assert squares(as_title) > 0
    assert legible([f"a {DOG}"])[0] == [f"a {DOG}"]
    assert caplog.records == []


def test_no_font_has_the_characters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their codes tell them apart, and one warning names all of them and what to do."""
    install(tmp_path, CAT)
    with caplog.at_level(logging.WARNING, logger="diffusers_concept_maps"):
        sheet = sheet_of(f"a {DOG}", CAT, title=f"{DOG} \U0001f9cc")
    (warning,) = (record.getMessage() for record in caplog.records)
    assert warning.startswith(
        f"No installed font has the characters {DOG} \U0001f9cc, so that pictures show their codes"
    )
    assert "Install one that has them, such as Noto Sans CJK" in warning
    assert squares(sheet) > 0
    expected = sheet_of("a \\u72d7", CAT, title="\\u72d7 \\U0001f9cc")
    assert np.array_equal(np.asarray(sheet), np.asarray(expected))


def test_usual_characters_need_no_other_font() -> None:
    assert legible(["r\u00e9sum\u00e9 \u03b1 \u2192\n\x1b"]) == (["r\u00e9sum\u00e9 \u03b1 \u2192  "], ["sans-serif"])


def test_wide_letters_have_room(tmp_path: Path) -> None:
    """A long title is wrapped before the right margin, and a long name before the first cell."""
    install(tmp_path, DOG)
    pixels = np.asarray(sheet_of(DOG * 30, title=DOG * 200))
    top = np.flatnonzero((pixels == 200).all(-1).any(1))[0] - 20
    assert (pixels[:top, -5:] == 255).all()
    assert (pixels[:top] == 0).any()
    assert (pixels[top + 20 :, 145:150] == 255).any(1).all()
