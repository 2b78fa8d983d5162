"""Query points as users give them."""

from __future__ import annotations

from typing import Any

import torch

from diffusers_concept_maps.errors import ConceptMapsValueError

__all__ = ["check_points"]


def check_points(points: Any, *, frames: int, size: tuple[int, int]) -> torch.Tensor:
    """Query points on the CPU, checked against their video.

    Args:
        points: float `[point, 3]`, (frame, x, y): a 0-based frame of the video, and its pixels by their centers.
        frames: of the video.
        size: `(height, width)` of the video in pixels.

    Returns:
        Float32 `[point, 3]`.

    Raises:
        ConceptMapsValueError: another shape, no number, or a place outside of the video.
    """
    try:
        queries = torch.as_tensor(points, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConceptMapsValueError(
            f"points are no table of numbers ({error}); expected [point, 3], of which each is (frame, x, y)"
        ) from error
    if queries.ndim != 2 or queries.shape[1] != 3 or not len(queries):
        raise ConceptMapsValueError(
            f"points have shape {tuple(queries.shape)}; expected [point, 3], of which each is (frame, x, y)"
        )
    height, width = size
    low, high = queries.new_tensor([0, -0.5, -0.5]), queries.new_tensor([frames - 1, width - 0.5, height - 0.5])
    inside = ((queries >= low) & (queries <= high)).all(1) & (queries[:, 0] == queries[:, 0].round())
    if not inside.all():
        index = int((~inside).nonzero()[0])
        raise ConceptMapsValueError(
            f"point {index} is {tuple(queries[index].tolist())}; expected (frame, x, y) with a whole frame of 0 to "
            f"{frames - 1}, x of 0 to {width - 1} and y of 0 to {height - 1} in pixels"
        )
    return queries
