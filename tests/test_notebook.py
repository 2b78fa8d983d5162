"""What a notebook shows: small pictures of the maps, with their text as text."""

from __future__ import annotations

import base64
import io
import re
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from diffusers_concept_maps.maps import ConceptMap, ConceptMaps, StoredMaps
from diffusers_concept_maps.visualize.notebook import CONCEPTS, FRAMES, LONGEST_SIDE

NASTY = "<script>alert('1')</script>\" onerror=\"x & y"


class Page(HTMLParser):
    """Tags with their attributes, and the text between them, as a browser reads them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())

    @property
    def pictures(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def pixels(attributes: dict[str, str | None]) -> np.ndarray:
    """The picture of an image tag."""
    kind, data = str(attributes["src"]).split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def maps_of(tensor: torch.Tensor, *concepts: str) -> ConceptMaps:
    return ConceptMaps(StoredMaps(concepts, {"imap": tensor}), ["imap"])


def colored(concept_map: torch.Tensor) -> np.ndarray:
    scores = concept_map.numpy()
    scores = (scores - scores.min()) / (scores.max() - scores.min())
    return (colormaps["inferno"](scores)[..., :3] * 255).round()


def test_a_strip_for_each_concept_with_its_own_scale() -> None:
    tensor = (
        torch.randn(1, 2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1, 100])[:, None, None, None]
    )
    page = Page(maps_of(tensor, "dog", "running")._repr_html_())
    assert {tag for tag, _ in page.tags} == {"table", "caption", "tr", "th", "td", "img"}
    strips, bars = page.pictures[::2], page.pictures[1::2]
    for concept, strip, bar, concept_map in zip(("dog", "running"), strips, bars, tensor[0], strict=True):
        assert np.abs(pixels(strip) - np.concatenate(list(colored(concept_map)), 1)).max() <= 1
        assert strip["alt"] == f"map of {concept}"
        assert int(str(strip["width"])) / int(str(strip["height"])) == pytest.approx(3 * 6 / 4, rel=0.02)
        assert np.abs(pixels(bar)[0] - colormaps["inferno"](np.linspace(0, 1, 64))[:, :3] * 255).max() <= 0.51
        for value in (concept_map.min(), concept_map.max()):
            assert f"{value:.3g}" in page.text
    assert "ConceptMaps, imap" in page.text


def test_one_concept_and_an_image() -> None:
    tensor = torch.randn(1, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    page = Page(ConceptMap("dog", tensor)._repr_html_())
    strip, _ = page.pictures
    assert np.abs(pixels(strip) - colored(tensor[0, 0])).max() <= 1
    assert "ConceptMap" in page.text


def test_a_constant_map_has_one_value() -> None:
    page = Page(ConceptMap("dog", torch.full((1, 1, 4, 6), 0.25))._repr_html_())
    dark = colormaps["inferno"](0.0)[:3]
    for picture in page.pictures:
        assert np.abs(pixels(picture) - np.array(dark) * 255).max() <= 0.51
    assert [text for text in page.text if text] == ["ConceptMap", "dog", "0.25"]


@pytest.mark.parametrize("make", [lambda t: maps_of(t[:, None], NASTY), lambda t: ConceptMap(NASTY, t)])
def test_text_is_text(make: Any) -> None:
    for tensor in (torch.rand(1, 2, 4, 6), torch.full((1, 2, 4, 6), torch.nan)):
        page = Page(make(tensor)._repr_html_())
        assert {tag for tag, _ in page.tags} <= {"table", "caption", "tr", "th", "td", "img", "pre", "p"}
        assert all(set(attributes) <= {"src", "alt", "width", "height", "style"} for _, attributes in page.tags)
        assert "<script" not in make(tensor)._repr_html_()
    page = Page(make(torch.rand(1, 2, 4, 6))._repr_html_())
    assert page.pictures[0]["alt"] == f"map of {NASTY}"
    assert NASTY in page.text


def test_it_is_never_large() -> None:
    """Of many and large maps it shows some, smaller, and says so."""
    tensor = torch.rand(2, 20, 33, 130, 96, generator=torch.Generator().manual_seed(0))
    source = maps_of(tensor, *(f"concept {index}" for index in range(20)))._repr_html_()
    page = Page(source)
    assert len(source) < 1_000_000
    assert len(page.pictures) == 2 * CONCEPTS
    assert pixels(page.pictures[0]).shape == (LONGEST_SIDE, FRAMES * (96 * LONGEST_SIDE // 130), 3)
    assert "ConceptMaps, imap, map 1 of 2, 8 of 33 frames, 16 of 20 concepts" in page.text


def test_large_maps_are_averaged_and_frames_evenly_spaced() -> None:
    tensor = torch.zeros(1, 15, 128, 128)
    for frame in range(15):
        tensor[0, frame] = frame
    tensor[0, 0, :64, ::2] = 14  # on average 7 of 14
    (strip, _) = Page(ConceptMap("dog", tensor)._repr_html_()).pictures
    found = pixels(strip).astype(int)
    wanted = colormaps["inferno"](np.arange(0, 15, 2) / 14)[:, :3] * 255
    assert found.shape == (64, 8 * 64, 3)
    assert np.abs(found[-1, 32::64] - wanted).max() <= 1
    assert np.abs(found[0, :64] - np.array(colormaps["inferno"](0.5)[:3]) * 255).max() <= 1


def test_what_stands_in_the_way_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither scores that are not finite nor a missing matplotlib keep a notebook from showing what it is."""
    tensor = torch.full((1, 1, 1, 4, 6), torch.inf)
    assert "infinite or not a number" in maps_of(tensor, "dog")._repr_html_()
    for name in [name for name in sys.modules if re.match(r"matplotlib(\.|$)", name)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for maps in (maps_of(torch.rand(1, 1, 1, 4, 6), "dog"), ConceptMap("dog", torch.rand(1, 1, 4, 6))):
        page = Page(maps._repr_html_())
        assert any("diffusers-concept-maps[viz]" in text for text in page.text)
        assert any("dog" in text for text in page.text)
        assert not page.pictures


def test_before_anything_is_recorded_it_says_so() -> None:
    import diffusers_concept_maps as dcm

    pipe = dcm.load_shapes_pipeline()
    with dcm.trace(pipe, ["red"]) as maps:
        page = Page(maps._repr_html_())
    assert repr(maps) in page.text
    assert not page.pictures
