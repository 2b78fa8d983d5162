"""Scores of maps of kept axes against the masks, beside controls that know nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusers_concept_maps.evaluation.analysis._base import Settings, mean, number
from diffusers_concept_maps.evaluation.analysis._subjects import Subject
from diffusers_concept_maps.evaluation.ranking import average_precision, concordance
from diffusers_concept_maps.evaluation.segmentation import count_pixels
from diffusers_concept_maps.maps import ConceptMaps
from diffusers_concept_maps.shapes.suite.scores import bootstrap_interval
from diffusers_concept_maps.upsample import upsample_map

COLUMNS = ("n", "score", "low", "high", "wrong_concept", "shuffled_masks", "chance")
"""Columns of a row of `summarize`."""


class Scored(NamedTuple):
    """Scores along the kept axes, float64, NaN where one is not defined.

    Attributes:
        target: of the target's map.
        wrong: of the wrong concept's map, against the same mask.
        shuffled: of the target's map, against the mask with its pixels (for a score in time: its frames) shuffled.
        chance: the chance level, where the score has one of its own.
    """

    target: torch.Tensor
    wrong: torch.Tensor
    shuffled: torch.Tensor
    chance: torch.Tensor


def score_detail(maps: ConceptMaps, subject: Subject, settings: Settings) -> Scored:
    """Score the maps of every place along the kept axes.

    Args:
        maps: of `Settings.read` with `detail`.
        subject: the clip that they are of.
        settings: with the score.

    Returns:
        Scores `[*kept]`.
    """
    fit = maps.fit
    assert fit is not None  # `encode` has made them
    tensor = maps.detail()  # [*kept, row, concept, frame, height, width]
    kept = tensor.shape[:-5]
    labels = subject.labels[: fit.covered]
    mixed = _shuffled(labels, settings)
    size, rows = (fit.source[1], fit.source[2]), []
    for one in tensor.reshape(-1, *tensor.shape[-4:])[:, :2]:
        pair = upsample_map(one.double(), size, fit.covered, mode="nearest", padding=fit.padding, **maps.geometry)
        right = score_map(pair[0], labels, settings.score)
        wrong = score_map(pair[1], labels, settings.score)[0]
        rows.append((right[0], wrong, score_map(pair[0], mixed, settings.score)[0], right[1]))
    return Scored(*(torch.tensor(column, dtype=torch.float64).view(kept) for column in zip(*rows, strict=True)))


def score_map(heat: torch.Tensor, labels: torch.Tensor, score: str) -> tuple[float, float]:
    """One score of one map.

    Args:
        heat: float64 `[frame, height, width]`, NaN throughout where nothing was recorded.
        labels: int64 of that shape: 1, 0, or -1 for what is not scored.
        score: one of `SCORES`.

    Returns:
        The score and its chance level; NaN where one is not defined.
    """
    scored, mask = labels >= 0, labels == 1
    if not bool(heat.isfinite().all()) or not bool(mask.any()):
        return math.nan, math.nan
    if score == "average_precision":
        return float(average_precision(heat[scored], mask[scored])), float(mask[scored].double().mean())
    if score == "temporal_concordance":
        kept = scored.flatten(1).any(1)
        activity = (heat * scored).flatten(1).sum(1)[kept] / scored.flatten(1).sum(1)[kept]
        return float(concordance(activity, mask.flatten(1).any(1)[kept].double())), 0.5
    return _mean_iou(heat, labels)


def _mean_iou(heat: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Mean IoU of the two classes, and what a mask of as many pixels anywhere has."""
    guess = (heat > heat.mean()).long()
    counts = count_pixels(guess, labels, 2)
    pairs = zip(counts["intersection"], counts["union"], strict=True)
    found = [both / either for both, either in pairs if either]
    scored = labels >= 0
    covered, predicted = float((labels == 1)[scored].double().mean()), float(guess[scored].double().mean())
    by_chance = []
    for share, claimed in ((covered, predicted), (1 - covered, 1 - predicted)):
        either = share + claimed - share * claimed
        by_chance += [share * claimed / either] if either else []
    return sum(found) / len(found), sum(by_chance) / len(by_chance)


def _shuffled(labels: torch.Tensor, settings: Settings) -> torch.Tensor:
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.score == "temporal_concordance":
        return labels[torch.randperm(len(labels), generator=generator)]
    return labels.flatten()[torch.randperm(labels.numel(), generator=generator)].view(labels.shape)


def stack(scored: list[Scored]) -> Scored:
    """The scores of all clips `[clip, *kept]`."""
    return Scored(*(torch.stack(list(column)) for column in zip(*scored, strict=True)))


def tell_best(rows: Sequence[Sequence[Any]], named: Sequence[str]) -> list[str]:
    """The row with the highest score, in words.

    Args:
        rows: what names the place, then the values of `COLUMNS`.
        named: the columns of the former.
    """
    at = len(named)
    best = max(rows, key=lambda row: -math.inf if row[at + 1] is None else row[at + 1])
    values = zip(COLUMNS[1:], best[at + 1 :], strict=True)
    return [
        f"best of {len(rows)}: " + ", ".join(f"{name} {value}" for name, value in zip(named, best, strict=False)),
        f"over {best[at]} clips: " + ", ".join(f"{name} {value:.3f}" for name, value in values if value is not None),
        "it is chosen on the clips that it is scored on, so its score is too good; choose on one part, report another",
    ]


def summarize(scored: Scored, place: tuple[int, ...]) -> list[Any]:
    """The values of `COLUMNS` of one place, over the clips that define its score.

    Args:
        scored: of `stack`.
        place: index along the kept axes.

    Returns:
        Number of clips, mean score, its 95% bootstrap interval over clips, means of the controls, mean chance level.
    """
    at: tuple[slice | int, ...] = (slice(None), *place)
    values = scored.target[at]
    values = values[values.isfinite()]
    controls = [number(mean(column[at])) for column in scored[1:]]
    if not len(values):
        return [0, None, None, None, *controls]
    low, high = bootstrap_interval(np.asarray(values))
    return [len(values), number(mean(values)), low, high, *controls]
