"""Attention in which some tokens of the text have other probabilities, without any array of queries times keys.

What becomes of a row of probabilities is always the same: one word gets another share of it, and whatever else there
is keeps its proportions, so that the row still sums to 1. That is a number per query, added to the logits of the
word's tokens, and as such a product of rank one: two more channels of query and key say it to any attention.
"""

from __future__ import annotations

import torch
from torch.nn import functional

_LARGEST = 1000.0
"""What a logit is changed by at most: `exp` of its opposite is 0 in every dtype, times any width it is in float16."""

_CHUNK = 2**24
"""Logits at a time, where they are counted."""


class AmendedAttention:
    """Attention of some queries, with biases that are collected one after the other."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Assign only.

        Args:
            query: `[R, H, Q, D]`.
            key: `[R, H, S, D]`.
            value: likewise.
            mask: of the model, broadcastable to `[R, H, Q, S]`: bool, True where a query sees a key, or a number to
                add to the logit.
        """
        self._query, self._key, self._value, self._mask = query, key, value, mask
        self._scale = query.shape[-1] ** -0.5
        self._exact = torch.promote_types(query.dtype, torch.float32)

    def add(self, bias: torch.Tensor, tokens: torch.Tensor) -> None:
        """Add to the logits of some keys.

        Args:
            bias: `[R, H, Q]` or what broadcasts to it; infinite ones are made large.
            tokens: which keys, bool `[R, S]`.
        """
        whole = bias.to(self._exact).nan_to_num(nan=0.0).clamp(-_LARGEST, _LARGEST) / self._scale
        whole = whole.expand(self._query.shape[:3])
        high = whole.to(self._query.dtype)
        low = (whole - high).to(self._query.dtype)  # what was rounded off of it
        self._query = torch.cat([self._query, high[..., None], low[..., None]], dim=-1)
        member = tokens.to(self._key.dtype)[:, None, :, None].expand(*self._key.shape[:3], 2)
        self._key = torch.cat([self._key, member], dim=-1)

    def log_odds(self, tokens: torch.Tensor) -> torch.Tensor:
        """The logit of the share that some keys have of every query's attention, all biases so far included.

        Args:
            tokens: which keys, bool `[R, S]`.

        Returns:
            `[R, H, Q]` of float32 or more.
        """
        rows, heads, queries, _ = self._query.shape
        chunk = max(_CHUNK // (rows * heads * self._key.shape[2]), 1)
        key, inside = self._key.to(self._exact).mT, tokens[:, None, None]
        odds = []
        for start in range(0, queries, chunk):
            own = slice(start, start + chunk)
            logits = (self._query[:, :, own].to(self._exact) @ key) * self._scale
            mask = _rows_of(self._mask, own)
            if mask is not None:
                logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
            word, rest = (logits.masked_fill(~which, -torch.inf).logsumexp(-1) for which in (inside, ~inside))
            odds.append(word - rest)
        return torch.cat(odds, dim=2)

    def attend(self, chosen: torch.Tensor) -> torch.Tensor:
        """The attention output `[R, H, chosen, D]` of the chosen queries, by their indices `[chosen]`."""
        width = self._value.shape[-1]
        padding = -self._query.shape[-1] % 8
        query = functional.pad(self._query.index_select(2, chosen), (0, padding))
        key = functional.pad(self._key, (0, padding))
        value = functional.pad(self._value, (0, query.shape[-1] - width))  # fast attention wants one width for all
        mask = self._mask
        if mask is not None and mask.shape[-2] > 1:
            mask = mask.index_select(-2, chosen)
        output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self._scale)
        return output[..., :width]


def _rows_of(mask: torch.Tensor | None, queries: slice) -> torch.Tensor | None:
    """The mask of some queries; one row may stand for all of them."""
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., queries, :]


def share_bias(share: torch.Tensor, wanted: torch.Tensor, log_odds: torch.Tensor) -> torch.Tensor:
    """What to add to the logits of a word so that it gets another share of the attention.

    Args:
        share: the share that it has, in 0..1.
        wanted: the share that it is to have, in 0..1.
        log_odds: the logit of the former, which says more of it where that is close to 0 or 1.
    """
    return torch.where(wanted == share, 0.0, wanted.logit() - log_odds)
