"""Segment attention: how much of a query's joint attention goes to the text and to each frame, averaged over heads."""

from __future__ import annotations

import torch

from ._columns import same_device
from ._common import check_last_axis, runnable
from ._matching import match_kernel
from .temporal_matching import enabled_shape, launch_shape, log_sums, partial_sums, tile_arguments, tile_grid

__all__ = ["segment_attention", "supports"]


def supports(
    image_query: torch.Tensor,
    tokens: torch.Tensor,
    text_key: torch.Tensor,
    image_key: torch.Tensor,
    text_mask: torch.Tensor | None,
    head_weights: torch.Tensor,
    frames: int,
    scale: float,
) -> bool:
    """Whether `segment_attention` is enabled for these arguments."""
    enabled = launch_shape(image_query.dtype, image_query.shape[3]) is not None
    same = same_device(image_query, tokens, text_mask, head_weights)
    return enabled and same and runnable(image_query, text_key, image_key)


def segment_attention(
    image_query: torch.Tensor,
    tokens: torch.Tensor,
    text_key: torch.Tensor,
    image_key: torch.Tensor,
    text_mask: torch.Tensor | None,
    head_weights: torch.Tensor,
    frames: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and maxima of attention over the text and over each frame (DiffTrack, arXiv 2506.17220).

    Args:
        image_query: `[R, H, N, D]`.
        tokens: int64 `[R, Q]`, which of the N tokens.
        text_key: `[R, H, T, D]`; T may be 0.
        image_key: `[R, H, F * P, D]`.
        text_mask: bool `[R, T]`, False where a text key is padding; None for no padding.
        head_weights: float32 `[R, H]`; heads of weight 0 are not read.
        frames: F.
        scale: factor of the logits, `D**-0.5` in attention.

    Returns:
        Sum and maximum, float32 `[R, Q, 1 + F]`, of the weighted sum over heads of the probabilities of one softmax
        over all keys: first over the text (0 where there is none), then over every frame.

    Raises:
        ValueError: an argument is not as described, or the kernels are not enabled for the dtype and D.
    """
    _check(image_query, text_key, image_key, text_mask, head_weights, frames)
    rows, heads, length, _ = text_key.shape
    tokens, weights = tokens.contiguous(), head_weights.float().contiguous()
    segments = torch.empty(rows, heads, 1 + frames, tokens.shape[1], device=tokens.device)
    mask = None if text_mask is None else text_mask.contiguous()
    with torch.cuda.device_of(image_query):
        if length:
            log_sums(segments[:, :, :1], image_query, tokens, text_key, mask, weights, scale)
        else:
            segments[:, :, 0] = float("-inf")
        log_sums(segments[:, :, 1:], image_query, tokens, image_key, None, weights, scale)
        highest = segments.amax(2, keepdim=True)
        total = highest + (segments - highest).exp2().sum(2, keepdim=True).log2()  # [R, H, 1, Q]
        sums = (weights[:, :, None, None] * (segments - total).exp2()).sum(1)
        text = _maxima(image_query, tokens, text_key, mask, weights, total, 1, scale) if length else sums[:, :1]
        image = _maxima(image_query, tokens, image_key, None, weights, total, frames, scale)
    maxima = torch.cat([text, image], dim=1)
    return sums.transpose(1, 2).contiguous(), maxima.transpose(1, 2).contiguous()


def _maxima(
    query: torch.Tensor,
    tokens: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    weights: torch.Tensor,
    total: torch.Tensor,
    frames: int,
    scale: float,
) -> torch.Tensor:
    """Largest probability among each of F equal runs of keys, `[R, F, Q]`."""
    log_sum = total.expand(-1, -1, frames, -1)
    arguments = tile_arguments((query, query, key, key), tokens, log_sum, total, weights, frames, scale)
    (value,) = partial_sums(arguments, len(query), 1)
    match_kernel[tile_grid(arguments, len(query))](
        index_ptr=value,
        value_ptr=value,
        mass_ptr=value,
        surprise_ptr=value,
        mask_ptr=value if mask is None else mask,
        FORWARD=True,
        BACKWARD=False,
        MASKED=mask is not None,
        MAXIMUM_ONLY=True,
        **arguments,
    )
    return value.amax(2)


def _check(
    image_query: torch.Tensor,
    text_key: torch.Tensor,
    image_key: torch.Tensor,
    text_mask: torch.Tensor | None,
    head_weights: torch.Tensor,
    frames: int,
) -> None:
    check_last_axis(image_query=image_query, text_key=text_key, image_key=image_key)
    rows, heads, _, width = image_query.shape
    enabled_shape(image_query)
    for name, key in (("text_key", text_key), ("image_key", image_key)):
        if key.shape != (rows, heads, key.shape[2], width):
            raise ValueError(f"{name} is {tuple(key.shape)}; expected {(rows, heads, key.shape[2], width)}")
    if head_weights.shape != (rows, heads):
        raise ValueError(f"head_weights is {tuple(head_weights.shape)}; expected {(rows, heads)}")
    if text_mask is not None and text_mask.shape != (rows, text_key.shape[2]):
        raise ValueError(f"text_mask is {tuple(text_mask.shape)}; expected {(rows, text_key.shape[2])}")
    if frames < 1 or not image_key.shape[2] or image_key.shape[2] % frames:
        raise ValueError(f"{image_key.shape[2]} image tokens are not {frames} equal frames")
