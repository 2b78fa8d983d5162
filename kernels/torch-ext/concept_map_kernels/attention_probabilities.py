"""Attention probabilities of chosen text keys, summed over heads; the attention matrix exists tile by tile only.

Over the text keys alone the softmax is short, and one kernel does everything. Over text and image keys a kernel of its
own finds the normalizer of every query first: its work is that of half an attention.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._common import LOG2E, check_last_axis, dot, head_shape, padded, runnable

__all__ = ["attention_probabilities", "joint_launch_shape", "launch_shape", "supports"]

LAUNCHES = {
    # (bytes of an element, padded head width, padded concepts): (BLOCK_N, BLOCK_T, num_warps, num_stages)
    (2, 32, 16): (64, 64, 4, 3),
    (2, 32, 32): (64, 64, 4, 3),
    (2, 32, 64): (64, 64, 4, 3),
    (2, 64, 16): (64, 64, 4, 3),
    (2, 64, 32): (64, 64, 4, 3),
    (2, 64, 64): (64, 64, 4, 3),
    (2, 128, 16): (64, 64, 4, 2),
    (2, 128, 32): (64, 64, 4, 2),
    (2, 128, 64): (64, 64, 4, 2),
    (2, 256, 16): (64, 32, 8, 2),
    (2, 256, 32): (64, 32, 8, 2),
    (2, 256, 64): (64, 32, 8, 2),
    (4, 32, 16): (64, 64, 4, 2),
    (4, 32, 32): (64, 64, 4, 2),
    (4, 32, 64): (64, 64, 4, 2),
    (4, 64, 16): (64, 32, 4, 2),
    (4, 64, 32): (64, 32, 4, 2),
}
JOINT_LAUNCHES = {
    # (bytes of an element, padded head width): (BLOCK_N, BLOCK_T, num_warps, num_stages)
    (2, 32): (128, 64, 4, 3),
    (2, 64): (128, 64, 4, 3),
    (2, 128): (64, 64, 4, 3),
    (2, 256): (64, 32, 4, 2),
    (4, 32): (64, 64, 4, 2),
    (4, 64): (64, 32, 4, 2),
}


@triton.jit
def _fold_keys(
    query,
    key_at,
    stride_n,
    keys,
    scale,
    largest,
    total,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Take keys into the running maximum and sum of every query's softmax.

    Scores are scaled, to logits of base 2, after the maximum is gone: before, their rounding is as large as they are.
    """
    d = tl.arange(0, BLOCK_D)
    for start in range(0, keys, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        t_mask = t < keys
        key = tl.load(
            key_at + t.to(tl.int64)[None, :] * stride_n + d[:, None],
            mask=(d < HEAD_WIDTH)[:, None] & t_mask[None, :],
            other=0.0,
        )
        score = tl.where(t_mask[None, :], dot(query, key, PRECISION, UPCAST), float("-inf"))
        larger = tl.maximum(largest, tl.max(score, 1))
        added = tl.sum(tl.math.exp2((score - larger[:, None]) * scale), 1)
        total = total * tl.math.exp2((largest - larger) * scale) + added
        largest = larger
    return largest, total


@triton.jit
def joint_sums_kernel(
    query_ptr,
    text_ptr,
    image_ptr,
    weight_ptr,  # [R, H]
    largest_ptr,  # [R, H, N]
    total_ptr,  # [R, H, N]
    N,
    T,
    scale,
    stride_qr,
    stride_qh,
    stride_qn,
    stride_tr,
    stride_th,
    stride_tt,
    stride_ir,
    stride_ih,
    stride_in,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Maximum and sum of a softmax over text and image keys for a block of queries; a head of weight 0 has none."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    n_mask = n < N
    this = row * tl.num_programs(1) + head
    if tl.load(weight_ptr + this) != 0.0:
        query = tl.load(
            query_ptr + row * stride_qr + head * stride_qh + n[:, None] * stride_qn + d[None, :],
            mask=n_mask[:, None] & (d < HEAD_WIDTH)[None, :],
            other=0.0,
        )
        largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_N,), tl.float32)
        text_at = text_ptr + row * stride_tr + head * stride_th
        image_at = image_ptr + row * stride_ir + head * stride_ih
        largest, total = _fold_keys(
            query, text_at, stride_tt, T, scale, largest, total, HEAD_WIDTH, BLOCK_D, BLOCK_T, PRECISION, UPCAST
        )
        largest, total = _fold_keys(
            query, image_at, stride_in, N, scale, largest, total, HEAD_WIDTH, BLOCK_D, BLOCK_T, PRECISION, UPCAST
        )
        tl.store(largest_ptr + this * N + n, largest, mask=n_mask)
        tl.store(total_ptr + this * N + n, total, mask=n_mask)


@triton.jit
def attention_probabilities_kernel(
    query_ptr,
    text_ptr,
    token_ptr,  # [C]
    weight_ptr,  # [R, H]
    largest_ptr,  # [R, H, N], of the softmax over text and image keys; None for one over the text keys
    total_ptr,  # [R, H, N] or None
    out_ptr,  # [R, C, N]
    heads,
    N,
    T,
    C,
    scale,
    stride_qr,
    stride_qh,
    stride_qn,
    stride_tr,
    stride_th,
    stride_tt,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Weighted sum over the heads of the probabilities of the chosen text keys for a block of queries."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    n_mask = n < N
    c_mask = c < C
    d_mask = d < HEAD_WIDTH
    token = tl.load(token_ptr + c, mask=c_mask, other=0)
    summed = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    query_at = query_ptr + row * stride_qr + n[:, None] * stride_qn + d[None, :]
    text_at = text_ptr + row * stride_tr
    for head in range(0, heads):
        weight = tl.load(weight_ptr + row * heads + head)
        if weight != 0.0:
            query = tl.load(query_at, mask=n_mask[:, None] & d_mask[None, :], other=0.0)
            if largest_ptr is None:
                largest = tl.full((BLOCK_N,), float("-inf"), tl.float32)
                total = tl.zeros((BLOCK_N,), tl.float32)
                largest, total = _fold_keys(
                    query,
                    text_at,
                    stride_tt,
                    T,
                    scale,
                    largest,
                    total,
                    HEAD_WIDTH,
                    BLOCK_D,
                    BLOCK_T,
                    PRECISION,
                    UPCAST,
                )
            else:
                largest = tl.load(largest_ptr + (row * heads + head) * N + n, mask=n_mask, other=0.0)
                total = tl.load(total_ptr + (row * heads + head) * N + n, mask=n_mask, other=1.0)
            chosen = tl.load(
                text_at + token[None, :] * stride_tt + d[:, None], mask=d_mask[:, None] & c_mask[None, :], other=0.0
            )
            score = dot(query, chosen, PRECISION, UPCAST)
            summed += tl.math.exp2((score - largest[:, None]) * scale) * (weight / total)[:, None]
        query_at += stride_qh
        text_at += stride_th
    out = (row * C + c)[None, :] * N + n[:, None]
    tl.store(out_ptr + out, summed, mask=n_mask[:, None] & c_mask[None, :])


def launch_shape(dtype: torch.dtype, head_width: int, concepts: int) -> dict[str, Any] | None:
    """Constants and options of `attention_probabilities_kernel`; None where it is not enabled."""
    shape = head_shape(dtype, head_width)
    block_c = padded(concepts)
    launch = LAUNCHES.get((dtype.itemsize, shape["BLOCK_D"], block_c))
    if launch is None or head_width % 8 or (head_width % 16 and shape["BLOCK_D"] > 64):
        return None
    block_n, block_t, num_warps, num_stages = launch
    if head_width % 16:  # rows that are not aligned are read number by number, which takes registers
        block_t, num_warps, num_stages = block_t // 2, 8, 1
    blocks = {"BLOCK_C": block_c, "BLOCK_N": block_n, "BLOCK_T": block_t}
    return {**shape, **blocks, "num_warps": num_warps, "num_stages": num_stages}


def joint_launch_shape(dtype: torch.dtype, head_width: int) -> dict[str, Any] | None:
    """Constants and options of `joint_sums_kernel`; None where it is not enabled."""
    shape = head_shape(dtype, head_width)
    launch = JOINT_LAUNCHES.get((dtype.itemsize, shape["BLOCK_D"]))
    if launch is None or head_width % 8:
        return None
    block_n, block_t, num_warps, num_stages = launch
    if head_width % 16:  # rows that are not aligned are read number by number, which takes registers
        block_t, num_stages = block_t // 2, 1
    return {**shape, "BLOCK_N": block_n, "BLOCK_T": block_t, "num_warps": num_warps, "num_stages": num_stages}


def supports(
    image_query: torch.Tensor,
    text_key: torch.Tensor,
    tokens: torch.Tensor,
    head_weights: torch.Tensor,
    image_key: torch.Tensor | None,
) -> bool:
    """Whether `attention_probabilities` is enabled for these arguments."""
    dtype, width = image_query.dtype, image_query.shape[3]
    if launch_shape(dtype, width, tokens.shape[0]) is None:
        return False
    if image_key is not None and joint_launch_shape(dtype, width) is None:
        return False
    tensors = (image_query, text_key) if image_key is None else (image_query, text_key, image_key)
    return runnable(*tensors) and tokens.device == head_weights.device == image_query.device


def attention_probabilities(
    image_query: torch.Tensor,
    text_key: torch.Tensor,
    tokens: torch.Tensor,
    head_weights: torch.Tensor,
    image_key: torch.Tensor | None,
) -> torch.Tensor:
    """`sum_h w_h softmax(q_h k_h^T / sqrt(D))` of chosen text keys for every image query.

    Args:
        image_query: `[R, H, N, D]`.
        text_key: keys of all text tokens `[R, H, T, D]`.
        tokens: int64 `[C]`, which of the T keys; their range is not checked.
        head_weights: float `[R, H]`, the factor of every head in the sum; heads of factor 0 are not read.
        image_key: `[R, H, N, D]`, keys that share the softmax with the text (joint attention); None is text alone.

    Returns:
        float32 `[R, C, N]`.

    Raises:
        ValueError: a last axis is not contiguous, or the kernel is not enabled for the dtype, D and C.
    """
    keys = {} if image_key is None else {"image_key": image_key}
    check_last_axis(image_query=image_query, text_key=text_key, **keys)
    rows, heads, queries, width = image_query.shape
    concepts = tokens.shape[0]
    shape = launch_shape(image_query.dtype, width, concepts)
    if shape is None or (image_key is not None and joint_launch_shape(image_query.dtype, width) is None):
        raise ValueError(
            f"attention_probabilities is not enabled for {image_query.dtype}, head width {width}, {concepts} tokens"
        )
    weights = head_weights.contiguous()
    out = torch.empty(rows, concepts, queries, dtype=torch.float32, device=image_query.device)
    sizes = (heads, queries, text_key.shape[2], concepts, LOG2E * width**-0.5)
    strides = (*image_query.stride()[:3], *text_key.stride()[:3])
    with torch.cuda.device_of(image_query):
        sums = (None, None) if image_key is None else _joint_sums(image_query, text_key, image_key, weights)
        attention_probabilities_kernel[(triton.cdiv(queries, shape["BLOCK_N"]), rows)](
            image_query, text_key, tokens.contiguous(), weights, *sums, out, *sizes, *strides, **shape
        )
    return out


def _joint_sums(
    image_query: torch.Tensor, text_key: torch.Tensor, image_key: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum and sum of the softmax of every query over text and image keys, both `[R, H, N]`."""
    rows, heads, queries, width = image_query.shape
    shape = joint_launch_shape(image_query.dtype, width)
    assert shape is not None  # the caller has checked
    largest, total = torch.empty(2, rows, heads, queries, dtype=torch.float32, device=image_query.device)
    strides = [stride for tensor in (image_query, text_key, image_key) for stride in tensor.stride()[:3]]
    sizes = (queries, text_key.shape[2], LOG2E * width**-0.5)
    joint_sums_kernel[(triton.cdiv(queries, shape["BLOCK_N"]), heads, rows)](
        image_query, text_key, image_key, weights, largest, total, *sizes, *strides, **shape
    )
    return largest, total
