"""Similarity and frame statistics together, in one read of the attention outputs."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._columns import same_device
from ._common import check_last_axis, dot, head_shape, padded, runnable
from ._moments import merge_moments, tile_moments
from .frame_statistics import center_frames, middle_token

__all__ = ["launch_shape", "similarity_and_statistics", "supports"]

LAUNCHES = {
    # (bytes of an element, padded head width, padded concepts): (BLOCK_P, num_warps, num_stages)
    (2, 32, 16): (64, 4, 4),
    (2, 32, 32): (64, 4, 3),
    (2, 32, 64): (64, 4, 4),
    (2, 64, 16): (64, 4, 4),
    (2, 64, 32): (64, 4, 4),
    (2, 64, 64): (64, 4, 3),
    (2, 128, 16): (64, 4, 3),
    (2, 128, 32): (64, 4, 3),
    (2, 128, 64): (64, 8, 2),
    (2, 256, 16): (32, 4, 3),
    (2, 256, 32): (32, 8, 2),
    (2, 256, 64): (32, 8, 1),
    (4, 32, 16): (64, 4, 3),
    (4, 64, 16): (64, 8, 3),
    (4, 128, 16): (32, 8, 3),
}


@triton.jit
def image_epilogue_kernel(
    concept_ptr,
    image_ptr,
    weight_ptr,  # [R, H]
    output_ptr,  # [R, C, N]
    mean_ptr,  # [R, H, F, CHUNKS, D]
    m2_ptr,  # [R, H, F, CHUNKS, D]
    C,
    P,
    F,
    H,
    stride_cr,
    stride_ch,
    stride_cc,
    stride_ir,
    stride_ih,
    stride_in,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A block of the tokens of one frame: their similarity to all concepts, and the moments of every head."""
    f = tl.program_id(1)
    r = tl.program_id(2).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    c_mask = c < C
    p_mask = p < P
    d_mask = d < HEAD_WIDTH
    mask = d_mask[:, None] & p_mask[None, :]
    count = tl.minimum(P - tl.program_id(0) * BLOCK_P, BLOCK_P).to(tl.float32)
    tokens = tl.cast(P, tl.int64)
    heads = r * H
    concept_at = concept_ptr + r * stride_cr + c.to(tl.int64)[:, None] * stride_cc + d[None, :]
    frame_ptr = image_ptr + r * stride_ir + f * tokens * stride_in
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for _ in range(0, H):
        image = tl.load(frame_ptr + p.to(tl.int64)[None, :] * stride_in + d[:, None], mask=mask, other=0.0)
        concept = tl.load(concept_at, mask=c_mask[:, None] & d_mask[None, :], other=0.0)
        weight = tl.load(weight_ptr + heads).to(tl.float32)
        # The statistics read every head, the similarity not even the NaN of one of weight 0.
        total += tl.where(weight != 0, dot(concept, image, PRECISION, UPCAST) * weight, 0.0)
        base = middle_token(frame_ptr, tokens, stride_in, d, d_mask)
        mean, m2 = tile_moments(image.to(tl.float32) - base[:, None], mask, count)
        part = ((heads * F + f) * tl.num_programs(0) + tl.program_id(0)) * HEAD_WIDTH + d
        tl.store(mean_ptr + part, mean, mask=d_mask)
        tl.store(m2_ptr + part, m2, mask=d_mask)
        heads += 1
        concept_at += stride_ch
        frame_ptr += stride_ih
    output_at = output_ptr + ((r * C + c[:, None]) * F + f) * P + p[None, :]
    tl.store(output_at, total, mask=c_mask[:, None] & p_mask[None, :])


def launch_shape(dtype: torch.dtype, head_width: int, concepts: int) -> dict[str, Any] | None:
    """Constants and options of `image_epilogue_kernel`; None where it is not enabled."""
    shape = head_shape(dtype, head_width)
    block_c = padded(concepts)
    launch = LAUNCHES.get((dtype.itemsize, shape["BLOCK_D"], block_c))
    if launch is None or not dtype.is_floating_point or head_width % 8:
        return None
    block_p, num_warps, num_stages = launch
    if head_width % 16:  # rows that are not aligned are read number by number, which takes registers
        block_p, num_stages = block_p // 2, 1
    return {**shape, "BLOCK_C": block_c, "BLOCK_P": block_p, "num_warps": num_warps, "num_stages": num_stages}


def supports(
    concept_output: torch.Tensor, image_output: torch.Tensor, head_weights: torch.Tensor, frames: int
) -> bool:
    """Whether `similarity_and_statistics` is enabled for these arguments."""
    shape = launch_shape(image_output.dtype, image_output.shape[3], concept_output.shape[2])
    return shape is not None and runnable(image_output, concept_output) and same_device(image_output, head_weights)


def similarity_and_statistics(
    concept_output: torch.Tensor, image_output: torch.Tensor, head_weights: torch.Tensor, frames: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `similarity`, neither scaled nor standardized, and `frame_statistics` return, in one read of the outputs.

    Args:
        concept_output: `[R, H, C, D]`.
        image_output: attention outputs before the output projection `[R, H, N, D]`, of the dtype of `concept_output`.
        head_weights: float `[R, H]`, of the similarity; the statistics are those of every head.
        frames: F, which divides N.

    Returns:
        float32 `[R, C, N]`, sum over the heads of their weighted dot products; float32 `[R, H, F, D]`, mean feature of
        every frame relative to the mean of the clip; and float32 `[R, H]`, squared distances of the tokens to the mean
        of their frame, summed over all N tokens.

    Raises:
        ValueError: a last axis is not contiguous, or the kernel is not enabled for the dtype, D and C.
    """
    check_last_axis(concept_output=concept_output, image_output=image_output)
    rows, heads, tokens, width = image_output.shape
    concepts, places = concept_output.shape[2], tokens // frames
    shape = launch_shape(image_output.dtype, width, concepts)
    if shape is None:
        raise ValueError(
            f"similarity_and_statistics is not enabled for {image_output.dtype}, head width {width}, "
            f"{concepts} concepts"
        )
    chunks = triton.cdiv(places, shape["BLOCK_P"])
    scores = image_output.new_empty(rows, concepts, tokens, dtype=torch.float32)
    mean = image_output.new_empty(rows, heads, frames, chunks, width, dtype=torch.float32)
    m2 = torch.empty_like(mean)
    with torch.cuda.device_of(image_output):
        image_epilogue_kernel[(chunks, frames, rows)](
            concept_output,
            image_output,
            head_weights.contiguous(),
            scores,
            mean,
            m2,
            concepts,
            places,
            frames,
            heads,
            *concept_output.stride()[:3],
            *image_output.stride()[:3],
            **shape,
        )
        mean, m2 = merge_moments(mean, m2, places, shape["BLOCK_P"], chunks)
    return scores, *center_frames(image_output, mean, m2)
