"""From scores to pixels in 0..1: gray, colors, and colors or white with the score as alpha."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffusers_concept_maps.visualize.overlay import colorize

Scale = tuple[float, float]
"""The scores that become 0 and 1."""


def scaled(scores: np.ndarray, scale: Scale) -> np.ndarray:
    """Scores as float64 0..1; of a constant map 0."""
    low, high = scale
    values = scores.astype(np.float64) - low
    return (values / (high - low)).clip(0, 1) if high > low else np.zeros_like(values)


def _gray(values: np.ndarray) -> np.ndarray:
    return values[..., None]


def _overlay(values: np.ndarray) -> np.ndarray:
    return np.concatenate([colorize(values), values[..., None]], -1)


def _matte(values: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((*values.shape, 3)), values[..., None]], -1)


LOOKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gray": _gray,
    "color": colorize,
    "overlay": _overlay,
    "matte": _matte,
}
"""By name, from values `[height, width]` in 0..1 to pixels `[height, width, channel]` in 0..1, alpha straight.

"gray": the map itself. "color": its colors. "overlay": its colors, the score as alpha. "matte": white, likewise.
"""
CHANNELS = {"gray": 1, "color": 3, "overlay": 4, "matte": 4}
