"""Gram columns: how alike every token of a frame is to the token that best matches a text row.

With "text" the columns are standardized over the text rows of a token, all of them in one program; with "clip" over
the tokens of a head, which takes a first pass for the moments.
"""

from __future__ import annotations

from typing import Any

import torch

from . import _columns
from ._common import check_last_axis, runnable

__all__ = ["gram_columns", "launch_shape", "supports"]


def launch_shape(dtype: torch.dtype, head_width: int, rows: int, standardize: str) -> dict[str, Any] | None:
    """Constants and options of `_columns.columns_kernel`; None where it is not enabled."""
    return _columns.launch_shape(dtype, head_width, rows, standardize, gathered=True)


def supports(
    image_output: torch.Tensor,
    index: torch.Tensor,
    head_weights: torch.Tensor,
    standardize: str,
    multiplicity: torch.Tensor | None,
) -> bool:
    """Whether `gram_columns` is enabled for these arguments."""
    shape = launch_shape(image_output.dtype, image_output.shape[3], index.shape[2], standardize)
    return (
        shape is not None
        and runnable(image_output)
        and _columns.same_device(image_output, index, head_weights, multiplicity)
    )


def gram_columns(
    image_output: torch.Tensor,
    index: torch.Tensor,
    head_weights: torch.Tensor,
    standardize: str,
    multiplicity: torch.Tensor | None,
) -> torch.Tensor:
    """`sum_h w_h standardized(<X_h[f, index_h], X_h[f, p]>)` (GramCol of IMAP, arXiv 2603.02919).

    Args:
        image_output: attention outputs before the output projection `[R, H, N, D]`, the features X.
        index: int64 `[R, H, C, F]`, for every text row the token inside of each frame that matches it best.
        head_weights: float `[R, H]`; a head of weight 0 is not read.
        standardize: "clip", over the N tokens of the head (population deviation); "text", over the C rows (unbiased),
            where rows of equal tokens get exactly 0; or "none".
        multiplicity: float `[C]`, how many equal rows each text row stands for in "text"; None is one each.

    Returns:
        float32 `[R, C, N]`.

    Raises:
        ValueError: the last axis is not contiguous, unknown `standardize`, or the kernel is not enabled for the dtype,
            D and C.
    """
    check_last_axis(image_output=image_output)
    rows, _, tokens, width = image_output.shape
    shape = launch_shape(image_output.dtype, width, index.shape[2], standardize)
    if shape is None:
        raise ValueError(
            f"gram_columns is not enabled for {image_output.dtype}, head width {width}, {index.shape[2]} text rows, "
            f"standardize {standardize!r}"
        )
    output = image_output.new_empty(rows, index.shape[2], tokens, dtype=torch.float32)
    _columns.launch_columns(None, index, image_output, head_weights, 1.0, multiplicity, output, shape)
    return output
