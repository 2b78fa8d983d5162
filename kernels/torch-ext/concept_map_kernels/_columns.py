"""Maps of text rows: `sum_h w_h standardized(scale * <row_h, image_h>)`, one kernel for `similarity` and Gram columns.

A program owns a tile of the map `[row, token]` and walks through the heads, so that the map of no head is ever stored.
The rows are those of a tensor, or tokens of the image itself that an index picks for every frame. A head of weight 0
is not read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._common import dot, head_shape, padded, split
from ._moments import merge, merge_moments, tile_moments

EPSILON = tl.constexpr(1e-6)  # keeps a constant map at zero
PARTS = {torch.bfloat16: 3, torch.float16: 2, torch.float32: 1}  # numbers that hold a difference of two

LAUNCHES = {
    # (bytes of an element, padded head width): {BLOCK_C: (BLOCK_K, BLOCK_P, num_warps, num_stages)}
    (2, 32): {16: (32, 128, 4, 5), 32: (32, 128, 8, 4), 64: (32, 64, 4, 5)},
    (2, 64): {16: (64, 64, 4, 5), 32: (64, 64, 4, 5), 64: (64, 64, 4, 5)},
    (2, 128): {16: (64, 64, 8, 4), 32: (64, 64, 4, 3), 64: (64, 64, 4, 2)},
    (2, 256): {16: (64, 32, 4, 4), 32: (64, 32, 4, 2), 64: (64, 32, 4, 1)},
    (4, 32): {16: (32, 64, 4, 4)},
    (4, 64): {16: (32, 64, 4, 4)},
    (4, 128): {16: (32, 32, 4, 3)},
    (4, 256): {16: (32, 16, 4, 2)},
}
TEXT_LAUNCHES = {  # all rows in one program
    (2, 32): {16: (32, 64, 4, 4), 32: (32, 64, 4, 4), 64: (32, 64, 4, 4), 256: (32, 32, 8, 3), 512: (16, 16, 8, 1)},
    (2, 64): {16: (64, 32, 4, 4), 32: (64, 64, 4, 4), 64: (64, 64, 8, 3), 256: (32, 32, 8, 1), 512: (16, 16, 8, 1)},
    (2, 128): {16: (64, 64, 4, 4), 32: (64, 32, 4, 4), 64: (64, 32, 8, 3), 256: (32, 32, 8, 1), 512: (16, 16, 8, 1)},
    (2, 256): {16: (64, 32, 4, 3), 32: (64, 32, 8, 3), 64: (64, 32, 8, 1), 256: (32, 16, 8, 1), 512: (16, 16, 8, 1)},
    (4, 32): {16: (32, 64, 4, 4), 64: (32, 64, 8, 3)},
    (4, 64): {16: (32, 64, 4, 4), 64: (32, 64, 8, 1)},
    (4, 128): {16: (32, 32, 4, 3), 64: (32, 32, 8, 1)},
    (4, 256): {16: (32, 16, 4, 2), 64: (32, 16, 8, 1)},
}


@triton.jit
def _scores(
    row_ptr,
    index_ptr,
    image_ptr,
    c,
    p,
    c_mask,
    p_mask,
    C,
    frames,
    scale,
    stride_rc,
    stride_in,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Tile `[c, p]` of the scaled dot products of one head, zero where masked; `image_ptr` is one frame.

    With `PARTS` the rows are taken relative to the last one: as many numbers of the width of the input as hold a
    difference of two of them. Equal rows give exactly zero.
    """
    image_at = image_ptr + p.to(tl.int64) * stride_in
    if index_ptr is None:
        row_at = row_ptr + c.to(tl.int64) * stride_rc
    else:
        row_at = image_ptr + tl.load(index_ptr + c * frames, mask=c_mask, other=0) * stride_in
    if PARTS > 0:
        last_at = image_ptr + tl.load(index_ptr + (C - 1) * frames) * stride_in
    scores = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in tl.static_range(0, HEAD_WIDTH, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        d_mask = d < HEAD_WIDTH
        image = tl.load(image_at[None, :] + d[:, None], mask=d_mask[:, None] & p_mask[None, :], other=0.0)
        row = tl.load(row_at[:, None] + d[None, :], mask=c_mask[:, None] & d_mask[None, :], other=0.0)
        if PARTS == 0:
            scores += dot(row, image, PRECISION, UPCAST)
        else:
            last = tl.load(last_at + d, mask=d_mask, other=0.0).to(tl.float32)
            rest = tl.where(c_mask[:, None], row.to(tl.float32) - last[None, :], 0.0)
            for _ in tl.static_range(PARTS):
                part = rest.to(image.dtype)
                scores += dot(part, image, PRECISION, UPCAST)
                rest -= part.to(tl.float32)
    return scores * scale


@triton.jit
def _standardized_rows(scores, count):
    """Every column of a tile with mean 0 and unbiased deviation 1, where row c counts `count[c]` times."""
    counts = tl.sum(count, 0)
    share = (count / counts)[:, None]
    centered = scores - tl.sum(scores * share, 0)[None, :]
    variance = tl.sum(centered * centered * share, 0) * counts / (counts - 1.0)
    return centered / (tl.sqrt_rn(variance) + EPSILON)[None, :]


@triton.jit
def columns_kernel(
    row_ptr,
    index_ptr,  # [R, H, C, F], or None: the rows of every frame are those of row_ptr
    image_ptr,
    weight_ptr,  # [R, H]
    multiplicity_ptr,  # [C] or None
    mean_ptr,  # [R, H, C], for "clip"
    m2_ptr,  # [R, H, C], for "clip"
    output_ptr,
    C,
    P,
    F,
    H,
    scale,
    stride_rr,
    stride_rh,
    stride_rc,
    stride_ir,
    stride_ih,
    stride_in,
    stride_or,
    stride_oc,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PARTS: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Weighted sum over the heads for a block of rows and of the tokens of one frame."""
    blocks = tl.cdiv(C, BLOCK_C)  # vary fastest: blocks of rows share the image through the cache
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) // blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    f = tl.program_id(1) % F
    r = (tl.program_id(1) // F).to(tl.int64)
    c_mask = c < C
    heads = r * H
    image_ptr += r * stride_ir + f.to(tl.int64) * P * stride_in
    if index_ptr is None:
        row_ptr += r * stride_rr
    else:
        index_ptr += heads * C * F + f
    if STANDARDIZE == "text":
        count = tl.where(c_mask, 1.0, 0.0)
        if multiplicity_ptr is not None:
            count = tl.load(multiplicity_ptr + c, mask=c_mask, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for _ in range(0, H):
        weight = tl.load(weight_ptr + heads).to(tl.float32)
        read_c = c < tl.where(weight != 0, C, 0)
        read_p = p < tl.where(weight != 0, P, 0)
        scores = _scores(
            row_ptr, index_ptr, image_ptr, c, p, read_c, read_p, C, F, scale, stride_rc, stride_in,
            HEAD_WIDTH, BLOCK_K, BLOCK_C, BLOCK_P, PARTS, PRECISION, UPCAST,
        )  # fmt: skip
        if STANDARDIZE == "clip":
            mean = tl.load(mean_ptr + heads * C + c, mask=read_c, other=0.0)
            m2 = tl.load(m2_ptr + heads * C + c, mask=read_c, other=0.0)
            scores = (scores - mean[:, None]) / (tl.sqrt_rn(m2 / (F * P)) + EPSILON)[:, None]
        elif STANDARDIZE == "text":
            scores = _standardized_rows(scores, count)
        total += tl.where(weight != 0, scores * weight, 0.0)  # of one row the standardized scores are NaN
        heads += 1
        image_ptr += stride_ih
        if index_ptr is None:
            row_ptr += stride_rh
        else:
            index_ptr += C * F
    mask = c_mask[:, None] & (p < P)[None, :]
    output_at = output_ptr + r * stride_or + c.to(tl.int64)[:, None] * stride_oc + f.to(tl.int64) * P + p[None, :]
    if ACCUMULATE:
        total += tl.load(output_at, mask=mask, other=0.0)
    tl.store(output_at, total, mask=mask)


@triton.jit
def row_moments_kernel(
    row_ptr,
    index_ptr,
    image_ptr,
    weight_ptr,
    mean_ptr,  # [R, H, F * chunks, C]
    m2_ptr,  # [R, H, F * chunks, C]
    C,
    P,
    F,
    H,
    chunk,
    chunks,
    scale,
    stride_rr,
    stride_rh,
    stride_rc,
    stride_ir,
    stride_ih,
    stride_in,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Moments of a block of rows over one chunk of one frame, one head; nothing is written for a head of weight 0."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    f = tl.program_id(1) // chunks
    head = tl.program_id(2).to(tl.int64)
    if tl.load(weight_ptr + head).to(tl.float32) != 0:
        image_ptr += (head // H) * stride_ir + (head % H) * stride_ih + f.to(tl.int64) * P * stride_in
        if index_ptr is None:
            row_ptr += (head // H) * stride_rr + (head % H) * stride_rh
        else:
            index_ptr += head * C * F + f
        count = 0.0
        mean = tl.zeros((BLOCK_C,), tl.float32)
        m2 = tl.zeros((BLOCK_C,), tl.float32)
        begin = (tl.program_id(1) % chunks) * chunk
        end = tl.minimum(begin + chunk, P)
        for start in range(begin, end, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            scores = _scores(
                row_ptr, index_ptr, image_ptr, c, p, c < C, p < P, C, F, scale, stride_rc, stride_in,
                HEAD_WIDTH, BLOCK_K, BLOCK_C, BLOCK_P, 0, PRECISION, UPCAST,
            )  # fmt: skip
            # Relative to the first token of the tile: a constant map keeps exactly that value.
            first = tl.sum(tl.where((p == start)[None, :], scores, 0.0), 1)
            tile_count = tl.minimum(end - start, BLOCK_P).to(tl.float32)
            tile_mean, tile_m2 = tile_moments(scores - first[:, None], (p < end)[None, :], tile_count)
            count, mean, m2 = merge(count, mean, m2, tile_count, first + tile_mean, tile_m2)
        part = (head * tl.num_programs(1) + tl.program_id(1)) * C + c
        tl.store(mean_ptr + part, mean, mask=c < C)
        tl.store(m2_ptr + part, m2, mask=c < C)


def launch_shape(
    dtype: torch.dtype, head_width: int, rows: int, standardize: str, gathered: bool
) -> dict[str, Any] | None:
    """Constants and options of `columns_kernel`; None where it is not enabled.

    Raises:
        ValueError: unknown `standardize`.
    """
    if standardize not in ("none", "clip", "text"):
        raise ValueError(f"standardize is {standardize!r}; expected 'none', 'clip' or 'text'")
    text = standardize == "text"
    blocks = (TEXT_LAUNCHES if text else LAUNCHES).get((dtype.itemsize, padded(head_width, 32)), {})
    if dtype not in PARTS or not blocks or (text and rows > max(blocks)):
        return None
    block_c = min((block for block in blocks if block >= rows), default=max(blocks))
    block_k, block_p, num_warps, num_stages = blocks[block_c]
    if head_width % 16:  # rows that are not aligned are read number by number, which takes registers for addresses
        if block_c > 256:
            return None
        block_p, num_warps, num_stages = max(16, block_p // 2), 8 if block_c > 32 else num_warps, 1
    return {
        **{name: value for name, value in head_shape(dtype, head_width).items() if name != "BLOCK_D"},
        "BLOCK_K": block_k,
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
        "PARTS": PARTS[dtype] if gathered and text else 0,
        "STANDARDIZE": standardize,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def same_device(first: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether small tensors that come with the features, of any dtype, are where these are."""
    return all(other is None or other.device == first.device for other in others)


def moments_shape(shape: dict[str, Any]) -> dict[str, Any]:
    """Constants and options of `row_moments_kernel`, the first pass of "clip", from those of `columns_kernel`."""
    return {name: value for name, value in shape.items() if name not in ("PARTS", "STANDARDIZE")}


def launch_columns(
    row: torch.Tensor | None,
    index: torch.Tensor | None,
    image: torch.Tensor,
    head_weights: torch.Tensor,
    scale: float,
    multiplicity: torch.Tensor | None,
    output: torch.Tensor,
    shape: dict[str, Any],
    accumulate: bool = False,
) -> None:
    """Fill the map `output` `[R, C, N]`, or add to it.

    Args:
        row: rows `[R, H, C, D]`, or None with an `index`.
        index: int64 `[R, H, C, F]`, the token of every frame that is a row there; None with a `row`.
        image: `[R, H, N, D]`.
        head_weights: float `[R, H]`.
        scale: factor of the dot products.
        multiplicity: float `[C]`, how many equal rows each stands for in "text"; None is one each.
        output: float32 `[R, C, N]`, the last axis contiguous.
        shape: of `launch_shape`.
        accumulate: add to `output` instead of overwriting it.
    """
    rows, texts, tokens = output.shape
    heads, frames = head_weights.shape[1], 1 if index is None else index.shape[3]
    places = tokens // frames
    inputs = row, None if index is None else index.contiguous(), image, head_weights.contiguous()
    strides = *((0, 0, 0) if row is None else row.stride()[:3]), *image.stride()[:3]
    blocks = triton.cdiv(texts, shape["BLOCK_C"])
    mean = m2 = None
    with torch.cuda.device_of(image):
        if shape["STANDARDIZE"] == "clip":
            chunks, chunk = split(places, shape["BLOCK_P"], blocks * frames * rows * heads)
            part_mean = image.new_empty(rows, heads, frames * chunks, texts, dtype=torch.float32)
            part_m2 = torch.empty_like(part_mean)
            sizes = texts, places, frames, heads, chunk, chunks
            row_moments_kernel[(blocks, frames * chunks, rows * heads)](
                *inputs, part_mean, part_m2, *sizes, scale, *strides, **moments_shape(shape)
            )
            mean, m2 = merge_moments(part_mean, part_m2, places, chunk, chunks)
        columns_kernel[(blocks * triton.cdiv(places, shape["BLOCK_P"]), rows * frames)](
            *inputs,
            None if multiplicity is None else multiplicity.contiguous(),
            mean,
            m2,
            output,
            texts,
            places,
            frames,
            heads,
            scale,
            *strides,
            *output.stride()[:2],
            ACCUMULATE=accumulate,
            **shape,
        )
