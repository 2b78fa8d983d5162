"""Maps laid over frames: arrays in, pictures out, one color scale for a whole clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.upsample import upsample_map
from diffusers_concept_maps.visualize import require

COLORMAP = "inferno"
"""A perceptually uniform colormap of matplotlib, whose brightness rises with the score."""


def as_pictures(frames: Any) -> list[Image.Image]:
    """Frames of one video or image as RGB pictures, every one kept.

    Args:
        frames: a PIL image, a list of them, an array `[frame, height, width, 3]` of uint8 or of floats in 0..1, or a
            floating tensor `[frame, 3, height, width]` in 0..1.

    Raises:
        ConceptMapsValueError: anything else, values outside 0..1, no frame, or frames of different sizes.
    """
    if isinstance(frames, Image.Image):
        return [frames.convert("RGB")]
    if isinstance(frames, Sequence) and frames and all(isinstance(frame, Image.Image) for frame in frames):
        if len({frame.size for frame in frames}) > 1:
            raise ConceptMapsValueError(f"frames of sizes {[f.size for f in frames]}; expected one size for a video")
        return [frame.convert("RGB") for frame in frames]
    if isinstance(frames, torch.Tensor) and frames.ndim == 4 and frames.shape[1] == 3 and frames.is_floating_point():
        frames = frames.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    if not isinstance(frames, np.ndarray) or frames.ndim != 4 or frames.shape[3] != 3 or frames.size == 0:
        shape = f" of shape {tuple(frames.shape)}" if hasattr(frames, "shape") else ""
        raise ConceptMapsValueError(
            f"frames are {type(frames).__name__}{shape}; expected the frames of one video: PIL images, an array "
            f"[frame, height, width, 3] or a tensor [frame, 3, height, width]"
        )
    return [Image.fromarray(frame) for frame in _bytes(frames)]


def _bytes(frames: np.ndarray) -> np.ndarray:
    if frames.dtype == np.uint8:
        return frames
    low, high = frames.min(), frames.max()
    if not (np.issubdtype(frames.dtype, np.floating) and low >= 0 and high <= 1):
        raise ConceptMapsValueError(
            f"frames are {frames.dtype} from {low:.3g} to {high:.3g}; expected uint8, or floats in 0..1 as pipelines "
            f"return them (latents are no frames)"
        )
    return (frames * 255).round().astype(np.uint8)


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
