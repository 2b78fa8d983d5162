"""Maps laid over frames: one color scale for a whole clip, and out comes the kind of frames that went in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.upsample import upsample_map
from diffusers_concept_maps.visualize.colors import COLORMAP, check_colormap, colorize, draw_legend
from diffusers_concept_maps.visualize.frames import as_pictures, open_frames, to_bytes

__all__ = ["COLORMAP", "as_pictures", "colorize", "enlarge", "normalized", "overlay", "scale_of"]


def enlarge(frames: Sequence[Image.Image], width: int) -> list[Image.Image]:
    """Frames scaled up by a whole factor, pixels kept square and sharp, until they are at least `width` wide."""
    factor = max(1, -(-width // frames[0].width))
    return [frame.resize((frame.width * factor, frame.height * factor), Image.Resampling.NEAREST) for frame in frames]


def scale_of(concept_map: torch.Tensor) -> tuple[float, float]:
    """Lowest and highest score of a map over the whole clip: the ends of its color scale.

    Raises:
        ConceptMapsValueError: a score is infinite or not a number.
    """
    if not concept_map.isfinite().all():
        raise ConceptMapsValueError("the map holds scores that are infinite or not a number; expected finite ones")
    return float(concept_map.min()), float(concept_map.max())


def normalized(concept_map: torch.Tensor) -> torch.Tensor:
    """Scores scaled to 0..1 over the whole clip; a map that is constant becomes 0."""
    low, high = scale_of(concept_map)
    return (concept_map - low) / (high - low) if high > low else torch.zeros_like(concept_map)


def overlay(
    frames: Any,
    concept_map: torch.Tensor,
    *,
    opacity: float = 0.6,
    colormap: str = COLORMAP,
    legend: bool = False,
    rgba: bool = False,
) -> Any:
    """Frames with a map laid over them.

    The colors run from the lowest to the highest score of the clip, so that nothing flickers and a frame in which the
    concept is absent stays dark; where the score is low the frame shows through.

    Args:
        frames: as for `frames.open_frames`; their alpha is kept.
        concept_map: float tensor `[token_frame, height, width]`.
        opacity: of the map where it is strongest, 0 to 1.
        colormap: one of `colors.COLORMAPS`.
        legend: draw a color bar with the scores of its ends into the lower right corner.
        rgba: the map alone as a layer to lay over these frames: its colors, and as alpha `opacity` times the score.

    Returns:
        As many frames of the same size, of the kind, dtype and device that were given (a list of pictures for a path);
        with alpha if the frames have it or `rgba` asks for it.

    Raises:
        ConceptMapsValueError: wrong frames, map, opacity or color map, or frames too small for a legend.
        ConceptMapsError: matplotlib is not installed.
    """
    canvas = open_frames(frames)
    if concept_map.ndim != 3:
        raise ConceptMapsValueError(
            f"the map has shape {tuple(concept_map.shape)}; expected [frame, height, width] of one video and concept"
        )
    if not 0 <= opacity <= 1:
        raise ConceptMapsValueError(f"opacity is {opacity}; expected a number from 0 to 1")
    check_colormap(colormap)
    concept_map = concept_map.detach().float().cpu()
    bar = draw_legend(*scale_of(concept_map), canvas.size, colormap) if legend else None
    scores = upsample_map(normalized(concept_map), canvas.size, len(canvas.pixels)).numpy()
    drawn = []
    for frame, score in zip(canvas.pixels, scores, strict=True):
        alpha, color = (opacity * score)[..., None], colorize(score, colormap)
        pixels = np.concatenate([color, alpha], -1) if rgba else _blend(frame, color, alpha)
        if bar is not None:
            _place(bar, pixels)
        drawn.append(to_bytes(pixels) if frame.dtype == np.uint8 else pixels)
    return canvas.restore(drawn)


def _blend(frame: np.ndarray, color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Floats in 0..1; the alpha of the frame stays."""
    scaled = frame / 255 if frame.dtype == np.uint8 else frame
    mixed = scaled[..., :3] * (1 - alpha) + alpha * color
    return np.concatenate([mixed, scaled[..., 3:]], -1)


def _place(bar: np.ndarray, pixels: np.ndarray) -> None:
    """A legend in the lower right corner, as far from both edges; opaque."""
    height, width = bar.shape[:2]
    margin = height // 16
    bottom, right = pixels.shape[0] - margin, pixels.shape[1] - margin
    corner = pixels[bottom - height : bottom, right - width : right]
    corner[..., :3] = bar / 255
    corner[..., 3:] = 1
