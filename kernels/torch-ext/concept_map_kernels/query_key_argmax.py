"""Argmax over the tokens of every frame of image query times text key, with the margin over the runner-up.

Every lane of a tile keeps its own best two tokens, so that nothing is reduced across threads before the last tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._common import LAUNCH, MAX_SPLITS, check_last_axis, dot, head_shape, padded, runnable, split

__all__ = ["launch_shape", "query_key_argmax", "supports"]

LAUNCHES = {
    # (bytes of an element, padded head width, BLOCK_C): (BLOCK_P, num_warps, num_stages)
    (2, 32, 16): (128, 4, 3),
    (2, 32, 32): (64, 4, 3),
    (2, 32, 64): (64, 4, 3),
    (2, 64, 16): (64, 4, 3),
    (2, 64, 32): (64, 4, 3),
    (2, 64, 64): (64, 4, 3),
    (2, 128, 16): (64, 4, 3),
    (2, 128, 32): (64, 4, 3),
    (2, 128, 64): (64, 4, 3),
    (2, 256, 16): (32, 4, 3),
    (2, 256, 32): (32, 4, 3),
    (2, 256, 64): (32, 4, 2),
    (4, 32, 16): (64, 4, 3),
    (4, 32, 32): (64, 4, 3),
    (4, 32, 64): (64, 4, 3),
    (4, 64, 16): (64, 4, 3),
    (4, 64, 32): (64, 4, 3),
    (4, 64, 64): (64, 8, 2),
    (4, 128, 16): (32, 4, 3),
}
_NEVER = tl.constexpr(2147483647)


@triton.jit
def query_key_argmax_kernel(
    query_ptr,
    key_ptr,
    index_ptr,  # [R, H, C, F, SPLITS], as the next two
    value_ptr,
    gap_ptr,
    C,
    P,
    frames,
    splits,
    part,
    scale,
    stride_qr,
    stride_qh,
    stride_qn,
    stride_kr,
    stride_kh,
    stride_kc,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Best token, and its lead over the second best, for a block of text rows in one part of a frame of one head."""
    blocks = tl.cdiv(C, BLOCK_C)
    block = tl.program_id(0) % blocks  # varies fastest: text blocks share the image queries through the cache
    this = (tl.program_id(0) // blocks) % splits
    frame = (tl.program_id(0) // (blocks * splits)).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    c_mask = c < C
    d_mask = d < HEAD_WIDTH

    key_at = key_ptr + row * stride_kr + head * stride_kh
    key = tl.load(key_at + c[:, None] * stride_kc + d[None, :], mask=c_mask[:, None] & d_mask[None, :], other=0.0)
    first = tl.full((BLOCK_C, BLOCK_P), float("-inf"), tl.float32)
    second = tl.full((BLOCK_C, BLOCK_P), float("-inf"), tl.float32)
    index = tl.full((BLOCK_C, BLOCK_P), 0, tl.int32) + this * part  # a valid token even where every score is NaN

    query_at = query_ptr + row * stride_qr + head * stride_qh + frame * P * stride_qn
    end = tl.minimum(this * part + part, P)
    for start in range(this * part, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        p_mask = p < end
        query = tl.load(
            query_at + p.to(tl.int64)[None, :] * stride_qn + d[:, None],
            mask=d_mask[:, None] & p_mask[None, :],
            other=0.0,
        )
        score = tl.where(p_mask[None, :], dot(key, query, PRECISION, UPCAST), float("-inf"))
        better = score > first
        second = tl.where(better, first, tl.maximum(second, score))
        first = tl.where(better, score, first)
        index = tl.where(better, p[None, :], index)

    best = tl.max(first, 1)
    chosen = tl.min(tl.where(first == best[:, None], index, _NEVER), 1)
    runner_up = tl.max(tl.where(index == chosen[:, None], second, first), 1)
    out = (((row * tl.num_programs(1) + head) * C + c) * frames + frame) * splits + this
    tl.store(index_ptr + out, chosen.to(tl.int64), mask=c_mask)
    tl.store(value_ptr + out, best * scale, mask=c_mask)
    tl.store(gap_ptr + out, (best - runner_up) * scale, mask=c_mask)


@triton.jit
def merge_splits_kernel(
    part_index_ptr,  # [rows, SPLITS], as the next two
    part_value_ptr,
    part_gap_ptr,
    index_ptr,  # [rows], as the next two
    value_ptr,
    gap_ptr,
    splits,
    BLOCK_S: tl.constexpr,
):
    """Best token of all parts: its lead is the smaller of that in its own part and that over the other parts."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    mask = s < splits
    value = tl.load(part_value_ptr + row * splits + s, mask=mask, other=float("-inf"))
    index = tl.load(part_index_ptr + row * splits + s, mask=mask, other=_NEVER)
    gap = tl.load(part_gap_ptr + row * splits + s, mask=mask, other=float("inf"))
    best = tl.max(value, 0)
    chosen = tl.min(tl.where(value == best, index, _NEVER), 0)
    lead = tl.min(tl.where(index == chosen, gap, best - value), 0)
    tl.store(index_ptr + row, chosen)
    tl.store(value_ptr + row, best)
    tl.store(gap_ptr + row, lead)


def launch_shape(dtype: torch.dtype, head_width: int, concepts: int) -> dict[str, Any] | None:
    """Constants and options of `query_key_argmax_kernel`; None where it is not enabled."""
    shape = head_shape(dtype, head_width)
    key = (dtype.itemsize, shape["BLOCK_D"])
    block_c = min(padded(concepts), 64)
    if (*key, block_c) not in LAUNCHES:
        block_c = 16
    launch = LAUNCHES.get((*key, block_c))
    if launch is None or head_width % 8:
        return None
    block_p, num_warps, num_stages = launch
    if head_width % 16:  # rows that are not aligned are read number by number, which takes registers
        block_p, num_stages = block_p // 2, 1
    return {**shape, "BLOCK_C": block_c, "BLOCK_P": block_p, "num_warps": num_warps, "num_stages": num_stages}


def supports(image_query: torch.Tensor, concept_key: torch.Tensor, frames: int) -> bool:
    """Whether `query_key_argmax` is enabled for these arguments."""
    shape = launch_shape(image_query.dtype, image_query.shape[3], concept_key.shape[2])
    return shape is not None and image_query.shape[2] >= frames and runnable(image_query, concept_key)


def query_key_argmax(
    image_query: torch.Tensor, concept_key: torch.Tensor, frames: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The token of every frame whose query matches a text key best (IMAP, arXiv 2603.02919).

    Args:
        image_query: `[R, H, N, D]`.
        concept_key: `[R, H, C, D]`, of concepts or of prompt tokens.
        frames: F, which divides N; a frame has P = N / F tokens.

    Returns:
        All `[R, H, C, F]`: int64 index of the token inside its frame, the lowest on ties; float32 value there,
        `q k / sqrt(D)`; and float32 gap, by which the value leads the runner-up: 0 on ties, inf where P is 1.

    Raises:
        ValueError: a last axis is not contiguous, F does not divide N, or the kernel is not enabled for the dtype, D
            and C.
    """
    check_last_axis(image_query=image_query, concept_key=concept_key)
    rows, heads, tokens, width = image_query.shape
    concepts, device = concept_key.shape[2], image_query.device
    shape = launch_shape(image_query.dtype, width, concepts)
    if shape is None:
        raise ValueError(
            f"query_key_argmax is not enabled for {image_query.dtype}, head width {width}, {concepts} keys"
        )
    if tokens % frames or not tokens:
        raise ValueError(f"frames is {frames}, which does not divide the {tokens} image tokens")
    blocks = triton.cdiv(concepts, shape["BLOCK_C"])
    splits, part = split(tokens // frames, shape["BLOCK_P"], rows * heads * frames * blocks)
    dtypes = (torch.int64, torch.float32, torch.float32)
    size = (rows, heads, concepts, frames)
    parts = [torch.empty(*size, splits, dtype=dtype, device=device) for dtype in dtypes]
    strides = (*image_query.stride()[:3], *concept_key.stride()[:3])
    sizes = (concepts, tokens // frames, frames, splits, part)
    with torch.cuda.device_of(image_query):
        query_key_argmax_kernel[(blocks * splits * frames, heads, rows)](
            image_query, concept_key, *parts, *sizes, width**-0.5, *strides, **shape
        )
        if splits == 1:
            return parts[0].squeeze(-1), parts[1].squeeze(-1), parts[2].squeeze(-1)
        index, value, gap = (torch.empty(size, dtype=dtype, device=device) for dtype in dtypes)
        merge_splits_kernel[(index.numel(),)](
            *parts, index, value, gap, splits, BLOCK_S=MAX_SPLITS, num_warps=1, **LAUNCH
        )
    return index, value, gap
