"""Scores of rankings, against scikit-learn and against definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, jaccard_score, roc_auc_score

from diffusers_concept_maps.evaluation.ranking import average_precision, best_iou, concordance

few_values = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30)


def split(pairs: list[tuple[int, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
    scores, positives = zip(*pairs, strict=True)
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(positives)


def same(actual: torch.Tensor, expected: float) -> None:
    assert float(actual) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_average_precision_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(size=(20, 50)), rng.integers(3, size=(20, 50)).astype(float)])
    positives = rng.random((40, 50)) < 0.2
    positives[:, 0] = True
    for y, s in zip(positives, scores, strict=True):
        same(average_precision(torch.from_numpy(s), torch.from_numpy(y)), average_precision_score(y, s))


@given(few_values)
def test_ties_and_edges_are_those_of_scikit_learn(pairs: list[tuple[int, bool]]) -> None:
    scores, positives = split(pairs)
    expected = average_precision_score(positives, scores) if positives.any() else math.nan
    same(average_precision(scores, positives), expected)
    two = positives.any() and not positives.all()
    same(concordance(scores, positives.double()), roc_auc_score(positives, scores) if two else math.nan)


@given(few_values)
def test_best_iou_is_the_best_of_all_thresholds(pairs: list[tuple[int, bool]]) -> None:
    scores, positives = split(pairs)
    if not positives.any():
        assert best_iou(scores, positives) == 0
        return
    same(best_iou(scores, positives), max(jaccard_score(positives, scores >= value) for value in scores.unique()))


@settings(max_examples=50)
@given(few_values, st.randoms(use_true_random=False))
def test_order_and_monotone_transforms_are_no_matter(pairs: list[tuple[int, bool]], random: object) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    scores, positives = split(pairs)
    others, theirs = split(shuffled)
    for score in (average_precision, best_iou):
        same(score(others.exp() - 7, theirs), float(score(scores, positives)))
    same(concordance(others.exp(), theirs.double()), float(concordance(scores, positives.double())))


def test_concordance_of_amounts() -> None:
    """Pairs by hand: (1, 2) right, (1, 3) tied, (2, 3) wrong; the equal amounts of 3 and 3 are no pair."""
    scores = torch.tensor([1.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    amounts = torch.tensor([1.0, 2.0, 3.0, 3.0], dtype=torch.float64)
    same(concordance(scores, amounts), (1 + 0.5 + 0.5 + 0 + 0) / 5)


def test_nothing_at_all_is_not_defined() -> None:
    nothing = torch.zeros(0, dtype=torch.float64)
    assert average_precision(nothing, nothing.bool()).isnan()
    assert concordance(nothing, nothing).isnan()
