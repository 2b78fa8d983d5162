"""Scores as base64 text: whole numbers between the lowest and the highest score of each concept."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch

MISSING = 255
"""Of 8 bits: a score that was never recorded."""


def packed(scores: torch.Tensor, low: torch.Tensor, high: torch.Tensor, *, bits: int) -> dict[str, Any]:
    """Scores as little-endian whole numbers, with their scale.

    Args:
        scores: float `[panel, concept, frame, height, width]`; with 8 bits, NaN is what was never recorded.
        low: the score of each concept that becomes 0 `[concept]`.
        high: the one that becomes the largest number; where it equals `low`, all become 0.
        bits: 8 or 16.
    """
    top, kind = (MISSING - 1, "<u1") if bits == 8 else (2**16 - 1, "<u2")
    shape = (-1, 1, 1, 1)
    span = (high - low).double()
    share = (scores.double() - low.double().view(shape)) / torch.where(span > 0, span, 1.0).view(shape)
    numbers = torch.where(share.isnan(), MISSING, (share.clamp(0, 1) * top).round()).numpy().astype(kind)
    return {
        "bits": bits,
        "grid": list(scores.shape[2:]),
        "low": low.tolist(),
        "high": high.tolist(),
        "data": text_of(numbers),
    }


def text_of(numbers: np.ndarray) -> str:
    """The bytes of an array as base64."""
    return base64.b64encode(np.ascontiguousarray(numbers).tobytes()).decode()


def coarser(grid: tuple[int, int, int], cells: int) -> tuple[int, int, int]:
    """A grid `(frames, height, width)` of at most so many cells: first fewer rows and columns, then fewer frames."""
    frames, height, width = grid
    while frames * height * width > max(cells, 1):
        if max(height, width) > 12 or frames == 1:
            height, width = -(-height // 2), -(-width // 2)
        else:
            frames = -(-frames // 2)
    return frames, height, width
