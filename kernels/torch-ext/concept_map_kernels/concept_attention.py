"""Concept attention: a few concept queries read many image keys and one another.

The image keys are split among programs, as many as the shapes call for, and the partial results are merged by their
log-sum-exps.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._common import LAUNCH, LOG2E, MAX_SPLITS, check_last_axis, dot, head_shape, runnable, split

__all__ = ["concept_attention", "launch_shape", "supports"]

LAUNCHES = {
    # (bytes of an element, padded head width, BLOCK_C): (BLOCK_N, num_warps, num_stages)
    (2, 32, 16): (128, 4, 3),
    (2, 32, 64): (128, 4, 3),
    (2, 64, 16): (64, 4, 3),
    (2, 64, 64): (64, 4, 3),
    (2, 128, 16): (32, 4, 3),
    (2, 128, 64): (32, 8, 3),
    (2, 256, 16): (32, 4, 2),
    (4, 32, 16): (64, 4, 2),
    (4, 32, 64): (32, 4, 2),
    (4, 64, 16): (32, 4, 2),
    (4, 64, 64): (32, 4, 2),
    (4, 128, 16): (16, 4, 2),
    (4, 256, 16): (16, 8, 2),
}
_LOWEST = tl.constexpr(-3e38)  # below every logit, but finite: keys of multiplicity 0 have logits of -inf


@triton.jit
def _read_keys(
    query,
    largest,
    total,
    output,
    key_at,
    value_at,
    stride_k,
    stride_v,
    multiplicity_ptr,
    start,
    end,
    scale,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Take the keys from `start` to `end` into the running softmax of every query; logits have base 2."""
    d = tl.arange(0, BLOCK_D)
    d_mask = d < HEAD_WIDTH
    for first in range(start, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        n_mask = n < end
        n_offset = n.to(tl.int64)
        key = tl.load(
            key_at + n_offset[None, :] * stride_k + d[:, None], mask=d_mask[:, None] & n_mask[None, :], other=0.0
        )
        logits = dot(query, key, PRECISION, UPCAST) * scale
        if multiplicity_ptr is not None:
            count = tl.load(multiplicity_ptr + n, mask=n_mask, other=1.0).to(tl.float32)
            logits += tl.math.log2(count)[None, :]
        logits = tl.where(n_mask[None, :], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        weight = tl.math.exp2(logits - larger[:, None])
        kept = tl.math.exp2(largest - larger)
        value = tl.load(
            value_at + n_offset[:, None] * stride_v + d[None, :], mask=n_mask[:, None] & d_mask[None, :], other=0.0
        )
        total = total * kept + tl.sum(weight, 1)
        output = output * kept[:, None] + dot(weight.to(value.dtype), value, PRECISION, UPCAST)
        largest = larger
    return largest, total, output


@triton.jit
def concept_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    image_key_ptr,
    image_value_ptr,
    multiplicity_ptr,
    partial_ptr,  # [R, H, SPLITS, C, D]
    lse_ptr,  # [R, H, SPLITS, C]
    C,
    N,
    splits,
    part,
    scale,
    stride_qr,
    stride_qh,
    stride_qc,
    stride_kr,
    stride_kh,
    stride_kc,
    stride_vr,
    stride_vh,
    stride_vc,
    stride_ikr,
    stride_ikh,
    stride_ikn,
    stride_ivr,
    stride_ivh,
    stride_ivn,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attention of a block of concepts of one head to one part of the image keys; the last also reads the concepts."""
    blocks = tl.cdiv(C, BLOCK_C)
    block = tl.program_id(0) % blocks  # varies fastest: blocks of concepts share the image keys through the cache
    this = tl.program_id(0) // blocks
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    c_mask = c < C
    mask = c_mask[:, None] & (d < HEAD_WIDTH)[None, :]
    query_at = query_ptr + row * stride_qr + head * stride_qh
    query = tl.load(query_at + c[:, None] * stride_qc + d[None, :], mask=mask, other=0.0)
    largest = tl.full((BLOCK_C,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    output = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)

    largest, total, output = _read_keys(
        query,
        largest,
        total,
        output,
        image_key_ptr + row * stride_ikr + head * stride_ikh,
        image_value_ptr + row * stride_ivr + head * stride_ivh,
        stride_ikn,
        stride_ivn,
        None,
        this * part,
        tl.minimum(this * part + part, N),
        scale,
        HEAD_WIDTH,
        BLOCK_D,
        BLOCK_N,
        PRECISION,
        UPCAST,
    )
    largest, total, output = _read_keys(
        query,
        largest,
        total,
        output,
        key_ptr + row * stride_kr + head * stride_kh,
        value_ptr + row * stride_vr + head * stride_vh,
        stride_kc,
        stride_vc,
        multiplicity_ptr,
        0,
        tl.where(this == splits - 1, C, 0),
        scale,
        HEAD_WIDTH,
        BLOCK_D,
        BLOCK_N,
        PRECISION,
        UPCAST,
    )

    out = ((row * tl.num_programs(1) + head) * splits + this) * C + c
    tl.store(partial_ptr + out[:, None] * HEAD_WIDTH + d[None, :], output / total[:, None], mask=mask)
    tl.store(lse_ptr + out, largest + tl.math.log2(total), mask=c_mask)


@triton.jit
def merge_splits_kernel(
    partial_ptr,  # [R, H, SPLITS, C, D]
    lse_ptr,  # [R, H, SPLITS, C]
    output_ptr,  # [R, H, C, D]
    splits,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Average the partial outputs of one concept and head, weighted by the sums of their exponentials."""
    c = tl.program_id(0)
    head = tl.program_id(1) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    s_mask = s < splits
    d_mask = d < HEAD_WIDTH
    partial = (head * splits + s) * tl.num_programs(0) + c
    lse = tl.load(lse_ptr + partial, mask=s_mask, other=float("-inf"))
    weight = tl.math.exp2(lse - tl.max(lse, 0))
    weight = weight / tl.sum(weight, 0)
    output = tl.load(
        partial_ptr + partial[:, None] * HEAD_WIDTH + d[None, :], mask=s_mask[:, None] & d_mask[None, :], other=0.0
    )
    merged = tl.sum(output * weight[:, None], 0)
    at = output_ptr + (head * tl.num_programs(0) + c) * HEAD_WIDTH + d
    tl.store(at, merged.to(output_ptr.dtype.element_ty), mask=d_mask)


def launch_shape(dtype: torch.dtype, head_width: int, concepts: int) -> dict[str, Any] | None:
    """Constants and options of `concept_attention_kernel`; None where it is not enabled."""
    shape = head_shape(dtype, head_width)
    key = (dtype.itemsize, shape["BLOCK_D"])
    block_c = 64 if concepts > 16 and (*key, 64) in LAUNCHES else 16
    launch = LAUNCHES.get((*key, block_c))
    if launch is None or head_width % 8:
        return None
    block_n, num_warps, num_stages = launch
    if head_width % 16:  # rows that are not aligned are read number by number, which takes registers
        block_n, num_stages = block_n // 2, 1
    return {**shape, "BLOCK_C": block_c, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


def supports(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    image_key: torch.Tensor,
    image_value: torch.Tensor,
    multiplicity: torch.Tensor | None,
) -> bool:
    """Whether `concept_attention` is enabled for these arguments."""
    if multiplicity is not None and multiplicity.device != query.device:
        return False
    shape = launch_shape(query.dtype, query.shape[3], query.shape[2])
    return shape is not None and runnable(query, key, value, image_key, image_value)


def concept_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    image_key: torch.Tensor,
    image_value: torch.Tensor,
    multiplicity: torch.Tensor | None,
) -> torch.Tensor:
    """`softmax(query [key; image_key]^T / sqrt(D)) [value; image_value]` (ConceptAttention, arXiv 2502.04320).

    Args:
        query: concept queries `[R, H, C, D]`.
        key: concept keys `[R, H, C, D]`.
        value: concept values `[R, H, C, D]`.
        image_key: image keys `[R, H, N, D]`.
        image_value: image values `[R, H, N, D]`; N may be 0.
        multiplicity: float `[C]`, how many equal concepts each concept key stands for; None is one each.

    Returns:
        `[R, H, C, D]` in the dtype of `query`, contiguous.

    Raises:
        ValueError: a last axis is not contiguous, or the kernel is not enabled for the dtype, D and C.
    """
    check_last_axis(query=query, key=key, value=value, image_key=image_key, image_value=image_value)
    rows, heads, concepts, width = query.shape
    shape = launch_shape(query.dtype, width, concepts)
    if shape is None:
        raise ValueError(
            f"concept_attention is not enabled for {query.dtype}, head width {width}, {concepts} concepts"
        )
    tokens = image_key.shape[2]
    blocks = triton.cdiv(concepts, shape["BLOCK_C"])
    splits, part = split(tokens, shape["BLOCK_N"], rows * heads * blocks)
    partial = torch.empty(rows, heads, splits, concepts, width, dtype=torch.float32, device=query.device)
    lse = torch.empty(rows, heads, splits, concepts, dtype=torch.float32, device=query.device)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    tensors = (query, key, value, image_key, image_value)
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    counts = None if multiplicity is None else multiplicity.contiguous()
    with torch.cuda.device_of(query):
        concept_attention_kernel[(blocks * splits, heads, rows)](
            *tensors, counts, partial, lse, concepts, tokens, splits, part, LOG2E * width**-0.5, *strides, **shape
        )
        merge_splits_kernel[(concepts, heads, rows)](
            partial, lse, output, splits, HEAD_WIDTH=width, BLOCK_D=shape["BLOCK_D"], BLOCK_S=MAX_SPLITS, **LAUNCH
        )
    return output
