"""Scores of how a map ranks pixels or frames; none changes when the map is transformed monotonically."""

from __future__ import annotations

import torch


def average_precision(scores: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Area under the precision-recall steps, equal scores being one threshold: scikit-learn's definition.

    Chance is the share of positives.

    Args:
        scores: float64 `[..., n]`.
        positives: bool `[..., n]`.

    Returns:
        float64 `[...]`; NaN where nothing is positive.
    """
    found, last = _thresholds(scores, positives)
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    kept = torch.where(last, found, 0).cummax(-1).values
    newly = kept.diff(dim=-1, prepend=torch.zeros_like(kept[..., :1]))
    return (found / rank * newly).sum(-1) / positives.sum(-1)


def best_iou(scores: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """The largest IoU that any threshold of the map reaches.

    Chance is the share of positives or a little more: it is what predicting everything reaches.

    Args:
        scores: float64 `[..., n]`.
        positives: bool `[..., n]`.

    Returns:
        float64 `[...]`; NaN where nothing is positive.
    """
    found, last = _thresholds(scores, positives)
    total = positives.sum(-1)
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    iou = torch.where(last, found / (rank + total[..., None] - found), 0.0).amax(-1)
    return torch.where(total > 0, iou, torch.nan)


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
    """By descending score: positives found so far (float64), and whether the next score is another one."""
    values, order = scores.sort(-1, descending=True)
    found = positives.gather(-1, order).double().cumsum(-1)
    last = torch.ones_like(values, dtype=torch.bool)
    last[..., :-1] = values[..., 1:] != values[..., :-1]
    return found, last
