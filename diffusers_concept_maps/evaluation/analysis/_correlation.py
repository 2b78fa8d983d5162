"""Correlation of two lists of numbers."""

from __future__ import annotations

import torch


def pearson(first: torch.Tensor, second: torch.Tensor) -> float | None:
    """Pearson's correlation of the pairs that are finite.

    Args:
        first: `[n]`.
        second: `[n]`.

    Returns:
        -1 to 1; None for fewer than three pairs, or where one side is constant.
    """
    a, b = _finite(first, second)
    if len(a) < 3 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return None
    a, b = a - a.mean(), b - b.mean()
    return float(((a / a.norm()) @ (b / b.norm())).clamp(-1, 1))


def spearman(first: torch.Tensor, second: torch.Tensor) -> float | None:
    """Spearman's correlation: Pearson's of the ranks, equal values sharing the mean of theirs; otherwise likewise."""
    a, b = _finite(first, second)
    return pearson(ranks(a), ranks(b))


def pairs(first: torch.Tensor, second: torch.Tensor) -> int:
    """Number of pairs that are finite, which the correlations are of."""
    return len(_finite(first, second)[0])


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 1 `[n]`, float64; equal values share the mean of theirs."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[place]


def _finite(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = first.double().flatten(), second.double().flatten()
    kept = a.isfinite() & b.isfinite()
    return a[kept], b[kept]
