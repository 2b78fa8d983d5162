"""Head statistics: the frames of a clip as clusters of attention outputs, which IMAP picks its motion heads by.

One read gives the mean of every frame and the spread within the frames, enough for the Calinski-Harabasz index and
Fisher's ratio; a second read gives the mean distance to the mean of the frame, which the Davies-Bouldin index needs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._common import LAUNCH, check_last_axis, head_shape, padded, runnable, split
from ._moments import merge, merge_moments, tile_moments

__all__ = ["frame_spread", "frame_statistics", "launch_shape", "supports"]

LAUNCHES = {
    # (bytes of an element, padded head width): (BLOCK_P, num_warps)
    (2, 32): (128, 4),
    (2, 64): (128, 4),
    (2, 128): (64, 4),
    (2, 256): (32, 4),
    (4, 32): (128, 4),
    (4, 64): (128, 4),
    (4, 128): (64, 4),
    (4, 256): (32, 4),
}
BLOCK_F = 16


@triton.jit
def middle_token(frame_ptr, P, stride_n, d, d_mask):
    """Per column the median of the first, a middle and the last token of a frame.

    Features less this one keep all their digits, an offset that all tokens share is gone, equal tokens become exactly
    zero, and no single token, such as an attention sink in the first place, is what the others are measured from.
    """
    first = tl.load(frame_ptr + d, mask=d_mask, other=0.0).to(tl.float32)
    middle = tl.load(frame_ptr + (P // 2) * stride_n + d, mask=d_mask, other=0.0).to(tl.float32)
    last = tl.load(frame_ptr + (P - 1) * stride_n + d, mask=d_mask, other=0.0).to(tl.float32)
    return tl.maximum(tl.minimum(first, middle), tl.minimum(tl.maximum(first, middle), last))


@triton.jit
def frame_moments_kernel(
    image_ptr,
    mean_ptr,  # [R, H, F, CHUNKS, D]
    m2_ptr,  # [R, H, F, CHUNKS, D]
    P,
    H,
    chunk,
    stride_ir,
    stride_ih,
    stride_in,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Moments of every column over one chunk of a frame; means relative to the middle token of the frame."""
    f = tl.program_id(1)
    head = tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    d_mask = d < HEAD_WIDTH
    frame_ptr = image_ptr + (head // H).to(tl.int64) * stride_ir + (head % H).to(tl.int64) * stride_ih
    frame_ptr += f.to(tl.int64) * P * stride_in
    base = middle_token(frame_ptr, tl.cast(P, tl.int64), stride_in, d, d_mask)
    count = 0.0
    mean = tl.zeros((BLOCK_D,), tl.float32)
    m2 = tl.zeros((BLOCK_D,), tl.float32)
    begin = tl.program_id(0) * chunk
    end = tl.minimum(begin + chunk, P)
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = d_mask[:, None] & (p < end)[None, :]
        image = tl.load(frame_ptr + p.to(tl.int64)[None, :] * stride_in + d[:, None], mask=mask, other=0.0)
        tile_count = tl.minimum(end - start, BLOCK_P).to(tl.float32)
        tile_mean, tile_m2 = tile_moments(image.to(tl.float32) - base[:, None], mask, tile_count)
        count, mean, m2 = merge(count, mean, m2, tile_count, tile_mean, tile_m2)
    part = (head.to(tl.int64) * tl.num_programs(1) + f) * tl.num_programs(0) + tl.program_id(0)
    tl.store(mean_ptr + part * HEAD_WIDTH + d, mean, mask=d_mask)
    tl.store(m2_ptr + part * HEAD_WIDTH + d, m2, mask=d_mask)


@triton.jit
def _frame_means(image_ptr, shifted_ptr, f, F, P, stride_in, d, HEAD_WIDTH: tl.constexpr):
    """Means `[d, f]` of a few frames of one head, relative to that of the first: exactly zero where it is equal."""
    d_mask = d < HEAD_WIDTH
    mask = d_mask[:, None] & (f < F)[None, :]
    first = tl.load(shifted_ptr + d, mask=d_mask, other=0.0)
    first_token = middle_token(image_ptr, P, stride_in, d, d_mask)
    mean = tl.load(shifted_ptr + f[None, :] * HEAD_WIDTH + d[:, None], mask=mask, other=0.0)
    frame_ptr = image_ptr + f.to(tl.int64)[None, :] * P * stride_in
    token = middle_token(frame_ptr, P, stride_in, d[:, None], mask)
    return tl.where(mask, (token - first_token[:, None]) + (mean - first[:, None]), 0.0)


@triton.jit
def center_frames_kernel(
    image_ptr,
    shifted_ptr,  # [R, H, F, D]
    m2_ptr,  # [R, H, F, D]
    mean_ptr,  # [R, H, F, D]
    within_ptr,  # [R, H]
    F,
    P,
    H,
    stride_ir,
    stride_ih,
    stride_in,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Means relative to a token of each frame become means relative to that of the clip; deviations are summed."""
    head = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    d_mask = d < HEAD_WIDTH
    tokens = tl.cast(P, tl.int64)
    image_ptr += (head // H).to(tl.int64) * stride_ir + (head % H).to(tl.int64) * stride_ih
    offset = head.to(tl.int64) * F * HEAD_WIDTH
    total = tl.zeros((BLOCK_D,), tl.float32)
    within = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        at = offset + f[None, :] * HEAD_WIDTH + d[:, None]
        within += tl.sum(tl.load(m2_ptr + at, mask=d_mask[:, None] & (f < F)[None, :], other=0.0), 1)
        total += tl.sum(_frame_means(image_ptr, shifted_ptr + offset, f, F, tokens, stride_in, d, HEAD_WIDTH), 1)
    clip_mean = total / F
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        at = offset + f[None, :] * HEAD_WIDTH + d[:, None]
        mean = _frame_means(image_ptr, shifted_ptr + offset, f, F, tokens, stride_in, d, HEAD_WIDTH)
        tl.store(mean_ptr + at, mean - clip_mean[:, None], mask=d_mask[:, None] & (f < F)[None, :])
    tl.store(within_ptr + head, tl.sum(within, 0))


@triton.jit
def frame_spread_kernel(
    image_ptr,
    mean_ptr,  # [R, H, F, D], relative to the mean of the clip
    first_ptr,  # [R, H, D], mean of the first frame, relative to its middle token
    spread_ptr,  # [R, H, F, CHUNKS]
    P,
    H,
    chunk,
    stride_ir,
    stride_ih,
    stride_in,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sum of the distances of one chunk of a frame to the mean of the frame."""
    f = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    d_mask = d < HEAD_WIDTH
    tokens = tl.cast(P, tl.int64)
    image_ptr += (head // H) * stride_ir + (head % H) * stride_ih
    base = middle_token(image_ptr, tokens, stride_in, d, d_mask)
    mean_ptr += head * tl.num_programs(1) * HEAD_WIDTH
    mean = tl.load(first_ptr + head * HEAD_WIDTH + d, mask=d_mask, other=0.0)
    mean += tl.load(mean_ptr + f * HEAD_WIDTH + d, mask=d_mask, other=0.0) - tl.load(
        mean_ptr + d, mask=d_mask, other=0.0
    )
    frame_ptr = image_ptr + f * tokens * stride_in
    spread = tl.zeros((BLOCK_P,), tl.float32)
    begin = tl.program_id(0) * chunk
    end = tl.minimum(begin + chunk, P)
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = d_mask[:, None] & (p < end)[None, :]
        image = tl.load(frame_ptr + p.to(tl.int64)[None, :] * stride_in + d[:, None], mask=mask, other=0.0)
        deviation = tl.where(mask, image.to(tl.float32) - base[:, None] - mean[:, None], 0.0)
        spread += tl.sqrt_rn(tl.sum(deviation * deviation, 0))
    part = (head * tl.num_programs(1) + f) * tl.num_programs(0) + tl.program_id(0)
    tl.store(spread_ptr + part, tl.sum(spread, 0))


def launch_shape(dtype: torch.dtype, head_width: int) -> dict[str, Any] | None:
    """Constants and options of `frame_moments_kernel` and `frame_spread_kernel`; None where they are not enabled."""
    shape = head_shape(dtype, head_width)
    launch = LAUNCHES.get((dtype.itemsize, shape["BLOCK_D"]))
    if launch is None or not dtype.is_floating_point:
        return None
    block_p, num_warps = launch
    shape = {name: value for name, value in shape.items() if name not in ("PRECISION", "UPCAST")}  # no dot product
    return {**shape, "BLOCK_P": block_p, "num_warps": num_warps}


def supports(image_output: torch.Tensor, frames: int) -> bool:
    """Whether `frame_statistics`, and `frame_spread` after it, are enabled for these arguments."""
    return launch_shape(image_output.dtype, image_output.shape[3]) is not None and runnable(image_output)


def frame_statistics(image_output: torch.Tensor, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the frames and the spread around them, of every head, in one read (IMAP, arXiv 2603.02919).

    The relative error is at most 1e-6 where the features lie up to 1e6 standard deviations from zero.

    Args:
        image_output: attention outputs before the output projection `[R, H, N, D]`.
        frames: F, which divides N.

    Returns:
        float32 `[R, H, F, D]`, mean feature of every frame relative to the mean of the clip, and float32 `[R, H]`,
        squared distances of the tokens to the mean of their frame, summed over all N tokens.

    Raises:
        ValueError: the last axis is not contiguous, or the kernel is not enabled for the dtype and D.
    """
    shape = _checked_shape(image_output)
    mean, m2 = _shifted_moments(image_output, frames, shape)
    return center_frames(image_output, mean, m2)


def frame_spread(image_output: torch.Tensor, mean: torch.Tensor, frames: int) -> torch.Tensor:
    """Mean distance of the tokens to the mean of their frame, in a second read.

    Args:
        image_output: attention outputs before the output projection `[R, H, N, D]`.
        mean: float32 `[R, H, F, D]`, the means of the frames as `frame_statistics` returns them.
        frames: F, which divides N.

    Returns:
        float32 `[R, H, F]`.

    Raises:
        ValueError: the last axis is not contiguous, or the kernel is not enabled for the dtype and D.
    """
    shape = _checked_shape(image_output)
    rows, heads, tokens, width = image_output.shape
    places = tokens // frames
    # The means are known relative to that of the clip; the first frame, read again, says where that one is.
    first, _ = _shifted_moments(image_output[:, :, :places], 1, shape)
    chunks, chunk = split(places, shape["BLOCK_P"], rows * heads * frames)
    spread = mean.new_empty(rows, heads, frames, chunks)
    with torch.cuda.device_of(image_output):
        frame_spread_kernel[(chunks, frames, rows * heads)](
            image_output, mean.contiguous(), first, spread, places, heads, chunk, *image_output.stride()[:3], **shape
        )
    return spread.sum(-1) / places


def center_frames(
    image_output: torch.Tensor, mean: torch.Tensor, m2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `frame_statistics` returns, from the moments `[R, H, F, D]` of the frames around their middle tokens."""
    rows, heads, frames, width = mean.shape
    centered, within = torch.empty_like(mean), mean.new_empty(rows, heads)
    with torch.cuda.device_of(image_output):
        center_frames_kernel[(rows * heads,)](
            image_output,
            mean,
            m2,
            centered,
            within,
            frames,
            image_output.shape[2] // frames,
            heads,
            *image_output.stride()[:3],
            **center_shape(width),
        )
    return centered, within


def center_shape(head_width: int) -> dict[str, Any]:
    """Constants and options of `center_frames_kernel`."""
    return {"HEAD_WIDTH": head_width, "BLOCK_D": padded(head_width, 32), "BLOCK_F": BLOCK_F, **LAUNCH}


def _checked_shape(image_output: torch.Tensor) -> dict[str, Any]:
    check_last_axis(image_output=image_output)
    shape = launch_shape(image_output.dtype, image_output.shape[3])
    if shape is None:
        raise ValueError(
            f"frame statistics are not enabled for {image_output.dtype} and head width {image_output.shape[3]}"
        )
    return shape


def _shifted_moments(
    image_output: torch.Tensor, frames: int, shape: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments `[R, H, F, D]` of every column over every frame, means relative to the middle token of the frame."""
    rows, heads, tokens, width = image_output.shape
    places = tokens // frames
    chunks, chunk = split(places, shape["BLOCK_P"], rows * heads * frames)
    mean = image_output.new_empty(rows, heads, frames, chunks, width, dtype=torch.float32)
    m2 = torch.empty_like(mean)
    with torch.cuda.device_of(image_output):
        frame_moments_kernel[(chunks, frames, rows * heads)](
            image_output, mean, m2, places, heads, chunk, *image_output.stride()[:3], **shape
        )
        return merge_moments(mean, m2, places, chunk, chunks)
