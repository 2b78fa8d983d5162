"""Correlations against scipy, with ties, and what has none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from diffusers_concept_maps.evaluation.analysis._correlation import (
    correlate,
    pearson,
    permutation_p,
    ranks,
    spearman,
    tell,
)


@given(seed=st.integers(0, 10_000), count=st.integers(3, 60), levels=st.integers(2, 30))
def test_both_are_scipys(seed: int, count: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    first = rng.integers(levels, size=count).astype(float)  # whole numbers tie
    second = first * rng.normal() + rng.normal(size=count)
    first[:2], second[:2] = (0, 1), (2, 3)  # neither side is constant
    a, b = torch.from_numpy(first), torch.from_numpy(second)
    assert pearson(a, b) == pytest.approx(stats.pearsonr(first, second).statistic, abs=1e-12)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)
    assert np.array_equal(ranks(a).numpy(), stats.rankdata(first))


def test_what_is_not_finite_is_left_out() -> None:
    first = torch.tensor([1.0, 2.0, torch.nan, 4.0, 7.0, 3.0])
    second = torch.tensor([2.0, 1.0, 5.0, 3.0, torch.inf, 8.0])
    row = correlate(first, second)
    assert row[0] == 4
    assert row[1] == pytest.approx(stats.pearsonr([1, 2, 4, 3], [2, 1, 3, 8]).statistic, abs=1e-12)
    assert row[3] == pytest.approx(stats.spearmanr([1, 2, 4, 3], [2, 1, 3, 8]).statistic, abs=1e-12)


@pytest.mark.parametrize(("first", "second"), [([1.0, 2.0], [2.0, 1.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([], [])])
def test_too_few_or_constant_has_none(first: list[float], second: list[float]) -> None:
    assert correlate(torch.tensor(first), torch.tensor(second)) == [len(first), None, None, None, None]


def test_p_is_that_of_every_permutation_of_few_pairs() -> None:
    first, second = np.array([1.0, 2.0, 3.0, 4.0, 6.0]), np.array([1.0, 3.0, 2.5, 4.0, 4.5])
    exact = stats.permutation_test(
        (first,),
        lambda order: abs(stats.pearsonr(order, second).statistic),
        permutation_type="pairings",
        alternative="greater",
        n_resamples=10_000,
    ).pvalue
    found = permutation_p(torch.from_numpy(first), torch.from_numpy(second))
    assert found == pytest.approx(exact, abs=0.015)  # four deviations of a share of 5000 draws


def test_p_of_what_is_independent_is_even() -> None:
    rng = np.random.default_rng(1)
    found = [
        permutation_p(torch.from_numpy(rng.normal(size=12)), torch.from_numpy(rng.normal(size=12)), draws=200)
        for _ in range(200)
    ]
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_a_row_is_told() -> None:
    assert tell([20, -0.5, 0.0123, 0.25, 0.3]) == "Pearson -0.500 (p 0.012), Spearman 0.250 (p 0.3), n = 20"
    assert tell([2, None, None, None, None]).startswith("not correlated, because one side is constant")
