"""Maps laid over frames: arrays in, pictures out, one color scale for a whole clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.media import read_frames
from diffusers_concept_maps.upsample import upsample_map
from diffusers_concept_maps.visualize import require

COLORMAP = "inferno"
"""A perceptually uniform colormap of matplotlib, whose brightness rises with the score."""


def as_pictures(frames: Any) -> list[Image.Image]:
    """Frames of one video or image as RGB pictures, every one kept.

    Args:
        frames: as for `media.read_frames`: a path, PIL images, an array `[frame, height, width, 3]` or a tensor
            `[frame, 3, height, width]`.

    Raises:
        ConceptMapsValueError: anything else, values outside 0..1, no frame, or frames of different sizes.
        ConceptMapsError: a file cannot be read.
    """
    pixels = (frame.mul(255).round().byte() for frame in read_frames(frames).frames)
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in pixels]


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


def colorize(scores: np.ndarray) -> np.ndarray:
    """Colors of scores in 0..1, `[...]` to float `[..., 3]`.

    Raises:
        ConceptMapsError: matplotlib is not installed.
    """
    return np.asarray(require("matplotlib").colormaps[COLORMAP](scores))[..., :3]


def overlay(frames: Any, concept_map: torch.Tensor, *, opacity: float = 0.6) -> list[Image.Image]:
    """Frames with a map laid over them.

    The colors run from the lowest to the highest score of the clip, so that nothing flickers and a frame in which the
    concept is absent stays dark; where the score is low the frame shows through.

    Args:
        frames: as for `as_pictures`.
        concept_map: float tensor `[token_frame, height, width]`.
        opacity: of the map where it is strongest, 0 to 1.

    Returns:
        One RGB picture per frame, of the frame's size.

    Raises:
        ConceptMapsValueError: wrong frames, map or opacity.
        ConceptMapsError: matplotlib is not installed.
    """
    pictures = as_pictures(frames)
    if concept_map.ndim != 3:
        raise ConceptMapsValueError(
            f"the map has shape {tuple(concept_map.shape)}; expected [frame, height, width] of one video and concept"
        )
    if not 0 <= opacity <= 1:
        raise ConceptMapsValueError(f"opacity is {opacity}; expected a number from 0 to 1")
    width, height = pictures[0].size
    scores = upsample_map(normalized(concept_map.float().cpu()), (height, width), len(pictures)).numpy()
    return [_blend(picture, score, opacity) for picture, score in zip(pictures, scores, strict=True)]


def _blend(picture: Image.Image, score: np.ndarray, opacity: float) -> Image.Image:
    alpha = (opacity * score)[..., None]
    dimmed = np.asarray(picture) / 255 * (1 - alpha)
    return Image.fromarray(((dimmed + alpha * colorize(score)) * 255).round().clip(0, 255).astype(np.uint8))
