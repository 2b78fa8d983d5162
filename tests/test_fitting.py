"""Clips fitted to what a model takes, held to float64 arithmetic and to exhaustive search."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusers_concept_maps as dcm
from diffusers_concept_maps.fitting import Fit, fit_clip


def clip(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(0))


def shrink(count: int, target: int) -> np.ndarray:
    """Weights `[target, count]` of a triangle as wide as an output pixel, or an input pixel if that is wider."""
    scale = count / target
    centers = (np.arange(target) + 0.5) * scale
    distance = np.abs(np.arange(count)[None] + 0.5 - centers[:, None]) / max(scale, 1)
    weights = np.clip(1 - distance, 0, None)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(20, 36, (8, 16)), (7, 5, (16, 8)), (30, 9, (8, 16)), (1, 1, (8, 8)), (16, 8, (16, 8))],
)
def test_scaling(height: int, width: int, size: tuple[int, int]) -> None:
    frames = clip(2, height, width)
    fitted, fit = fit_clip(frames, size=size, multiple=8)
    wanted = shrink(height, size[0]) @ frames.double().numpy() @ shrink(width, size[1]).T
    torch.testing.assert_close(fitted.double(), torch.from_numpy(wanted), rtol=0, atol=1e-6)
    assert fit == Fit((2, height, width), (2, *size), 0)


def test_white_stays_white() -> None:
    """Rounding must not leave 0..1: what is fitted can be read again."""
    for size in [(37, 53), (1, 1), (99, 3)]:
        fitted, _ = fit_clip(torch.ones(1, 3, 61, 47), size=size)
        assert float(fitted.max()) <= 1
        assert float(fitted.min()) == pytest.approx(1, abs=1e-6)


def cost(size: tuple[int, int], source: tuple[int, int], area: int | None) -> float:
    """How far a size is from the one wished for: in aspect ratio, and half as much in area."""
    scale = 1 if area is None else min(1, (area / math.prod(source)) ** 0.5)
    taller, wider = (math.log(n / (wish * scale)) for n, wish in zip(size, source, strict=True))
    return abs(taller - wider) + abs(taller + wider) / 2


def around(source: tuple[int, int], area: int | None, rows: int, columns: int) -> list[tuple[int, int]]:
    """The multiples on all sides of the size wished for, that are not too large."""
    scale = 1 if area is None else min(1, (area / math.prod(source)) ** 0.5)
    ideal = [n * scale / step for n, step in zip(source, (rows, columns), strict=True)]
    units = itertools.product(*((math.floor(n), math.ceil(n)) for n in ideal))
    sizes = [(y * rows, x * columns) for y, x in units]
    return [size for size in sizes if min(size) > 0 and (area is None or math.prod(size) <= area)]


@pytest.mark.parametrize(
    ("source", "area", "multiple", "size"),
    [
        ((1080, 1920), 480 * 832, 16, (480, 832)),
        ((480, 832), 480 * 832, 16, (480, 832)),
        ((1920, 1080), 480 * 832, 16, (832, 480)),
        ((1000, 1000), 1024 * 1024, 16, (1008, 1008)),
        ((100, 100), 1024 * 1024, 16, (96, 96)),
        ((1, 1), 1024 * 1024, 16, (16, 16)),
        ((1, 1), None, 16, (16, 16)),
        ((37, 53), None, 1, (37, 53)),
        ((37, 53), None, (8, 4), (40, 56)),
        ((1, 10000), 16 * 1600, 16, (16, 1600)),
        ((10000, 1), 16 * 1600, 16, (1600, 16)),
        ((4000, 4000), 256, 16, (16, 16)),
    ],
)
def test_sizes(source: tuple[int, int], area: int | None, multiple: Any, size: tuple[int, int]) -> None:
    frames = torch.zeros(1, 3, *source)
    fitted, fit = fit_clip(frames, area=area, multiple=multiple)
    assert (fitted.shape[2:], fit.model) == (size, (1, *size))


@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    rows=st.integers(1, 32),
    columns=st.integers(1, 32),
    units=st.integers(1, 400) | st.none(),
)
def test_any_size(height: int, width: int, rows: int, columns: int, units: int | None) -> None:
    area = None if units is None else units * rows * columns
    fitted, _ = fit_clip(torch.ones(1, 3, height, width), area=area, multiple=(rows, columns))
    y, x = fitted.shape[2:]
    assert (y % rows, x % columns) == (0, 0)
    assert area is None or y * x <= area
    assert y < height + rows
    assert x < width + columns
    for other in around((height, width), area, rows, columns):
        assert cost((y, x), (height, width), area) <= cost(other, (height, width), area) + 1e-9


@pytest.mark.parametrize(
    ("count", "step", "offset", "limit", "length"),
    [
        (1, 4, 1, None, 1),
        (2, 4, 1, None, 5),
        (5, 4, 1, None, 5),
        (80, 4, 1, 81, 81),
        (81, 4, 1, 81, 81),
        (100, 4, 1, 81, 81),
        (50, 4, 1, 50, 49),
        (3, 8, 0, None, 8),
        (9, 8, 0, 20, 16),
        (20, 8, 0, 20, 16),
        (1, 1, 1, 1, 1),
        (3, 8, 9, None, 9),
    ],
)
def test_lengths(
    count: int, step: int, offset: int, limit: int | None, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    frames = clip(count, 2, 3)
    fitted, fit = fit_clip(frames, frame_step=step, frame_offset=offset, max_frames=limit)
    wanted = [min(index, count - 1) for index in range(length)]
    assert torch.equal(fitted, frames[wanted])
    assert fit == Fit((count, 2, 3), (length, 2, 3), max(0, length - count))
    assert fit.covered == min(count, length)
    cut = f"The clip has {count} frames and the model takes {length} at most: frames 0 to {length - 1} are used. "
    remedy = "To see others, hand over that part of the clip or every n-th frame, or allow more."
    assert caplog.messages == ([cut + remedy] if count > length else [])


@pytest.mark.parametrize(
    ("fit", "line"),
    [
        (Fit((1, 20, 30), (1, 20, 30), 0), "1 frame of 20 x 30 pixels (height x width), as the model takes them"),
        (
            Fit((300, 1080, 1920), (81, 464, 832), 0),
            "300 frames of 1080 x 1920 pixels (height x width), cut to the first 81, scaled to 464 x 832",
        ),
        (
            Fit((10, 8, 8), (13, 8, 8), 3),
            "10 frames of 8 x 8 pixels (height x width), padded to 13 frames by repeating the last",
        ),
    ],
)
def test_a_fit_in_words_and_as_json(fit: Fit, line: str) -> None:
    assert fit.describe() == line
    assert Fit.from_json(json.loads(json.dumps(fit.to_json()))) == fit


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "does not say how a clip was fitted: KeyError"),
        (None, "None does not say how a clip was fitted: TypeError"),
        ({"source": 3, "model": [1, 1, 1], "padding": 0}, "does not say how a clip was fitted: TypeError"),
        (
            {"source": [1, 1], "model": [1, 1, 1], "padding": 0},
            "expected source and model of three whole numbers each",
        ),
        (
            {"source": [1, 1, 1.5], "model": [1, 1, 1], "padding": 0},
            "expected source and model of three whole numbers",
        ),
        ({"source": [1, 1, 1], "model": [1, 1, 1], "padding": "0"}, "and a whole number of padding"),
        ({"source": [1, 1, 1], "model": [1, 1, 1], "padding": 1}, "padding 1 do not belong together"),
        ({"source": [1, 1, 1], "model": [2, 1, 1], "padding": 0}, r"model \(2, 1, 1\) and padding 0 do not belong"),
        ({"source": [1, 0, 1], "model": [1, 1, 1], "padding": 0}, r"source \(1, 0, 1\).* of at least 1 each"),
        ({"source": [1, 1, 1], "model": [1, 1, 1], "padding": -1}, "padding -1 do not belong together"),
    ],
)
def test_what_is_no_fit(entry: Any, message: str) -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match=message):
        Fit.from_json(entry)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"frames": torch.zeros(2, 4, 5, 3)},
            r"^frames are float32 of shape \(2, 4, 5, 3\); expected floats \[frame, 3",
        ),
        ({"frames": torch.zeros(3, 4, 5)}, r"^frames are float32 of shape \(3, 4, 5\); expected"),
        ({"frames": torch.zeros(0, 3, 5, 5)}, r"^frames are float32 of shape \(0, 3, 5, 5\); expected"),
        ({"frames": torch.zeros(1, 3, 5, 5).byte()}, "^frames are uint8 of shape"),
        ({"multiple": 0}, "^multiple is 0, frame_step 1 and frame_offset 1; expected at least 1, 1 and 0"),
        ({"multiple": (4, 0)}, r"^multiple is \(4, 0\), frame_step"),
        ({"frame_step": 0}, "^multiple is 1, frame_step 0 and"),
        ({"frame_offset": -1}, "frame_offset -1; expected at least 1, 1 and 0"),
        ({"area": 255, "multiple": 16}, "^area is 255 pixels; expected at least 256, for multiples of 16 and 16"),
        ({"size": (30, 32), "multiple": 16}, r"^size \(30, 32\) .* multiples of 16 and 16, such as \(32, 32\)"),
        ({"size": (0, 32)}, r"^size \(0, 32\) \(height, width\) is not what .*, such as \(1, 32\)"),
        ({"max_frames": 0}, "^max_frames is 0; expected at least 1, the shortest clip that the model takes"),
        ({"max_frames": 7, "frame_step": 8, "frame_offset": 0}, "^max_frames is 7; expected at least 8, the shortest"),
    ],
)
def test_what_no_clip_can_meet(options: dict[str, Any], message: str) -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match=message):
        fit_clip(**{"frames": torch.zeros(1, 3, 5, 5)} | options)
