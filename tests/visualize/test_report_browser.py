"""The page in a browser: what it draws, pixel by pixel, and what it answers to clicks, keys and the pointer."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from browser import Browser, browser
from PIL import Image
from sklearn.metrics import calinski_harabasz_score

from diffusers_concept_maps.correspondence.output import TrackOutput
from diffusers_concept_maps.maps import ConceptMaps, StoredMaps
from diffusers_concept_maps.visualize.overlay import overlay
from diffusers_concept_maps.visualize.report import _data, write_report

CONCEPTS = ("dog", "</script><img src=x onerror=alert(1)>", "running")
FRAMES, HEIGHT, WIDTH = 9, 20, 28
GRID = (3, 5, 7)
LAYERS, STEPS, HEADS = [4, 9], [0, 2, 3], 5
HUES = np.array([[230, 159, 0], [86, 180, 233], [0, 158, 115]]) / 255


@dataclass(frozen=True)
class FreshMaps(StoredMaps):
    """Maps as a capture has them at hand, kept axes included."""

    kept: torch.Tensor | None = None

    def detail(self, method: str) -> torch.Tensor:
        assert self.kept is not None
        return self.kept if method == "imap" else self.kept.flip(0)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return torch.rand(FRAMES, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def maps() -> ConceptMaps:
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(2, 3, *GRID, generator=generator) for name in ("imap", "cross_attention")}
    steps = torch.tensor([True, False, True, True])
    tensors |= {f"coverage.{name}": steps[:, None].expand(4, 10).clone() for name in list(tensors)}
    kept = torch.randn(len(LAYERS), len(STEPS), HEADS, 2, 3, *GRID, generator=generator)
    kept[:, 1] = torch.nan  # a step that a cache skipped
    methods = {name: {"layers": LAYERS} for name in ("imap", "cross_attention")}
    geometry = {"frames_per_latent": 4, "latents_per_token": 1}
    metadata = {"detail": ["layer", "step", "head"], "methods": methods, **geometry}
    return ConceptMaps(FreshMaps(CONCEPTS, tensors, metadata, kept), ["imap", "cross_attention"])


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as window:
        yield window


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, maps: ConceptMaps, frames: torch.Tensor) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    maps.report(path, frames, index=1, fps=50, title="<i>a clip</i> & more")
    return path


@pytest.fixture
def shown(window: Browser, page: Path) -> Browser:
    window.open(page)
    return window


def pixels(window: Browser, selector: str = "#picture") -> np.ndarray:
    """What a canvas shows `[height, width, 4]`."""
    width, height, data = window.run(
        "const c = document.querySelector(arguments[0]); const p = c.getContext('2d');"
        "return [c.width, c.height, [...p.getImageData(0, 0, c.width, c.height).data]]",
        selector,
    )
    return np.array(data).reshape(height, width, 4)


def enter(window: Browser, name: str, value: str) -> None:
    """Give a control a value, as a hand does."""
    window.run(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input', {bubbles: true}))",
        name,
        value,
    )


def text(window: Browser, selector: str) -> str:
    return str(window.run("return document.querySelector(arguments[0]).textContent", selector))


def upsampled(maps: ConceptMaps, method: str = "imap") -> np.ndarray:
    return maps.upsample((HEIGHT, WIDTH), FRAMES, method)[1].double().numpy()


def shares(scores: np.ndarray, grid: torch.Tensor) -> np.ndarray:
    low, high = float(grid.min()), float(grid.max())
    return (scores - low) / (high - low)


def blended(frames: torch.Tensor, frame: int, colors: np.ndarray, alpha: np.ndarray | float) -> np.ndarray:
    picture = frames[frame].mul(255).round().permute(1, 2, 0).numpy()
    alpha = np.broadcast_to(np.asarray(alpha), picture.shape[:2])[..., None]
    return picture * (1 - alpha) + 255 * colors * alpha


def overlaid(frames: torch.Tensor, concept_map: torch.Tensor, **options: float) -> np.ndarray:
    pixels = frames.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    pictures = overlay([Image.fromarray(frame) for frame in pixels], concept_map, **options)
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


def test_the_picture_is_the_overlay_of_the_concept_and_frame_picked(
    shown: Browser, maps: ConceptMaps, frames: torch.Tensor
) -> None:
    # The scores are given once for each frame: nothing is left for the overlay to spread.
    per_frame = maps.get("imap")[1][:, [0, 1, 1, 1, 1, 2, 2, 2, 2]]
    assert np.array_equal(pixels(shown)[..., 3], np.full((HEIGHT, WIDTH), 255))
    for concept, frame in ((0, 0), (2, 5), (1, 8)):
        shown.click(f"#concepts button:nth-child({concept + 1})")
        enter(shown, "frame", str(frame))
        expected = overlaid(frames, per_frame[concept])[frame]
        assert np.abs(pixels(shown)[..., :3] - expected).max() <= 1
    enter(shown, "opacity", "25")
    expected = overlaid(frames, per_frame[1], opacity=0.25)[8]
    assert np.abs(pixels(shown)[..., :3] - expected).max() <= 1
    enter(shown, "method", "1")
    per_frame = maps.get("cross_attention")[1][:, [0, 1, 1, 1, 1, 2, 2, 2, 2]]
    expected = overlaid(frames, per_frame[1], opacity=0.25)[8]
    assert np.abs(pixels(shown)[..., :3] - expected).max() <= 1


@pytest.mark.parametrize("name", ["viridis", "cividis"])
def test_colors_are_those_of_matplotlib(shown: Browser, name: str) -> None:
    enter(shown, "colors", name)
    expected = 255 * matplotlib.colormaps[name](np.arange(256))[:, :3]
    assert np.array_equal(pixels(shown, "#scale")[0, :, :3], expected.round())


def test_a_threshold_masks_what_is_above_it(shown: Browser, maps: ConceptMaps, frames: torch.Tensor) -> None:
    enter(shown, "mode", "threshold")
    enter(shown, "threshold", "60")
    enter(shown, "frame", "3")
    share = shares(upsampled(maps)[0, 3], maps.get("imap")[1, 0])
    expected = blended(frames, 3, HUES[0], 0.6 * (share >= 0.6))
    sure = np.abs(share - 0.6) > 1e-4
    assert sure.mean() > 0.99
    assert 0.05 < (share >= 0.6).mean() < 0.95
    assert np.abs(pixels(shown)[..., :3] - expected)[sure].max() <= 1


def test_the_highest_concept_has_its_color(shown: Browser, maps: ConceptMaps, frames: torch.Tensor) -> None:
    enter(shown, "mode", "argmax")
    enter(shown, "frame", "7")
    scores = upsampled(maps)[:, 7]
    second, first = np.sort(scores, 0)[-2:]
    expected = blended(frames, 7, HUES[scores.argmax(0)], 0.6)
    sure = first - second > 1e-3
    assert sure.mean() > 0.99
    assert np.abs(pixels(shown)[..., :3] - expected)[sure].max() <= 1


def test_curves_follow_the_frames(shown: Browser, maps: ConceptMaps) -> None:
    lines = "return [...document.querySelectorAll('#timeline .curve')].map(e => e.getAttribute('points'))"
    grids = maps.get("imap")[1].double().numpy()
    own = np.stack([shares(grid, torch.from_numpy(grid)) for grid in grids])
    wanted = {"mean own": own.mean((2, 3)), "peak own": own.max((2, 3)), "mean score": grids.mean((2, 3))}
    for choice, curves in (wanted | {"peak score": grids.max((2, 3))}).items():
        enter(shown, "curve", choice)
        curves = curves[:, [0, 1, 1, 1, 1, 2, 2, 2, 2]]
        low = 0 if "own" in choice else curves.min()
        heights = 195 - 190 * (curves - low) / (curves.max() - low)
        drawn = [[point.split(",") for point in line.split()] for line in shown.run(lines)]
        order = [1, 2, 0]  # the picked one above the others
        assert np.allclose(np.array(drawn, float)[..., 1], heights[order], atol=0.11)
        assert np.allclose(np.array(drawn, float)[0, :, 0], np.linspace(0, 1000, FRAMES), atol=0.11)


def test_small_maps_are_means_over_the_other_axes(shown: Browser, maps: ConceptMaps) -> None:
    shown.click("#concepts button:nth-child(3)")
    enter(shown, "frame", "1")
    kept = maps.detail("imap")[:, :, :, 1].double()
    table = matplotlib.colormaps["inferno"]
    for axis, others in (("layer", (1, 2)), ("step", (0, 2))):
        means = kept.nanmean(others)[:, 2]
        low, high = np.nanmin(means), np.nanmax(means)
        for index, mean in enumerate(means[:, 1].numpy()):
            drawn = pixels(shown, f"#{axis}-maps figure:nth-child({index + 1}) canvas")
            if np.isnan(mean).all():
                assert not drawn.any()
                continue
            share = ((mean - low) / (high - low) * 254).round() / 254
            assert np.abs(drawn[..., :3] - 255 * table(share)[..., :3]).max() <= 1
    names = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
    assert shown.run(names, "#layer-maps figcaption") == ["layer 4", "layer 9"]
    assert shown.run(names, "#step-maps figcaption") == ["step 0", "step 2", "step 3"]


def test_heads_have_the_index_of_their_frames(shown: Browser, maps: ConceptMaps) -> None:
    captions = "return [...document.querySelectorAll('#head-maps figcaption')].map(e => e.textContent)"
    kept = maps.detail("imap")[:, :, :, 1].double().numpy()
    frame_of = np.repeat(np.arange(GRID[0]), GRID[1] * GRID[2])
    for layer in range(len(LAYERS)):
        enter(shown, "row", str(layer))
        for head, caption in enumerate(shown.run(captions)):
            features = [kept[layer, step, head].reshape(3, -1).T for step in (0, 2)]
            expected = np.mean([calinski_harabasz_score(each, frame_of) for each in features])
            assert caption.startswith(f"head {head}: ")
            assert math.isclose(float(caption.split(": ")[1]), expected, rel_tol=1e-3)


def test_the_scores_under_the_pointer(shown: Browser, maps: ConceptMaps) -> None:
    enter(shown, "frame", "2")
    box = shown.run("return document.getElementById('picture').getBoundingClientRect().toJSON()")
    row, column = 13, 22
    x, y = (box["left"] + (column + 0.5) / WIDTH * box["width"], box["top"] + (row + 0.5) / HEIGHT * box["height"])
    shown.point(int(x), int(y))
    place, said = text(shown, "#value").split(": ", 1)
    assert place == f"x {column}, y {row}"
    for name, part, score in zip(CONCEPTS, said.split(" · "), upsampled(maps)[:, 2, row, column], strict=True):
        assert part.startswith(f"{name} ")
        assert math.isclose(float(part.rsplit(" ", 1)[1]), score, rel_tol=1e-3, abs_tol=1e-3)


def test_keys(shown: Browser) -> None:
    frame = "return Number(document.getElementById('frame').value)"
    shown.press("ArrowRight", "ArrowRight", "ArrowLeft")
    assert shown.run(frame) == 1
    shown.press("End")
    assert shown.run(frame) == FRAMES - 1
    shown.press("3", "m")
    assert shown.run("return document.getElementById('mode').value") == "threshold"
    pressed = "return [...document.querySelectorAll('#concepts button')].map(e => e.getAttribute('aria-pressed'))"
    assert shown.run(pressed) == ["false", "false", "true"]
    shown.press("Home")
    assert shown.run(frame) == 0
    shown.press(" ")
    shown.wait("return Number(document.getElementById('frame').value) > 2")
    shown.press(" ")
    assert shown.run("return document.getElementById('play').getAttribute('aria-label')") == "play"
    back = "return getComputedStyle(document.body).backgroundColor"
    light = shown.run(back)
    shown.press("t")
    assert shown.run(back) != light
    shown.press("Tab")
    assert shown.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_everything_that_can_be_used_has_a_name(shown: Browser) -> None:
    named = "return [...document.querySelectorAll('button, input, select, svg, canvas:not([aria-hidden])')].every(e =>"
    named += " e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim() || e.id === 'scale')"
    assert shown.run(named)


def test_a_narrow_window_shows_all_of_it(shown: Browser) -> None:
    shown.resize(520, 900)
    try:
        shown.wait("return innerWidth < 820")
        widths = shown.run("return ['main', '#stage', '#controls'].map((s) => document.querySelector(s).scrollWidth)")
        assert max(widths) <= shown.run("return document.documentElement.clientWidth")
    finally:
        shown.resize(1200, 1000)


def test_text_stays_text(shown: Browser) -> None:
    assert shown.run("return [document.images.length, document.querySelectorAll('i').length]") == [0, 0]
    assert text(shown, "#title") == "<i>a clip</i> & more"
    assert text(shown, "#concepts button:nth-child(2) .name") == CONCEPTS[1]


def test_nothing_is_fetched_and_nothing_complains(window: Browser, page: Path) -> None:
    window.log("browser"), window.log("performance")
    window.open(page)
    asked = [json.loads(entry["message"])["message"] for entry in window.log("performance")]
    urls = [e["params"]["request"]["url"] for e in asked if e["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in urls
    assert all(url == page.as_uri() or url.startswith("data:") for url in urls)
    assert window.log("browser") == []
    script = "const s = document.createElement('script'); s.textContent = 'window.forbidden = 1';"
    window.run(script + "document.body.append(s); new Image().src = 'http://127.0.0.1:9/x.png'")
    assert window.run("return window.forbidden") is None
    refused = " ".join(entry["message"] for entry in window.log("browser"))
    assert "script-src" in refused
    assert "img-src" in refused


def test_maps_without_frames(window: Browser, maps: ConceptMaps, tmp_path: Path) -> None:
    maps.report(tmp_path / "report.html")
    window.open(tmp_path / "report.html")
    enter(window, "frame", "2")
    drawn = pixels(window)
    assert drawn.shape[:2] == (5 * 69, 7 * 69)
    share = shares(maps.upsample((345, 483), 3)[0, 0, 2].numpy(), maps.get("imap")[0, 0])
    expected = (255 * matplotlib.colormaps["inferno"](share)[..., :3]).round()
    assert np.abs(drawn[..., :3] - expected).max() <= 4  # the scores have 16 bits, and a color 1 of 256 steps
    assert np.abs(drawn[..., :3] - expected).mean() < 0.1


def test_an_image_has_no_timeline(window: Browser, tmp_path: Path) -> None:
    tensors = {"imap": torch.rand(1, 1, 1, 4, 4), "coverage.imap": torch.ones(1, 1, dtype=torch.bool)}
    ConceptMaps(StoredMaps(("dog",), tensors), ["imap"]).report(tmp_path / "a.html", np.zeros((8, 8, 3), np.uint8))
    window.open(tmp_path / "a.html")
    hidden = "return ['curves', 'transport', 'layers'].map(e => getComputedStyle(document.getElementById(e)).display)"
    assert window.run(hidden) == ["none"] * 3
    assert window.run("return document.getElementById('mode').options[2].disabled")


def test_points_are_drawn_where_they_are(window: Browser, frames: torch.Tensor, tmp_path: Path) -> None:
    places = torch.stack([torch.linspace(3, 19, FRAMES), torch.linspace(4, 12, FRAMES)], 1)[None]
    visible = torch.ones(1, FRAMES, dtype=torch.bool)
    visible[0, 6] = False
    tracks = TrackOutput(places, visible, visible.float(), torch.tensor([[0.0, 3.0, 4.0]]))
    write_report(tmp_path / "report.html", frames=frames, tracks=tracks)
    window.open(tmp_path / "report.html")
    picture = frames[5].mul(255).round().permute(1, 2, 0).numpy()

    def color(frame: int, at: int) -> Any:
        enter(window, "frame", str(frame))
        drawn = pixels(window, "#points")
        x, y = ((places[0, at] + 0.5) * drawn.shape[1] / WIDTH).int().tolist()
        return drawn[y, x].tolist()

    assert color(5, 5) == [230, 159, 0, 255]
    assert np.array_equal(pixels(window)[..., :3], picture)
    assert color(6, 6)[3] == 0  # a ring, for one that is not visible
    assert color(5, 3)[:2] == pytest.approx([230, 159], abs=3)  # the trail
    assert 0 < color(5, 3)[3] < 255
    assert color(8, 6)[3] == 0


def test_points_have_the_colors_of_the_video(window: Browser, frames: torch.Tensor, tmp_path: Path) -> None:
    """Also where they are more than the palette has."""
    places = torch.stack([torch.arange(9) * 3 + 1.0, torch.full((9,), 10.0)], 1)[:, None].repeat(1, FRAMES, 1)
    visible = torch.ones(9, FRAMES, dtype=torch.bool)
    tracks = TrackOutput(places, visible, visible.float(), torch.zeros(9, 3))
    write_report(tmp_path / "report.html", frames=frames, tracks=tracks)
    window.open(tmp_path / "report.html")
    drawn = pixels(window, "#points")
    ends = ((places[[0, 8], 0] + 0.5) * drawn.shape[1] / WIDTH).int().tolist()
    assert [drawn[y, x].tolist() for x, y in ends] == [[68, 1, 84, 255], [189, 223, 38, 255]]  # viridis at 0 and 0.9


def test_frames_of_a_common_size(window: Browser, tmp_path: Path) -> None:
    """Lossy frames: as PIL reads what the page holds, and near what they were made of."""
    rows, columns = torch.meshgrid(torch.linspace(0, 6, 240), torch.linspace(0, 9, 360), indexing="ij")
    waves = torch.stack([(rows + columns + t / 3).sin() / 2 + 0.5 for t in range(30)])
    frames = torch.stack([waves, waves.flip(1), waves.flip(2)], 1)
    tensors = {"imap": torch.rand(1, 2, 8, 15, 23), "coverage.imap": torch.ones(1, 1, dtype=torch.bool)}
    maps = ConceptMaps(StoredMaps(("dog", "cat"), tensors), ["imap"])
    maps.report(tmp_path / "report.html", frames)
    window.open(tmp_path / "report.html")
    enter(window, "frame", "29")
    stored = window.run("return DATA.frames[29]")
    picture = Image.open(io.BytesIO(base64.b64decode(stored.split(",", 1)[1]))).convert("RGB")
    original = frames[29].permute(1, 2, 0).numpy() * 255
    assert np.abs(np.asarray(picture) - original).mean() < 2
    share = shares(maps.upsample((240, 360), 30)[0, 0, 29].numpy(), maps.get()[0, 0])[..., None]
    colors = matplotlib.colormaps["inferno"](share[..., 0])[..., :3] * 255
    expected = np.asarray(picture) * (1 - 0.6 * share) + colors * 0.6 * share
    assert np.abs(pixels(window)[..., :3] - expected).max() <= 4
    assert np.abs(pixels(window)[..., :3] - expected).mean() < 0.6


def test_frames_that_were_made_smaller(window: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture has the size of the frames as they are stored; places are those of the frames as they were."""
    monkeypatch.setattr(_data, "_BYTES", 20_000)
    frames = np.random.default_rng(0).integers(0, 256, (2, 130, 258, 3), np.uint8)
    tensors = {"imap": torch.rand(1, 1, 2, 5, 9), "coverage.imap": torch.ones(1, 1, dtype=torch.bool)}
    maps = ConceptMaps(StoredMaps(("dog",), tensors), ["imap"])
    maps.report(tmp_path / "report.html", frames)
    window.open(tmp_path / "report.html")
    picture = Image.open(io.BytesIO(base64.b64decode(window.run("return DATA.frames[0]").split(",", 1)[1])))
    assert picture.size == (129, 65)
    share = shares(maps.upsample((65, 129), 2)[0, 0, 0].numpy(), maps.get()[0, 0])[..., None]
    colors = matplotlib.colormaps["inferno"](share[..., 0])[..., :3] * 255
    expected = np.asarray(picture.convert("RGB")) * (1 - 0.6 * share) + colors * 0.6 * share
    assert np.abs(pixels(window)[..., :3] - expected).max() <= 4
    box = window.run("return document.getElementById('picture').getBoundingClientRect().toJSON()")
    window.point(int(box["left"] + 0.5 * box["width"]), int(box["top"] + 0.25 * box["height"]))
    x, y = map(int, re.match(r"x (\d+), y (\d+)", text(window, "#value")).groups())
    assert abs(x - 129) <= 2
    assert abs(y - 32) <= 2
