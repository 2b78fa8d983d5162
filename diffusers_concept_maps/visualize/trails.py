"""Tracked points drawn into the frames of their video, each with a trail of where it came from.

A point is a disc where it is visible and a ring where it is not. Trails fade with age, and have a gap where the point
was not visible. Everything is drawn to a fraction of a pixel: the color fades over one pixel around a shape's edge, by
how far the center of each pixel is from it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.visualize import require
from diffusers_concept_maps.visualize.overlay import as_pictures

PALETTE = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
"""Colors to tell apart with any color vision: Okabe and Ito, "Color Universal Design", 2008, without black."""

COLORMAP = "viridis"
"""For more points than the palette has colors: even steps of brightness, which any color vision sees."""


def point_colors(count: int) -> list[tuple[int, int, int]]:
    """Distinct RGB colors, 0 to 255, for readers with any color vision; more than 128 repeat.

    Args:
        count: how many.

    Raises:
        ConceptMapsError: there are more than the palette has, and matplotlib is not installed.
    """
    if count <= len(PALETTE):
        return list(PALETTE[:count])
    steps = np.linspace(0, 0.9, min(count, 128))  # above, blue-yellow blindness sees nothing change
    table = np.asarray(require("matplotlib").colormaps[COLORMAP](steps))[:, :3]
    colors = [(int(r), int(g), int(b)) for r, g, b in (table * 255).round()]
    return [colors[index % len(colors)] for index in range(count)]


def draw_tracks(
    frames: Any,
    tracks: torch.Tensor,
    visibility: torch.Tensor,
    *,
    trail: int = 12,
    radius: float | None = None,
) -> list[Image.Image]:
    """Frames with points and their trails drawn into them.

    Args:
        frames: as for `visualize.overlay.as_pictures`.
        tracks: float `[point, frame, 2]`: (x, y) in pixel-center coordinates of the frames, which may lie outside
            them. A point that is not visible is not drawn where its place is not finite.
        visibility: bool `[point, frame]`.
        trail: frames until a trail has faded; 0 draws none.
        radius: of a point, in pixels; None is 1/100 of the frame's diagonal, at least 2.

    Returns:
        One RGB picture per frame, of the frame's size.

    Raises:
        ConceptMapsValueError: wrong frames; tracks or visibility that do not fit them; a visible point whose place is
            not finite; a negative trail, or a radius that is not positive.
        ConceptMapsError: as `point_colors`.
    """
    pictures = as_pictures(frames)
    _check(tracks, visibility, len(pictures), trail)
    if radius is None:
        radius = max(2.0, math.hypot(*pictures[0].size) / 100)
    if not 0 < radius < math.inf:
        raise ConceptMapsValueError(f"radius is {radius}; expected a positive number of pixels")
    colors = [np.array(color, np.float64) for color in point_colors(len(tracks))]
    places, visible = tracks.double().cpu().numpy(), visibility.cpu().numpy()
    drawn = []
    for index, picture in enumerate(pictures):
        canvas = np.asarray(picture).astype(np.float64)
        for path, seen, color in zip(places, visible, colors, strict=True):
            _draw_trail(canvas, path, seen, index, trail, radius, color)
        for path, seen, color in zip(places, visible, colors, strict=True):
            _draw_point(canvas, path[index], bool(seen[index]), radius, color)
        drawn.append(Image.fromarray(canvas.round().astype(np.uint8)))
    return drawn


def _check(tracks: torch.Tensor, visibility: torch.Tensor, frames: int, trail: int) -> None:
    if tracks.ndim != 3 or tracks.shape[1:] != (frames, 2) or not tracks.is_floating_point():
        raise ConceptMapsValueError(
            f"tracks are {tracks.dtype} of shape {tuple(tracks.shape)}; expected floats [point, {frames}, 2], "
            f"one place (x, y) per frame"
        )
    if visibility.shape != tracks.shape[:2] or visibility.dtype != torch.bool:
        raise ConceptMapsValueError(
            f"visibility is {visibility.dtype} of shape {tuple(visibility.shape)}; expected bool of shape "
            f"{tuple(tracks.shape[:2])}, as the tracks"
        )
    if not tracks[visibility].isfinite().all():
        raise ConceptMapsValueError("a visible point has a place that is infinite or not a number; expected finite")
    if trail < 0:
        raise ConceptMapsValueError(f"trail is {trail}; expected a number of frames, 0 for none")


def _draw_point(canvas: np.ndarray, place: np.ndarray, visible: bool, radius: float, color: np.ndarray) -> None:
    if not np.isfinite(place).all():
        return
    box = _box(canvas, place[None], radius + 1)
    distance = np.hypot(*_offsets(box, place))
    line = radius / 4  # half the width of a ring, whose outer edge is that of the disc
    outside = distance - radius if visible else np.abs(distance - (radius - line)) - line
    _blend(canvas, box, _covered(outside), color)


def _draw_trail(
    canvas: np.ndarray, path: np.ndarray, seen: np.ndarray, index: int, trail: int, width: float, color: np.ndarray
) -> None:
    """Lines between the places of the last frames; where they overlap the younger one shows, never their sum."""
    steps = [step for step in range(max(1, index - trail + 1), index + 1) if seen[step] and seen[step - 1]]
    if not steps:
        return
    box = _box(canvas, path[[*steps, *(step - 1 for step in steps)]], width / 2 + 1)
    alpha = np.zeros((box[1].stop - box[1].start, box[0].stop - box[0].start))
    for step in steps:
        start, end = path[step - 1], path[step]
        part = _box(canvas, np.stack([start, end]), width / 2 + 1)
        x, y = _offsets(part, start)
        along = end - start
        length = float(along @ along)
        share = np.clip((x * along[0] + y * along[1]) / length, 0, 1) if length else np.zeros_like(x)
        distance = np.hypot(x - share * along[0], y - share * along[1])
        fade = 1 - (index - step) / trail
        inner = alpha[_shift(part[1], box[1].start), _shift(part[0], box[0].start)]
        np.maximum(inner, fade * _covered(distance - width / 2), out=inner)
    _blend(canvas, box, alpha, color)


def _box(canvas: np.ndarray, places: np.ndarray, margin: float) -> tuple[slice, slice]:
    """Columns and rows of the pixels that are within a margin around places; empty if those are outside."""
    height, width, _ = canvas.shape
    low = np.floor(places.min(0) - margin)
    high = np.ceil(places.max(0) + margin) + 1
    columns, rows = (
        slice(int(np.clip(a, 0, size)), int(np.clip(b, 0, size)))
        for a, b, size in zip(low, high, (width, height), strict=True)
    )
    return columns, rows


def _offsets(box: tuple[slice, slice], place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From a place to the centers of the pixels of a box, `[row, column]` for x and for y."""
    columns, rows = (np.arange(part.start, part.stop, dtype=np.float64) for part in box)
    x, y = np.meshgrid(columns - place[0], rows - place[1])
    return x, y


def _shift(part: slice, start: int) -> slice:
    return slice(part.start - start, part.stop - start)


def _covered(outside: np.ndarray) -> np.ndarray:
    """Share of a pixel that a shape covers, by how far its center is outside the shape's edge."""
    return np.clip(0.5 - outside, 0, 1)


def _blend(canvas: np.ndarray, box: tuple[slice, slice], alpha: np.ndarray, color: np.ndarray) -> None:
    columns, rows = box
    canvas[rows, columns] += alpha[..., None] * (color - canvas[rows, columns])
