"""Attention that is cut between the frames of a video (DiffTrack, arXiv 2506.17220, section 5)."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

__all__ = ["MODES", "within_frames"]

MODES = ("zero", "renorm")
"""What becomes of the attention to other frames: its probabilities are set to 0 ("zero"), as the official code does
with classifier-free guidance, or those that are left are scaled to 1 again ("renorm"), as it does without."""


def within_frames(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    start: int,
    frames: int,
    size: int,
    mode: str,
    mask: torch.Tensor | None = None,
    linear: bool = False,
) -> torch.Tensor:
    """Attention in which the tokens of a frame see none of other frames; all other tokens see everything.

    With `A` the keys that a token may see, "renorm" is its softmax attention to `A`, and "zero" that times
    `exp(logsumexp_A - logsumexp_all)`: its softmax attention to all keys with the values outside of `A` set to 0,
    which is how it is computed.

    Args:
        query: `[batch, H, S, D]`.
        key: likewise.
        value: likewise.
        start: of the frames' tokens.
        frames: their number.
        size: tokens of a frame.
        mode: one of `MODES`.
        mask: of the model's own attention, see `PassListener.restrict`.
        linear: see `PassListener.restrict`; the mode is "zero" then.

    Returns:
        `[batch, H, S, D]`.
    """
    attend = _attend_linearly if linear else _attend
    output = torch.empty_like(value)
    stop = start + frames * size
    for others in (slice(0, start), slice(stop, query.shape[2])):
        if others.stop > others.start:
            output[:, :, others] = attend(query[:, :, others], key, value, _rows_of(mask, others))
    kept = value.clone()
    kept[:, :, start:stop] = 0
    for first in range(start, stop, size):
        own = slice(first, first + size)
        rows = _rows_of(mask, own)
        if mode == "zero":
            kept[:, :, own] = value[:, :, own]
            output[:, :, own] = attend(query[:, :, own], key, kept, rows)
            kept[:, :, own] = 0
        else:
            seen, columns = (partial(_without_others, own=own, start=start, stop=stop, dim=dim) for dim in (2, -1))
            output[:, :, own] = attend(
                query[:, :, own], seen(key), seen(value), None if rows is None else columns(rows)
            )
    return output


def _rows_of(mask: torch.Tensor | None, tokens: slice) -> torch.Tensor | None:
    """The mask of some queries; one row may stand for all of them."""
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., tokens, :]


def _without_others(tensor: torch.Tensor, *, own: slice, start: int, stop: int, dim: int) -> torch.Tensor:
    """Of the frames `start` to `stop` only the own one, and everything around them."""
    places = (slice(0, start), own, slice(stop, tensor.shape[dim]))
    return torch.cat([tensor.narrow(dim, place.start, place.stop - place.start) for place in places], dim=dim)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _attend_linearly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    assert mask is None  # no model has both
    return query @ (key.mT @ value)
