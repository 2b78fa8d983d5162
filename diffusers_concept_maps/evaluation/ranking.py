"""Scores of how a map ranks pixels or frames; none changes when the map is transformed monotonically."""

from __future__ import annotations

import torch


def average_precision(scores: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Area under the precision-recall steps, equal scores being one threshold: scikit-learn's definition.

    Chance is the share of positives.

    Args:
        scores: float64 `[n]`.
        positives: bool `[n]`.

    Returns:
        float64 scalar; NaN where nothing is positive.
    """
    found, predicted = _thresholds(scores, positives)
    newly = found.diff(prepend=found.new_zeros(1))
    return (found / predicted * newly).sum() / positives.sum()


def best_iou(scores: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """The largest IoU that any threshold of the map reaches.

    Chance is the share of positives or a little more: it is what predicting everything reaches.

    Args:
        scores: float64 `[n]`, n at least 1.
        positives: bool `[n]`.

    Returns:
        float64 scalar; 0 where nothing is positive.
    """
    found, predicted = _thresholds(scores, positives)
    return (found / (predicted + positives.sum() - found)).amax()


def concordance(scores: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """How often the one of two that has the larger amount has the larger score, equal scores counting one half.

    With amounts of 0 and 1 this is the area under the ROC curve. Chance is one half.

    Args:
        scores: float64 `[n]`.
        amounts: float64 `[n]`.

    Returns:
        float64 scalar; NaN where all amounts are equal.
    """
    larger = amounts[:, None] > amounts
    ahead = (scores[:, None] > scores).double() + (scores[:, None] == scores).double() / 2
    return (ahead * larger).sum() / larger.sum()


def _thresholds(scores: torch.Tensor, positives: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For every distinct score, descending: how many positives, and how many at all, have it or more (float64)."""
    values, order = scores.sort(descending=True)
    last = torch.ones_like(positives)
    last[:-1] = values[1:] != values[:-1]
    found = positives[order].cumsum(0)[last]
    return found.double(), last.nonzero()[:, 0].double() + 1
