"""Out of an overlay comes what went in: pictures, arrays and tensors, with their alpha, dtype, size and axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.maps import ConceptMap
from diffusers_concept_maps.upsample import upsample_map
from diffusers_concept_maps.visualize.colors import COLORMAPS, colorize, draw_legend
from diffusers_concept_maps.visualize.figure import contact_sheet
from diffusers_concept_maps.visualize.overlay import as_pictures, overlay

FRAMES, HEIGHT, WIDTH = 5, 15, 21
OPACITY = 0.7


@pytest.fixture
def rgba() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(FRAMES, HEIGHT, WIDTH, 4), dtype=np.uint8)


@pytest.fixture
def concept_map() -> torch.Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def scores_of(concept_map: torch.Tensor, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """Scores in 0..1 over the whole clip, for every pixel."""
    scores = concept_map.double()
    return upsample_map((scores - scores.min()) / (scores.max() - scores.min()), size, FRAMES).numpy()


def blended(pixels: np.ndarray, concept_map: torch.Tensor, colormap: str = "inferno") -> np.ndarray:
    """The overlay in floats 0..1, by its definition, of frames in 0..1."""
    scores = scores_of(concept_map)
    alpha = OPACITY * scores[..., None]
    colors = pixels[..., :3] * (1 - alpha) + colormaps[colormap](scores)[..., :3] * alpha
    return np.concatenate([colors, pixels[..., 3:]], -1)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_array_in_array_out(channels: int, dtype: Any, rgba: np.ndarray, concept_map: torch.Tensor) -> None:
    frames = rgba[..., :channels] if dtype == np.uint8 else (rgba[..., :channels] / 255).astype(dtype)
    given = frames.copy()
    shown = overlay(frames, concept_map, opacity=OPACITY)
    assert isinstance(shown, np.ndarray)
    assert (shown.dtype, shown.shape) == (frames.dtype, frames.shape)
    assert np.array_equal(frames, given)
    whole = 255 if dtype == np.uint8 else 1
    step = {np.uint8: 0.51 / 255, np.float16: 6e-4}.get(dtype, 0)  # of the dtype; the map's scores are float32
    inside = np.abs(shown.astype(float) / whole - blended(frames.astype(float) / whole, concept_map))
    # Between two of the 256 colors of a map, a score in float32 may fall to the other side.
    assert np.quantile(inside, 0.99) <= step + 1e-6
    assert inside.max() <= step + 1.5 / 255
    assert np.array_equal(shown[..., 3:], frames[..., 3:])


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensor_in_tensor_out(channels: int, dtype: torch.dtype, rgba: np.ndarray, concept_map: torch.Tensor) -> None:
    frames = torch.from_numpy(rgba[..., :channels]).permute(0, 3, 1, 2)
    frames = frames if dtype == torch.uint8 else (frames / 255).to(dtype)
    shown = overlay(frames, concept_map, opacity=OPACITY)
    assert isinstance(shown, torch.Tensor)
    assert (shown.dtype, shown.shape, shown.device) == (dtype, frames.shape, frames.device)
    array = frames.numpy() if dtype == torch.uint8 else frames.double().numpy()
    same = overlay(array.transpose(0, 2, 3, 1), concept_map, opacity=OPACITY).transpose(0, 3, 1, 2)
    assert torch.equal(shown, torch.from_numpy(same).to(dtype))
    assert torch.equal(shown[:, 3:], frames[:, 3:])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
def test_pictures_in_pictures_out(mode: str, rgba: np.ndarray, concept_map: torch.Tensor) -> None:
    """Pictures without color become RGB, and keep their alpha where they have it."""
    kept = "RGBA" if "A" in mode else "RGB"
    frames = [Image.fromarray(frame).convert(kept).convert(mode) for frame in rgba]
    shown = overlay(frames, concept_map, opacity=OPACITY)
    assert isinstance(shown, list)
    assert {picture.mode for picture in shown} == {kept}
    arrays = np.stack([np.asarray(frame.convert(kept)) for frame in frames])
    assert np.array_equal(
        np.stack([np.asarray(picture) for picture in shown]), overlay(arrays, concept_map, opacity=0.7)
    )


def test_every_kind_shows_the_same(rgba: np.ndarray, concept_map: torch.Tensor, tmp_path: Path) -> None:
    pixels = rgba[..., :3]
    for index, frame in enumerate(pixels):
        Image.fromarray(frame).save(tmp_path / f"{index}.png")
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    expected = overlay(pixels, concept_map)
    for frames in ([Image.fromarray(frame) for frame in pixels], tmp_path):
        assert np.array_equal(np.stack([np.asarray(p) for p in overlay(frames, concept_map)]), expected)
    assert np.array_equal(overlay(tensor, concept_map).permute(0, 2, 3, 1).numpy(), expected)
    floats = overlay((tensor.double() / 255).requires_grad_(), concept_map)
    assert not floats.requires_grad
    assert np.array_equal((floats.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8), expected)


def test_one_frame_in_one_frame_out(rgba: np.ndarray, concept_map: torch.Tensor) -> None:
    concept_map = concept_map[:1]
    array = overlay(rgba[:1], concept_map)[0]
    assert np.array_equal(overlay(rgba[0], concept_map), array)
    assert np.array_equal(np.asarray(overlay(Image.fromarray(rgba[0]), concept_map)), array)
    tensor = overlay(torch.from_numpy(rgba[0]).permute(2, 0, 1), concept_map)
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), array)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_no_opacity_gives_the_frames_back(dtype: Any, rgba: np.ndarray, concept_map: torch.Tensor) -> None:
    frames = rgba if dtype == np.uint8 else (rgba / 255).astype(dtype)
    assert np.array_equal(overlay(frames, concept_map, opacity=0), frames)


@pytest.mark.parametrize("colormap", COLORMAPS)
def test_color_maps_by_name(colormap: str, rgba: np.ndarray, concept_map: torch.Tensor) -> None:
    frames = rgba[..., :3] / 255
    shown = overlay(frames, concept_map, opacity=OPACITY, colormap=colormap)
    assert np.quantile(np.abs(shown - blended(frames, concept_map, colormap)), 0.99) <= 1e-6
    luminance = colorize(np.linspace(0, 1, 256), colormap) ** 2.2 @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > -1e-3).all()  # brightness rises with the score


def test_unknown_color_maps_are_refused(rgba: np.ndarray, concept_map: torch.Tensor) -> None:
    message = "colormap is 'jet'; expected one of inferno, viridis, cividis, magma, plasma"
    with pytest.raises(ConceptMapsValueError, match=message):
        overlay(rgba, concept_map, colormap="jet")
    with pytest.raises(ConceptMapsValueError, match=message):
        contact_sheet(rgba, concept_map[None], ["dog"], colormap="jet")


@pytest.mark.parametrize("kind", ["array", "tensor", "pictures"])
def test_layer_laid_over_the_frames_is_the_overlay(kind: str, rgba: np.ndarray, concept_map: torch.Tensor) -> None:
    frames: Any = rgba[..., :3]
    expected = overlay(frames, concept_map, opacity=OPACITY).astype(int)
    if kind == "tensor":
        layer = overlay(torch.from_numpy(frames).permute(0, 3, 1, 2), concept_map, opacity=OPACITY, rgba=True)
        layer = layer.permute(0, 2, 3, 1).numpy()
    elif kind == "pictures":
        pictures = [Image.fromarray(frame) for frame in frames]
        layer = np.stack([np.asarray(p) for p in overlay(pictures, concept_map, opacity=OPACITY, rgba=True)])
    else:
        layer = overlay(frames, concept_map, opacity=OPACITY, rgba=True)
    assert layer.shape == (FRAMES, HEIGHT, WIDTH, 4)
    assert layer.dtype == np.uint8
    np.testing.assert_allclose(layer[..., 3], 255 * OPACITY * scores_of(concept_map), atol=0.51)
    laid = [
        np.asarray(Image.alpha_composite(Image.fromarray(frame).convert("RGBA"), Image.fromarray(over)))[..., :3]
        for frame, over in zip(frames, layer, strict=True)
    ]
    assert np.abs(np.stack(laid) - expected).max() <= 2


def test_legend_says_which_color_is_which_score(concept_map: torch.Tensor) -> None:
    """A bar of the map's colors, the highest at the top, in the corner of every frame; elsewhere nothing changes."""
    frames = np.full((FRAMES, 120, 160, 4), 128, np.uint8)
    plain = overlay(frames, concept_map, colormap="viridis")
    shown = overlay(frames, concept_map, colormap="viridis", legend=True)
    changed = (shown != plain).any((0, 3))
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert rows[0] >= 30
    assert (rows[-1], columns[-1]) == (120 - 6, 160 - 6)
    panel = shown[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert all(np.array_equal(frame[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], panel) for frame in shown)
    assert (panel[..., 3] == 255).all()
    low, high = float(concept_map.min()), float(concept_map.max())
    assert np.array_equal(panel[..., :3], draw_legend(low, high, (120, 160), "viridis"))
    expected = colormaps["viridis"](np.linspace(1, 0, 70), bytes=True)[:, :3]
    np.testing.assert_allclose(panel[5:75, 10, :3].astype(int), expected, atol=1)
    text = panel[:, 17:, :3].max(-1) > 128
    written = np.flatnonzero(text.any(1))
    assert written[0] == 5
    assert written[-1] == 74
    assert not text[20:60].any()


def test_legend_writes_the_values() -> None:
    """Other values give other text in the same place; a constant map has its one value and one color."""
    one, other = draw_legend(0, 0.25, (120, 160)), draw_legend(0, 0.75, (120, 160))
    assert one.shape == other.shape
    where = np.argwhere((one != other).any(-1))
    assert len(where) > 5
    assert where[:, 0].max() < 20
    assert where[:, 1].min() >= 17
    flat = draw_legend(0.25, 0.25, (120, 160))
    np.testing.assert_allclose(
        flat[5:75, 5:15], np.broadcast_to(colormaps["inferno"](0.0)[:3], (70, 10, 3)) * 255, atol=0.51
    )
    assert not flat[20:, 17:].any()


def test_legend_in_floats_is_that_in_bytes(concept_map: torch.Tensor) -> None:
    frames = np.zeros((FRAMES, 100, 100, 3))
    shown = overlay(frames, concept_map, legend=True)
    whole = overlay(np.zeros((FRAMES, 100, 100, 3), np.uint8), concept_map, legend=True)
    assert np.array_equal((shown * 255).round(), whole)


def test_frames_too_small_for_a_legend_are_refused(rgba: np.ndarray, concept_map: torch.Tensor) -> None:
    with pytest.raises(
        ConceptMapsValueError, match=r"frames of 21 x 15 pixels are too small for a legend, .* enlarge"
    ):
        overlay(rgba, concept_map, legend=True)


def test_alpha_has_a_range_too(rgba: np.ndarray, concept_map: torch.Tensor) -> None:
    frames = rgba / 255
    frames[2, 3, 4, 3] = 1.5
    with pytest.raises(ConceptMapsValueError, match=r"float64 from 0(\.\d+)? to 1\.5; expected uint8, or floats"):
        overlay(frames, concept_map)


def test_transparent_arrays_as_pictures_lie_on_white(rgba: np.ndarray) -> None:
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    for frames in (rgba, rgba / 255, torch.from_numpy(rgba).permute(0, 3, 1, 2)):
        shown = np.stack([np.asarray(picture) for picture in as_pictures(frames)])
        assert np.abs(shown - expected).max() <= 1


def test_a_map_of_a_capture_does_the_same(rgba: np.ndarray, concept_map: torch.Tensor) -> None:
    frames = np.repeat(np.repeat(rgba, 8, 1), 8, 2) / 255
    options: dict[str, Any] = {"opacity": 0.3, "colormap": "magma", "legend": True}
    for is_layer in (False, True):
        shown = ConceptMap("dog", concept_map[None]).overlay(frames, rgba=is_layer, **options)
        assert np.array_equal(shown, overlay(frames, concept_map, rgba=is_layer, **options))


def test_a_contact_sheet_of_every_frame_in_another_color_map() -> None:
    frames = np.full((11, 8, 8, 3), (10, 200, 10), np.uint8)
    maps = torch.zeros(1, 11, 2, 2)
    maps[0, 4] = 1
    sheet = np.asarray(contact_sheet(frames, maps, ["dog"], columns=None, colormap="viridis"))

    def count(color: Any) -> int:
        return int((sheet == np.array(color)).all(-1).sum())

    cell = count((10, 200, 10)) / 11
    assert cell > 5000
    assert count(colormaps["viridis"](1.0, bytes=True)[:3]) / cell == pytest.approx(1, abs=0.1)
    assert count(colormaps["viridis"](0.0, bytes=True)[:3]) / cell == pytest.approx(10, abs=0.1)
