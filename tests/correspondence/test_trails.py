"""Pixels of drawn points and trails, against a loop over every pixel and every shape."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.visualize.trails import PALETTE, draw_tracks, point_colors

FRAMES, HEIGHT, WIDTH = 5, 21, 34


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)


def shown(*arguments: Any, **options: Any) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in draw_tracks(*arguments, **options)])


def black(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.zeros((frames, height, width, 3), np.uint8)


def still(x: float, y: float, frames: int = 1) -> torch.Tensor:
    return torch.tensor([float(x), float(y)]).expand(1, frames, 2)


def seen(frames: int = 1, points: int = 1) -> torch.Tensor:
    return torch.ones(points, frames, dtype=torch.bool)


def alpha_of(picture: np.ndarray) -> np.ndarray:
    """What share of a color was mixed into a black picture."""
    return picture.max(-1) / 255 * 255 / max(PALETTE[0])


def distance_to_segment(place: tuple[float, float], start: Any, end: Any) -> float:
    (px, py), (ax, ay), (bx, by) = place, start, end
    length = (bx - ax) ** 2 + (by - ay) ** 2
    share = 0.0 if length == 0 else min(1.0, max(0.0, ((px - ax) * (bx - ax) + (py - ay) * (by - ay)) / length))
    return math.hypot(px - ax - share * (bx - ax), py - ay - share * (by - ay))


def covered(outside: float) -> float:
    return min(1.0, max(0.0, 0.5 - outside))


def expected_pixel(
    pixel: Any, place: tuple[int, int], frame: int, tracks: Any, visible: Any, trail: int, radius: float
) -> np.ndarray:
    """One pixel: all trails first, in the order of the points, then all points."""
    value = np.asarray(pixel, float)
    for point, path in enumerate(tracks):
        shares = [0.0]
        for age in range(trail):
            step = frame - age
            if step >= 1 and visible[point][step] and visible[point][step - 1]:
                distance = distance_to_segment(place, path[step - 1], path[step])
                shares.append((1 - age / trail) * covered(distance - radius / 2))
        value = value + max(shares) * (np.array(PALETTE[point]) - value)
    for point, path in enumerate(tracks):
        distance = math.dist(place, path[frame])
        outside = distance - radius if visible[point][frame] else abs(distance - 0.75 * radius) - 0.25 * radius
        value = value + covered(outside) * (np.array(PALETTE[point]) - value)
    return value


@pytest.mark.parametrize(("trail", "radius"), [(3, 2.6), (0, 4.0), (9, 0.7)])
def test_every_pixel(trail: int, radius: float, pixels: np.ndarray) -> None:
    """Points that move, stand still, vanish, and leave the frame."""
    generator = torch.Generator().manual_seed(3)
    tracks = torch.rand(4, FRAMES, 2, generator=generator) * torch.tensor([WIDTH + 12.0, HEIGHT + 12]) - 6
    tracks[1] = tracks[1, :1]
    visible = torch.rand(4, FRAMES, generator=generator) < 0.7
    visible[0], visible[3] = True, False
    found = shown(pixels, tracks, visible, trail=trail, radius=radius)
    paths, flags = tracks.double().tolist(), visible.tolist()
    expected = [
        [
            [
                expected_pixel(pixels[frame, row, column], (column, row), frame, paths, flags, trail, radius)
                for column in range(WIDTH)
            ]
            for row in range(HEIGHT)
        ]
        for frame in range(FRAMES)
    ]
    assert found.shape == pixels.shape
    np.testing.assert_allclose(found, np.array(expected), atol=0.51)
    assert (found != pixels).any((1, 2, 3)).all()


@pytest.mark.parametrize(("x", "y"), [(10.0, 8.0), (10.25, 8.5), (11.7, 9.1)])
@pytest.mark.parametrize("visible", [True, False])
def test_a_point_is_drawn_where_it_is(x: float, y: float, visible: bool) -> None:
    """To a fraction of a pixel; a ring has a hole, a disc the area of one."""
    radius = 5.0
    alpha = alpha_of(shown(black(1), still(x, y), seen() & visible, radius=radius)[0])
    rows, columns = np.indices(alpha.shape)
    center = (alpha * columns).sum() / alpha.sum(), (alpha * rows).sum() / alpha.sum()
    assert center == pytest.approx((x, y), abs=0.05)
    area = math.pi * (radius**2 - (0 if visible else (radius / 2) ** 2))
    assert alpha.sum() == pytest.approx(area, rel=0.02)
    assert alpha[round(y), round(x)] == (1 if visible else 0)


def test_a_pixel_center_has_whole_coordinates() -> None:
    """(0, 0) is the middle of the first pixel and (width - 1, height - 1) that of the last."""
    found = alpha_of(shown(black(1), still(0, 0), seen(), radius=0.5)[0])
    assert (found[0, 0], found.sum()) == (1, 1)
    found = alpha_of(shown(black(1), still(WIDTH - 1, HEIGHT - 1), seen(), radius=0.5)[0])
    assert (found[-1, -1], found.sum()) == (1, 1)
    found = alpha_of(shown(black(1), still(3.5, 4), seen(), radius=0.5)[0])
    assert found[4, 3] == found[4, 4] == pytest.approx(0.5, abs=0.01)


def test_a_trail_fades_with_age_and_ends() -> None:
    tracks = torch.tensor([[[4.0 + 6 * frame, 10.0] for frame in range(FRAMES)]])
    alpha = alpha_of(shown(black(), tracks, seen(FRAMES), trail=3, radius=2)[4])
    middles = [alpha[10, 7 + 6 * step] for step in range(FRAMES - 1)]
    assert middles == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=0.01)


def test_a_trail_has_a_gap_where_the_point_was_not_visible() -> None:
    tracks = torch.tensor([[[4.0 + 6 * frame, 10.0] for frame in range(FRAMES)]])
    visible = seen(FRAMES)
    visible[0, 2] = False
    found = shown(black(), tracks, visible, trail=100, radius=2)
    alpha = alpha_of(found[4])
    assert [alpha[10, 7 + 6 * step] > 0 for step in range(FRAMES - 1)] == [True, False, False, True]
    assert alpha_of(found[2])[10, 16] == 0


def test_a_point_that_stands_still_is_a_disc() -> None:
    moving = shown(black(4), still(9.3, 8.8, 4), seen(4), trail=3, radius=3)
    assert np.array_equal(moving, shown(black(4), still(9.3, 8.8, 4), seen(4), trail=0, radius=3))


@pytest.mark.parametrize("place", [(-40.0, 5.0), (5.0, 1e9), (1e30, -1e30)])
def test_points_outside_the_frame_are_not_drawn(place: tuple[float, float], pixels: np.ndarray) -> None:
    assert np.array_equal(shown(pixels, still(*place, FRAMES), seen(FRAMES)), pixels)


def test_a_hidden_point_without_a_place_is_not_drawn(pixels: np.ndarray) -> None:
    tracks = torch.full((1, FRAMES, 2), torch.nan)
    assert np.array_equal(shown(pixels, tracks, torch.zeros(1, FRAMES, dtype=torch.bool)), pixels)
    with pytest.raises(ConceptMapsValueError, match="a visible point has a place that is infinite or not a number"):
        draw_tracks(pixels, tracks, seen(FRAMES))


def test_no_points_leave_the_frames_as_they_are(pixels: np.ndarray) -> None:
    assert np.array_equal(shown(pixels, torch.zeros(0, FRAMES, 2), seen(FRAMES, 0)), pixels)


@pytest.mark.parametrize(("height", "width", "radius"), [(21, 34, 2), (1, 7, 2), (300, 400, 5)])
def test_frames_of_any_size_have_points_that_suit_them(height: int, width: int, radius: float) -> None:
    frames = black(1, height, width)
    place = still(width / 2, height / 2)
    assert np.array_equal(shown(frames, place, seen()), shown(frames, place, seen(), radius=radius))


def test_the_callers_frames_stay_as_they_are(pixels: np.ndarray) -> None:
    pictures = [Image.fromarray(frame) for frame in pixels]
    shown(pictures, still(9, 9, FRAMES), seen(FRAMES))
    assert all(np.array_equal(np.asarray(picture), frame) for picture, frame in zip(pictures, pixels, strict=True))


MACHADO = {  # full loss of one kind of cone, Machado et al. 2009, in linear RGB
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("vision", [np.eye(3), *(np.array(matrix) for matrix in MACHADO.values())])
@pytest.mark.parametrize(("count", "least"), [(7, 25), (30, 5)])
def test_colors_are_told_apart_with_any_color_vision(vision: np.ndarray, count: int, least: float) -> None:
    srgb = np.array(point_colors(count)) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4) @ vision.T
    linear = linear.clip(0, 1)
    seen_as = 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    distances = np.linalg.norm(seen_as[:, None] - seen_as[None], axis=-1)[np.triu_indices(count, 1)]
    assert distances.min() > least


@pytest.mark.parametrize("count", [0, 1, 7, 8, 100, 128])
def test_every_point_has_a_color_of_its_own(count: int) -> None:
    colors = point_colors(count)
    assert len(set(colors)) == len(colors) == count
    assert point_colors(178)[128:] == point_colors(128)[:50]


def test_many_colors_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert point_colors(7) == list(PALETTE)
    with pytest.raises(ConceptMapsError, match=r"need matplotlib .*\[viz\]"):
        point_colors(8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"tracks": torch.zeros(2, 4, 2)},
            r"tracks are torch.float32 of shape \(2, 4, 2\); expected .* \[point, 5",
        ),
        ({"tracks": torch.zeros(2, 5, 2).long()}, "tracks are torch.int64 of shape"),
        ({"visibility": torch.ones(2, 5)}, r"visibility is torch.float32 of shape \(2, 5\); expected bool of shape"),
        ({"visibility": seen(5, 3)}, r"visibility is torch.bool of shape \(3, 5\); expected bool of shape \(2, 5\)"),
        ({"trail": -1}, "trail is -1; expected a number of frames, 0 for none"),
        ({"radius": 0.0}, "radius is 0.0; expected a positive number of pixels"),
        ({"radius": math.nan}, "radius is nan; expected a positive number of pixels"),
        ({"frames": []}, "frames are list without an item"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], message: str, pixels: np.ndarray) -> None:
    arguments = {"frames": pixels, "tracks": torch.zeros(2, FRAMES, 2), "visibility": seen(FRAMES, 2)}
    with pytest.raises(ConceptMapsValueError, match=message):
        draw_tracks(**arguments | changed)
