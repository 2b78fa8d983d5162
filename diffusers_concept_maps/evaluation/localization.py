"""Motion localization: is the map of a motion where and when the masked motion is, sharp, and of its shape?

The four questions that IMAP (arXiv 2603.02919) puts to a judge, as numbers in 0..1 that need none; the answer to its
fifth, relevance to the prompt, is not in a mask. A map is scaled to 0..1 once over the clip: the paper's evaluation
scales every frame by itself, so that a map which is silent before the motion starts cannot be told from one which is
not. `parity="imap"` does as it does, thresholds included.

| score | what it is | chance |
|---|---|---|
| `spatial_mass` | share of the map's mass that is in the mask | the mask's share of the clip |
| `spatial_average_precision` | average precision of the map for the mask's pixels | the same |
| `spatial_pointing` | the pointing game: share of frames with a mask whose highest pixel is in it | its share |
| `temporal_concordance` | of two frames, how often that of more motion has the larger map mean (as ROC area) | 1/2 |
| `temporal_correlation` | (1 + r) / 2, r being Pearson's of the map's mean and the motion over frames | 1/2 |
| `sparseness` | Hoyer's (JMLR 2004): 0 for a constant map, 1 for a single pixel | noise, even in 0..1: 1 - 3^0.5 / 2 |
| `shape_iou_mean_threshold` | IoU of the mask and the map above its mean | that of as large a mask anywhere |
| `shape_iou_best_threshold` | the highest IoU that any threshold reaches | that of predicting every pixel |
| `shape_boundary` | DAVIS's F of the map above its mean, over frames with a mask | that of the outlines anywhere |

Sparseness is no merit in itself: `mask_sparseness` is what a map that equals the mask has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.evaluation._tensors import (
    as_labels,
    as_scores,
    check_choice,
    check_records,
    check_same,
    defined,
    mean_of,
    min_max,
)
from diffusers_concept_maps.evaluation.ranking import average_precision, best_iou, concordance
from diffusers_concept_maps.evaluation.video import (
    boundary_accuracy,
    boundary_chance,
    region_similarity,
    temporal_consistency,
)

SCORES = (
    "spatial_mass",
    "spatial_average_precision",
    "spatial_pointing",
    "temporal_concordance",
    "temporal_correlation",
    "sparseness",
    "shape_iou_mean_threshold",
    "shape_iou_best_threshold",
    "shape_boundary",
)
"""Names of the scores that have a chance level."""

_PARITIES = (None, "imap")
_NOISE_SPARSENESS = 1 - math.sqrt(3) / 2  # the mean over the root mean square of even noise is 3 ** 0.5 / 2


def score_sample(
    scores: torch.Tensor, labels: torch.Tensor, *, amount: torch.Tensor | None = None, parity: str | None = None
) -> dict[str, Any]:
    """Compare the map of one clip with the masks of the motion.

    Args:
        scores: the map of the motion word `[frame, height, width]`, of any real dtype.
        labels: masks of that shape: 1 where what moves is, 0 elsewhere, -1 is left out.
        amount: how much of the motion is in each frame `[frame]`, in any unit, such as `mask_motion(labels)`; None is
            whether the frame has a mask, which suits masks that are there only while the motion goes on.
        parity: "imap" scales and thresholds every frame by itself, as its evaluation does.

    Returns:
        JSON-able: the scores of the table above (`SCORES`); `chance`, the chance level of each; `mask_sparseness`; the
        entries of `video.temporal_consistency`; `frames`, `coverage` (the mask's share of the clip) and `parity`.
        None is a score that is not defined: without any mask, or, for the temporal ones, with equal amounts.

    Raises:
        ConceptMapsValueError: shapes, labels or options that cannot be used.
    """
    check_choice(parity, _PARITIES, "parity")
    values, truth = as_scores(scores, "frame, height, width"), as_labels(labels, 2)
    check_same(values, truth, "scores and labels", "bring the map to pixels first (ConceptMaps.upsample)")
    heat = min_max(values, per_frame=parity is not None)
    scored, mask = truth >= 0, truth == 1
    when = _amounts(amount, mask)
    coverage = defined(mask[scored].double().mean())
    found: dict[str, tuple[float | torch.Tensor | None, float | torch.Tensor | None]] = {
        "sparseness": (hoyer(heat[scored]), _NOISE_SPARSENESS)
    }
    found |= _temporal(heat, scored, when)
    if mask.any():
        found |= _spatial(heat, scored, mask) | _shape(heat, scored, mask, per_frame=parity is not None)
    pairs = {name: found.get(name, (None, None)) for name in SCORES}
    return {
        **{name: None if score is None else defined(score) for name, (score, _) in pairs.items()},
        "chance": {name: None if chance is None else defined(chance) for name, (_, chance) in pairs.items()},
        "mask_sparseness": defined(hoyer(mask[scored].double())) if mask.any() else None,
        **temporal_consistency(heat * scored, mask),
        "frames": len(values),
        "coverage": coverage,
        "parity": parity,
    }


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of a data set out of those of its clips, in whatever order.

    Args:
        records: results of `score_sample`, all with the same parity; other entries are left alone.

    Returns:
        `clips`, `parity`, for every score the mean over the clips that define it (`per_clip_*`), `chance` with the
        mean chance level of each, and `defined`, the number of those clips. None is a score that no clip defines.

    Raises:
        ConceptMapsValueError: no clips, or clips of different parity.
    """
    check_records(records, ("parity",))
    plain = (*SCORES, "mask_sparseness", "coverage", "temporal_consistency")
    return {
        "clips": len(records),
        "parity": records[0]["parity"],
        **{f"per_clip_{name}": mean_of(record[name] for record in records) for name in plain},
        "chance": {f"per_clip_{name}": mean_of(record["chance"][name] for record in records) for name in SCORES},
        "defined": {f"per_clip_{name}": sum(record[name] is not None for record in records) for name in plain},
    }


def mask_motion(labels: torch.Tensor) -> torch.Tensor:
    """How much masks change around each frame, for masks that are there in motion and at rest.

    Args:
        labels: as for `score_sample`.

    Returns:
        float64 `[frame]` in 0..1: 1 - IoU with the mask of the next frame and with that of the frame before, the mean
        of both where there are two.

    Raises:
        ConceptMapsValueError: fewer than two frames, or labels that cannot be used.
    """
    truth = as_labels(labels, 2)
    if len(truth) < 2:
        raise ConceptMapsValueError("masks of 1 frame; expected at least 2 to see motion; pass amount= yourself")
    void = (truth[1:] < 0) | (truth[:-1] < 0)
    change = 1 - region_similarity(truth[1:] == 1, truth[:-1] == 1, void)
    return (torch.cat([change[:1], change]) + torch.cat([change, change[-1:]])) / 2


def hoyer(values: torch.Tensor) -> torch.Tensor:
    """Hoyer's sparseness, (n^0.5 - l1 / l2) / (n^0.5 - 1), of values from 0 up.

    Args:
        values: float64 `[n]`.

    Returns:
        float64 scalar: 0 for a constant, 1 for one value beside zeros; NaN for fewer than two values, or zeros alone.
    """
    root = math.sqrt(values.numel())
    if root <= 1:
        return values.new_tensor(math.nan)
    ratio = values.sum() / values.square().sum().sqrt()
    return torch.clamp((root - ratio) / (root - 1), 0, 1)  # rounding can put a constant below 0


def _amounts(amount: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """How much of the motion is in each frame, checked."""
    if amount is None:
        return mask.any(-1).any(-1).double()
    values = as_scores(amount, "frame")
    if len(values) != len(mask):
        raise ConceptMapsValueError(
            f"amount of {len(values)} frames for masks of {len(mask)}; expected one number per frame"
        )
    return values.to(mask.device)


def _spatial(heat: torch.Tensor, scored: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """Where the map is: scores with their chance levels."""
    coverage = mask.sum() / scored.sum().double()
    shown = mask.any(-1).any(-1)
    # What is left out cannot be the highest; of tied highest pixels, each may be the one.
    ranked = heat.masked_fill(~scored, -1)[shown].flatten(1)
    highest, inside = ranked == ranked.amax(1, keepdim=True), mask[shown].flatten(1)
    hits = (highest & inside).sum(1) / highest.sum(1).double()
    share = inside.sum(1) / scored[shown].flatten(1).sum(1).double()
    return {
        "spatial_mass": (heat[mask].sum() / heat[scored].sum(), coverage),
        "spatial_average_precision": (average_precision(heat[scored], mask[scored]), coverage),
        "spatial_pointing": (hits.mean(), share.mean()),
    }


def _temporal(heat: torch.Tensor, scored: torch.Tensor, amount: torch.Tensor) -> dict[str, Any]:
    """When the map is: scores with their chance levels; none where every frame has as much motion."""
    kept = scored.any(-1).any(-1)
    activity = ((heat * scored).sum((-2, -1)) / scored.sum((-2, -1)))[kept]
    when = amount[kept]
    if bool((when == when[:1]).all()):
        return {}
    loud, much = activity - activity.mean(), when - when.mean()
    flat = bool((activity == activity[0]).all())
    correlation = 0.0 if flat else torch.nn.functional.cosine_similarity(loud, much, 0).clamp(-1, 1)
    return {
        "temporal_concordance": (concordance(activity, when), 0.5),
        "temporal_correlation": ((1 + correlation) / 2, 0.5),
    }


def _shape(heat: torch.Tensor, scored: torch.Tensor, mask: torch.Tensor, *, per_frame: bool) -> dict[str, Any]:
    """The shape of the map: scores with their chance levels."""
    mean = heat.mean((-2, -1), keepdim=True) if per_frame else heat.mean()
    guess = (heat > mean) & scored
    total = scored.sum().double()  # counts alone would divide to float32
    coverage, predicted = mask.sum() / total, guess.sum() / total
    both = coverage * predicted
    shown = mask.any(-1).any(-1)
    pair = (guess[shown], mask[shown])
    return {
        "shape_iou_mean_threshold": (
            (guess & mask).sum() / (guess | mask).sum().double(),
            both / (coverage + predicted - both),
        ),
        "shape_iou_best_threshold": (best_iou(heat[scored], mask[scored]), coverage),
        "shape_boundary": (boundary_accuracy(*pair).mean(), boundary_chance(*pair).mean()),
    }
