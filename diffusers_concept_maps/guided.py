"""Maps in pixels made to follow the edges of the frames."""

from __future__ import annotations

import importlib

import torch

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError

_EPSILON = 1e-3
"""Variance of the frames, in 0..1, from which on a detail counts as an edge: a contrast of 0.03."""


def follow_edges(maps: torch.Tensor, guide: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Filter every map with its frame as the guide, so that a map's edges fall on those of the frame.

    This is the guided filter (He, Sun and Tang, "Guided Image Filtering", 2013) with the colors as guide, in a window
    of one token on every side: within it a map is a linear function of the colors. Values can leave the range of the
    map a little.

    Args:
        maps: float `[..., frame, height, width]` in pixels, upsampled smoothly.
        guide: the frames, float `[frame, 3, height, width]` in 0..1.
        grid: `(height, width)` of the tokens the maps come from.

    Returns:
        Tensor of the shape and dtype of `maps`.

    Raises:
        ConceptMapsValueError: the guide is not of the maps' frames and size.
        ConceptMapsError: kornia is not installed.
    """
    if guide.ndim != 4 or guide.shape != (maps.shape[-3], 3, *maps.shape[-2:]):
        frames, height, width = maps.shape[-3:]
        raise ConceptMapsValueError(
            f"the guide has shape {tuple(guide.shape)}; expected the frames that the maps are shown on, "
            f"{(frames, 3, height, width)}"
        )
    try:
        filters = importlib.import_module("kornia.filters")
    except ImportError as error:
        raise ConceptMapsError(
            f'mode="guided" needs kornia ({error}); install it with: pip install "diffusers-concept-maps[guided]"'
        ) from error
    window = tuple(2 * -(-pixels // tokens) + 1 for pixels, tokens in zip(maps.shape[-2:], grid, strict=True))
    flat = maps.reshape(-1, *maps.shape[-3:]).transpose(0, 1).float()
    # One frame at a time: every pixel has a matrix of its own in between. Edges are repeated beyond the border,
    # because a reflection cannot be wider than the frame.
    filtered = [
        filters.guided_blur(frame[None], planes[None], window, _EPSILON, border_type="replicate", separable=True)
        for frame, planes in zip(guide.to(flat), flat, strict=True)
    ]
    return torch.cat(filtered).transpose(0, 1).reshape(maps.shape).to(maps.dtype)
