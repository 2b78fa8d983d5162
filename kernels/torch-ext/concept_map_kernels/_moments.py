"""Mean and sum of squared deviations, of tiles in registers and of chunks in memory, without cancellation.

A tile is summed in two passes: its mean first, then the squares of what is left. Partial results are merged as Chan,
Golub and LeVeque do ("Algorithms for computing the sample variance", 1983). A sum of squares less the square of a sum
would have no correct digit where the mean is a thousand deviations from zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import LAUNCH, padded

BLOCK_S = 32


@triton.jit
def tile_moments(values, mask, count):
    """Mean and sum of squared deviations of every lane of `[lane, token]`, over the `count` tokens of the mask."""
    mean = tl.sum(tl.where(mask, values, 0.0), 1) / count
    deviation = tl.where(mask, values - mean[:, None], 0.0)
    return mean, tl.sum(deviation * deviation, 1)


@triton.jit
def merge(count, mean, m2, tile_count, tile_mean, tile_m2):
    """Count, mean and sum of squared deviations of two sets of tokens together."""
    total = count + tile_count
    delta = tile_mean - mean
    share = tile_count / total
    return total, mean + delta * share, m2 + tile_m2 + delta * delta * (count * share)


@triton.jit
def merge_moments_kernel(
    partial_mean_ptr,  # [G, S, L]
    partial_m2_ptr,  # [G, S, L]
    mean_ptr,  # [G, L]
    m2_ptr,  # [G, L]
    S,
    L,
    P,
    chunk,
    chunks,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Moments of the lanes of one group from those of its parts: part s is chunk `s % chunks` of P tokens."""
    group = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    l_mask = lane < L
    parts = group * S * L + lane
    # Deviations from the first part: parts of equal means have exactly that mean together.
    base = tl.load(partial_mean_ptr + parts, mask=l_mask, other=0.0)
    count = 0.0
    mean = tl.zeros((BLOCK_L,), tl.float32)
    m2 = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask = (s < S)[:, None] & l_mask[None, :]
        part_count = tl.where(s < S, tl.minimum(P - (s % chunks) * chunk, chunk), 0).to(tl.float32)
        part_mean = tl.load(partial_mean_ptr + parts[None, :] + s[:, None] * L, mask=mask, other=0.0) - base[None, :]
        part_m2 = tl.load(partial_m2_ptr + parts[None, :] + s[:, None] * L, mask=mask, other=0.0)
        block_count = tl.sum(part_count, 0)
        block_mean = tl.sum(part_mean * part_count[:, None], 0) / block_count
        delta = part_mean - block_mean[None, :]
        block_m2 = tl.sum(part_m2 + delta * delta * part_count[:, None], 0)
        count, mean, m2 = merge(count, mean, m2, block_count, block_mean, block_m2)
    tl.store(mean_ptr + group * L + lane, base + mean, mask=l_mask)
    tl.store(m2_ptr + group * L + lane, m2, mask=l_mask)


def merge_moments(
    mean: torch.Tensor, m2: torch.Tensor, tokens: int, chunk: int, chunks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the moments `[..., S, L]` of S parts, `chunks` of every `tokens` tokens, into `[..., L]`."""
    *groups, parts, lanes = mean.shape
    merged = mean.new_empty(*groups, lanes), mean.new_empty(*groups, lanes)
    block = min(64, padded(lanes))
    merge_moments_kernel[(merged[0].numel() // lanes, triton.cdiv(lanes, block))](
        mean, m2, *merged, parts, lanes, tokens, chunk, chunks, BLOCK_S=BLOCK_S, BLOCK_L=block, **LAUNCH
    )
    return merged
