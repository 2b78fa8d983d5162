"""Temporal matching: the token of every target frame that a query token attends to, averaged over heads.

The weights are those of DiffTrack (arXiv 2506.17220); how they are computed, `_matching` says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from ._columns import same_device
from ._common import LOG2E, check_last_axis, head_shape, runnable, split
from ._matching import log_sum_kernel, match_kernel, window_kernel

__all__ = ["launch_shape", "supports", "temporal_matching"]

LAUNCHES = {
    # (bytes of an element, padded head width): (BLOCK_Q, BLOCK_P, num_warps, num_stages) of every kernel
    (2, 32): (64, 64, 4, 3),
    (2, 64): (64, 64, 4, 3),
    (2, 128): (64, 64, 4, 3),
    (2, 256): (64, 32, 4, 3),
    (4, 32): (64, 32, 4, 2),
    (4, 64): (64, 32, 4, 2),  # wider heads of float32 spill registers
}
DIRECTIONS = ("both", "forward", "backward")
Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def launch_shape(dtype: torch.dtype, head_width: int) -> dict[str, Any] | None:
    """Constants and options of the kernels in `_matching`; None where they are not enabled."""
    shape = head_shape(dtype, head_width)
    launch = LAUNCHES.get((dtype.itemsize, shape["BLOCK_D"]))
    if launch is None or head_width % 8 or (head_width % 16 and shape["BLOCK_D"] > 64):
        return None
    block_q, block_p, num_warps, num_stages = launch
    if head_width % 16:  # rows that are not aligned are read number by number, which takes registers
        block_p, num_warps, num_stages = block_p // 2, 8, 1
    return {**shape, "BLOCK_Q": block_q, "BLOCK_P": block_p, "num_warps": num_warps, "num_stages": num_stages}


def enabled_shape(query: torch.Tensor) -> dict[str, Any]:
    """`launch_shape` for a tensor `[R, H, N, D]`.

    Raises:
        ValueError: there is none.
    """
    shape = launch_shape(query.dtype, query.shape[3])
    if shape is None:
        raise ValueError(f"matching is not enabled for {query.dtype} and head width {query.shape[3]}")
    return shape


def supports(
    source_query: torch.Tensor,
    source_key: torch.Tensor,
    target_query: torch.Tensor,
    target_key: torch.Tensor,
    tokens: torch.Tensor,
    head_weights: torch.Tensor,
    frames: int,
    width: int,
    scale: float,
    direction: str,
    radius: int,
) -> bool:
    """Whether `temporal_matching` is enabled for these arguments."""
    enabled = launch_shape(source_query.dtype, source_query.shape[3]) is not None
    same = same_device(source_query, tokens, head_weights)
    return enabled and same and runnable(source_query, source_key, target_query, target_key)


def temporal_matching(
    source_query: torch.Tensor,
    source_key: torch.Tensor,
    target_query: torch.Tensor,
    target_key: torch.Tensor,
    tokens: torch.Tensor,
    head_weights: torch.Tensor,
    frames: int,
    width: int,
    scale: float,
    direction: str,
    radius: int,
) -> Four:
    """Match tokens of one frame, the source, with the tokens of others (DiffTrack, arXiv 2506.17220).

    In a head, the forward weight of query i and target j is the probability of key j for query i among the keys of
    j's frame; the backward weight is the probability of key i for query j among the keys of the source.

    Args:
        source_query: `[R, H, S, D]`; not read backward.
        source_key: `[R, H, S, D]`; not read forward.
        target_query: `[R, H, F * P, D]`; not read forward.
        target_key: `[R, H, F * P, D]`; not read backward.
        tokens: int64 `[R, Q]`, which of the S tokens.
        head_weights: float32 `[R, H]`, not negative; heads of weight 0 are not read.
        frames: F.
        width: tokens in a line of a target frame; it divides P.
        scale: factor of the logits, `D**-0.5` in attention.
        direction: "forward", "backward", or "both" for their mean.
        radius: of the window, in tokens.

    Returns:
        Of the weighted sum over heads, all `[R, Q, F]`: int64 index of the largest weight in its frame, the lowest on
        ties; float32 that weight; and float32 entropy, in nats, of the weights of the frame relative to their sum.
        Then float32 position `[R, Q, F, 2]`, (x, y) in tokens: the mean, by weight, of the tokens of a window around
        the index, as large as `radius` and the frame allow it to be in both senses of an axis, so that the border
        draws nothing inward.

    Raises:
        ValueError: an argument is not as described, or the kernels are not enabled for the dtype and D.
    """
    tensors = (source_query, source_key, target_query, target_key)
    _check(tensors, head_weights, frames, width, direction, radius)
    (rows, heads), queries, targets = head_weights.shape, tokens.shape[1], target_key.shape[2] // frames
    tokens, weights = tokens.contiguous(), head_weights.float().contiguous()
    forward = torch.empty(rows, heads, frames, queries, device=tokens.device)
    backward = torch.empty(rows, heads, 1, frames * targets, device=tokens.device)
    directions = {"FORWARD": direction != "backward", "BACKWARD": direction != "forward"}
    with torch.cuda.device_of(source_query):
        if directions["FORWARD"]:
            log_sums(forward, source_query, tokens, target_key, None, weights, scale)
        if directions["BACKWARD"]:
            log_sums(backward, target_query, None, source_key, None, weights, scale)
        if direction == "both":
            weights = weights / 2
        arguments = {**tile_arguments(tensors, tokens, forward, backward, weights, frames, scale), **directions}
        index, value, entropy = _match(arguments, rows)
        position = torch.stack([index % width, index // width], dim=-1).float()
        if radius:
            position += _offset(arguments, index, width, radius)
    index, value, entropy = (result.transpose(1, 2).contiguous() for result in (index, value, entropy))
    return index.long(), value, entropy, position.transpose(1, 2).contiguous()


def _check(tensors: Four, head_weights: torch.Tensor, frames: int, width: int, direction: str, radius: int) -> None:
    """Refuse what the kernels would misread.

    Raises:
        ValueError: as `temporal_matching` says.
    """
    names = ("source_query", "source_key", "target_query", "target_key")
    check_last_axis(**dict(zip(names, tensors)))
    enabled_shape(tensors[0])
    rows, heads, _, head_width = tensors[0].shape
    for name, tensor, tokens in zip(names, tensors, (tensors[0].shape[2],) * 2 + (tensors[3].shape[2],) * 2):
        if tensor.shape != (rows, heads, tokens, head_width):
            raise ValueError(f"{name} is {tuple(tensor.shape)}; expected {(rows, heads, tokens, head_width)}")
    if head_weights.shape != (rows, heads):
        raise ValueError(f"head_weights is {tuple(head_weights.shape)}; expected {(rows, heads)}")
    targets = tensors[3].shape[2]
    if frames < 1 or width < 1 or not targets or targets % (frames * width):
        raise ValueError(f"{targets} target tokens are not {frames} frames of lines of {width}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; expected one of {', '.join(DIRECTIONS)}")
    if radius < 0:
        raise ValueError(f"radius is {radius}; expected 0 or more")


def log_sums(
    out: torch.Tensor,
    query: torch.Tensor,
    tokens: torch.Tensor | None,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    weights: torch.Tensor,
    scale: float,
) -> None:
    """Fill `out` with the log-sum-exp, to the base 2, over each of F equal runs of keys.

    Args:
        out: float32 `[R, H, F, Q]`, its last axis contiguous.
        query: `[R, H, N, D]`.
        tokens: `[R, Q]`, which of the N queries; None is all.
        key: `[R, H, F * P, D]`.
        mask: bool `[R, P]`, False where a key does not count, with F = 1; None counts all.
        weights: `[R, H]`; a head of weight 0 is not read, and its sums are 0.
        scale: factor of the logits.
    """
    rows, heads, frames, queries = out.shape
    shape = enabled_shape(query)
    log_sum_kernel[(triton.cdiv(queries, shape["BLOCK_Q"]), frames, rows * heads)](
        query,
        key,
        weights if tokens is None else tokens,
        weights if mask is None else mask,
        weights,
        out,
        queries,
        key.shape[2] // frames,
        heads,
        scale * LOG2E,
        *query.stride()[:3],
        *key.stride()[:3],
        *out.stride()[:3],
        GATHERED=tokens is not None,
        MASKED=mask is not None,
        **shape,
    )


def tile_arguments(
    tensors: Four,
    tokens: torch.Tensor,
    forward: torch.Tensor,
    backward: torch.Tensor,
    weights: torch.Tensor,
    frames: int,
    scale: float,
) -> dict[str, Any]:
    """What `match_kernel` and `window_kernel` both take, by name.

    Args:
        tensors: query and key of the source, query and key of the targets.
        tokens: `[R, Q]`.
        forward: `[R, H, F, Q]`, log-sum-exp of the queries; its stride of frames may be 0.
        backward: `[R, H, 1, F * P]`, log-sum-exp of the targets, contiguous.
        weights: `[R, H]`.
        frames: F.
        scale: factor of the logits.
    """
    shape = enabled_shape(tensors[0])
    (rows, heads), queries, targets = weights.shape, tokens.shape[1], tensors[3].shape[2] // frames
    splits, span = split(targets, shape["BLOCK_P"], rows * frames * triton.cdiv(queries, shape["BLOCK_Q"]))
    arguments: dict[str, Any] = {}
    for name, tensor in zip(("source_query", "source_key", "target_query", "target_key"), tensors):
        arguments[f"{name}_ptr"] = tensor
        arguments.update(zip((f"{name}_row", f"{name}_head", f"{name}_token"), tensor.stride()))
    arguments.update(zip(("forward_row", "forward_head", "forward_frame"), forward.stride()))
    return {
        **arguments,
        "tokens_ptr": tokens,
        "forward_ptr": forward,
        "backward_ptr": backward,
        "chosen_ptr": (weights == 0).byte().argsort(dim=1, stable=True),
        "count_ptr": (weights != 0).sum(1),
        "weights_ptr": weights,
        "queries": queries,
        "targets": targets,
        "frames": frames,
        "heads": heads,
        "splits": splits,
        "span": span,
        "scale": scale * LOG2E,
        **shape,
    }


def tile_grid(arguments: dict[str, Any], rows: int) -> tuple[int, int, int]:
    """Programs of `match_kernel` and `window_kernel`."""
    blocks: int = triton.cdiv(arguments["queries"], arguments["BLOCK_Q"])
    return blocks * arguments["splits"], arguments["frames"], rows


def partial_sums(arguments: dict[str, Any], rows: int, count: int) -> list[torch.Tensor]:
    """`count` empty float32 tensors `[R, F, splits, Q]`."""
    size = (rows, arguments["frames"], arguments["splits"], arguments["queries"])
    return [torch.empty(size, device=arguments["tokens_ptr"].device) for _ in range(count)]


def _match(arguments: dict[str, Any], rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index (int32), value and entropy `[R, F, Q]`."""
    value, mass, surprise = partial_sums(arguments, rows, 3)
    index = torch.empty_like(value, dtype=torch.int32)
    match_kernel[tile_grid(arguments, rows)](
        index_ptr=index,
        value_ptr=value,
        mass_ptr=mass,
        surprise_ptr=surprise,
        mask_ptr=value,
        MASKED=False,
        MAXIMUM_ONLY=False,
        **arguments,
    )
    best = value.argmax(2, keepdim=True)  # the first on ties, so the lowest index
    mass, surprise = mass.sum(2), surprise.sum(2)
    entropy = torch.where(mass > 0, mass.log() - surprise / (mass * LOG2E), math.log(arguments["targets"]))
    return index.gather(2, best).squeeze(2), value.gather(2, best).squeeze(2), entropy.clamp_min(0)


def _offset(arguments: dict[str, Any], index: torch.Tensor, width: int, radius: int) -> torch.Tensor:
    """From the index to the position, `[R, F, Q, 2]`."""
    mass, right, down = partial_sums(arguments, len(index), 3)
    window_kernel[tile_grid(arguments, len(index))](
        index_ptr=index, mass_ptr=mass, right_ptr=right, down_ptr=down, width=width, radius=radius, **arguments
    )
    mass = mass.sum(2)
    offset = torch.stack([right.sum(2), down.sum(2)], dim=-1)
    return torch.where(mass[..., None] > 0, offset / mass[..., None], 0.0)
