"""Correlation of two lists of numbers, and how often shuffled pairs have as much of it."""

from __future__ import annotations

from typing import Any

import torch

COLUMNS = ("n", "pearson", "pearson_p", "spearman", "spearman_p")
"""Columns of a row of `correlate`."""


def correlate(first: torch.Tensor, second: torch.Tensor) -> list[Any]:
    """The values of `COLUMNS` for two tensors of one shape; pairs that are not finite are left out."""
    a, b = _finite(first, second)
    rank_a, rank_b = ranks(a), ranks(b)
    return [
        len(a),
        pearson(a, b),
        permutation_p(a, b),
        pearson(rank_a, rank_b),
        permutation_p(rank_a, rank_b),
    ]


def tell(row: list[Any]) -> str:
    """A row of `correlate` in words."""
    count, *values = row
    if None in values:
        return f"not correlated, because one side is constant or has fewer than three values, n = {count}"
    r, r_p, rho, rho_p = values
    return f"Pearson {r:.3f} (p {r_p:.2g}), Spearman {rho:.3f} (p {rho_p:.2g}), n = {count}"


def pearson(first: torch.Tensor, second: torch.Tensor) -> float | None:
    """Pearson's correlation of the pairs that are finite.

    Args:
        first: `[n]`.
        second: `[n]`.

    Returns:
        -1 to 1; None for fewer than three pairs, or where one side is constant.
    """
    a, b = _finite(first, second)
    if not _varied(a, b):
        return None
    return float((_unit(a) @ _unit(b)).clamp(-1, 1))


def spearman(first: torch.Tensor, second: torch.Tensor) -> float | None:
    """Spearman's correlation: Pearson's of the ranks, equal values sharing the mean of theirs; otherwise likewise."""
    a, b = _finite(first, second)
    return pearson(ranks(a), ranks(b))


def permutation_p(first: torch.Tensor, second: torch.Tensor, *, draws: int = 5000, seed: int = 0) -> float | None:
    """How often shuffled pairs correlate as much as the pairs do, of either sign, these themselves counted in.

    Args:
        first: `[n]`.
        second: `[n]`; ranks for Spearman's correlation.
        draws: number of shuffles.
        seed: of the shuffles.

    Returns:
        `1 / (draws + 1)` to 1, the p-value of independent pairs; None where the correlation is not defined.
    """
    a, b = _finite(first, second)
    if not _varied(a, b):
        return None
    generator = torch.Generator().manual_seed(seed)
    orders = torch.rand(draws, len(b), generator=generator).argsort(1)
    found, shuffled = _unit(a) @ _unit(b), _unit(b)[orders] @ _unit(a)
    return float(((shuffled.abs() >= found.abs() - 1e-12).sum() + 1) / (draws + 1))


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 1 `[n]`, float64; equal values share the mean of theirs."""
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    middle: torch.Tensor = count.cumsum(0).double() - (count - 1) / 2
    return middle[place]


def _varied(a: torch.Tensor, b: torch.Tensor) -> bool:
    return len(a) >= 3 and not bool((a == a[0]).all()) and not bool((b == b[0]).all())


def _unit(values: torch.Tensor) -> torch.Tensor:
    centered = values - values.mean()
    scaled: torch.Tensor = centered / centered.norm()
    return scaled


def _finite(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = first.double().flatten(), second.double().flatten()
    kept = a.isfinite() & b.isfinite()
    return a[kept], b[kept]
