"""Similarity: dot products of text rows and image tokens, summed over the heads, into a new map or an old one."""

from __future__ import annotations

from typing import Any

import torch

from . import _columns
from ._common import check_last_axis, runnable

__all__ = ["accumulate_similarity_", "launch_shape", "similarity", "supports", "supports_accumulate"]


def launch_shape(dtype: torch.dtype, head_width: int, rows: int, standardize: str) -> dict[str, Any] | None:
    """Constants and options of `_columns.columns_kernel`; None where it is not enabled."""
    return _columns.launch_shape(dtype, head_width, rows, standardize, gathered=False)


def supports(
    concept: torch.Tensor,
    image: torch.Tensor,
    head_weights: torch.Tensor,
    scale: float,
    standardize: str,
    multiplicity: torch.Tensor | None,
) -> bool:
    """Whether `similarity` is enabled for these arguments."""
    shape = launch_shape(image.dtype, image.shape[3], concept.shape[2], standardize)
    return shape is not None and runnable(image, concept) and _columns.same_device(image, head_weights, multiplicity)


def supports_accumulate(
    total: torch.Tensor, concept: torch.Tensor, image: torch.Tensor, head_weights: torch.Tensor, scale: float
) -> bool:
    """Whether `accumulate_similarity_` is enabled for these arguments."""
    return (
        runnable(total)
        and total.dtype == torch.float32
        and _columns.same_device(image, total)
        and supports(concept, image, head_weights, scale, "none", None)
    )


def similarity(
    concept: torch.Tensor,
    image: torch.Tensor,
    head_weights: torch.Tensor,
    scale: float,
    standardize: str,
    multiplicity: torch.Tensor | None,
) -> torch.Tensor:
    """`sum_h w_h standardized(scale <concept_h, image_h>)` for every text row and token.

    Of attention outputs these are the maps of ConceptAttention (arXiv 2502.04320), of keys and queries with a scale of
    `1 / sqrt(D)` the logits of cross-attention.

    Args:
        concept: `[R, H, C, D]`.
        image: `[R, H, N, D]`, of the dtype of `concept`.
        head_weights: float `[R, H]`; a head of weight 0 is not read.
        scale: factor of the dot products.
        standardize: "clip", over the N tokens of the head (population deviation); "text", over the C rows (unbiased);
            or "none".
        multiplicity: float `[C]`, how many equal rows each text row stands for in "text"; None is one each.

    Returns:
        float32 `[R, C, N]`.

    Raises:
        ValueError: a last axis is not contiguous, unknown `standardize`, or the kernel is not enabled for the dtype, D
            and C.
    """
    shape = _checked_shape(concept, image, standardize)
    output = image.new_empty(image.shape[0], concept.shape[2], image.shape[2], dtype=torch.float32)
    _columns.launch_columns(concept, None, image, head_weights, scale, multiplicity, output, shape)
    return output


def accumulate_similarity_(
    total: torch.Tensor, concept: torch.Tensor, image: torch.Tensor, head_weights: torch.Tensor, scale: float
) -> None:
    """Add `similarity`, not standardized, to a map.

    Args:
        total: float32 `[R, C, N]`, changed in place.
        concept: `[R, H, C, D]`.
        image: `[R, H, N, D]`, of the dtype of `concept`.
        head_weights: float `[R, H]`; a head of weight 0 is not read.
        scale: factor of the dot products.

    Raises:
        ValueError: a last axis is not contiguous, or the kernel is not enabled for the dtype, D and C.
        TypeError: `total` is not float32.
    """
    check_last_axis(total=total)
    if total.dtype != torch.float32:
        raise TypeError(f"total is {total.dtype}; expected torch.float32, which sums of many maps need")
    shape = _checked_shape(concept, image, "none")
    _columns.launch_columns(concept, None, image, head_weights, scale, None, total, shape, accumulate=True)


def _checked_shape(concept: torch.Tensor, image: torch.Tensor, standardize: str) -> dict[str, Any]:
    check_last_axis(concept=concept, image=image)
    shape = launch_shape(image.dtype, image.shape[3], concept.shape[2], standardize)
    if shape is None:
        raise ValueError(
            f"similarity is not enabled for {image.dtype}, head width {image.shape[3]}, {concept.shape[2]} text rows, "
            f"standardize {standardize!r}"
        )
    return shape
