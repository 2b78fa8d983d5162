"""Zero-shot segmentation as ConceptAttention (arXiv 2502.04320) scores it: pixel accuracy, mean IoU, mean AP.

Two rules make labels of maps. "threshold" (ImageNet-Segmentation): the target's map above its mean is 1, the rest 0.
"argmax" (PASCAL VOC): the concept of the highest score; concepts of the background are 0.

Two ways to average are named in every summary: `dataset_*` adds up pixels over all samples and then divides;
`per_image_*` scores each sample and takes the mean. The paper's accuracy and IoU are the former, its AP the latter.

`parity="concept_attention"` counts as its published scripts do, where that differs from the definitions:

- "threshold": accuracy and IoU are taken of the stacked pair (1 - mask, mask) against (1 - truth, truth), the values 0
  and 1 being the classes. So both have the IoU `accuracy / (2 - accuracy)`, whatever the masks look like; the paper's
  0.71 is what its 0.83 gives.
- "argmax" with two classes: the pair again for accuracy, so that an ignored pixel is one wrong of two; AP of maps that
  are not scaled to 0..1.
- "argmax" with more: ignored pixels stay in the unions. Concepts are renamed to classes one after the other in one
  array, so that a class can be taken for a concept that is still to be renamed.

Not reproduced: constants of 1e-6 in its denominators, and float32.
"""

from __future__ import annotations

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
from diffusers_concept_maps.evaluation.ranking import average_precision

_RULES = ("threshold", "argmax")
_PARITIES = (None, "concept_attention")
_SETTINGS = ("rule", "classes", "parity")


def score_sample(
    scores: torch.Tensor,
    labels: torch.Tensor,
    concept_labels: Sequence[int],
    *,
    classes: int = 2,
    rule: str = "threshold",
    size: tuple[int, int] | None = None,
    parity: str | None = None,
) -> dict[str, Any]:
    """Compare the maps of one image or clip with its ground truth.

    As in the paper, labels are made of the maps on the grid that these have, and brought to pixels afterwards, both by
    the nearest value; maps already in pixels stay as they are.

    Args:
        scores: maps `[concept, frame, height, width]` of any real dtype and any height and width.
        labels: ground truth, integers `[frame, height, width]` of 0 to `classes - 1`; -1 is left out.
        concept_labels: the label of each concept; those of the background have 0. With two classes, exactly one
            concept has 1: the target.
        classes: number of labels, background included.
        rule: "threshold" (two classes) or "argmax".
        size: `(height, width)` in pixels at which to compare, both sides brought to it by the nearest value; None is
            that of the labels. The paper has (224, 224), and (64, 64) for several classes.
        parity: "concept_attention" counts as its published scripts do.

    Returns:
        JSON-able: `pixels` scored, `correct` ones, `intersection` and `union` of every class; with two classes
        `average_precision`, that of the pair (1 - m, m) with m the target's map scaled to 0..1 over the sample, the
        paper's, whose chance is one half, and `foreground_average_precision`, that of m alone, whose chance is the
        target's share of the pixels; and the settings `rule`, `classes`, `parity`. None is a score without a value.

    Raises:
        ConceptMapsValueError: shapes, labels or options that cannot be used.
    """
    values, truth = as_scores(scores, "concept, frame, height, width"), as_labels(labels, classes)
    check_choice(rule, _RULES, "rule")
    check_choice(parity, _PARITIES, "parity")
    if values.shape[1] != truth.shape[0]:
        raise ConceptMapsValueError(
            f"scores of {values.shape[1]} frames for labels of {truth.shape[0]}; expected as many; spread token "
            f"frames over video frames first (upsample.spread_frames)"
        )
    if size is not None and min(size) < 1:
        raise ConceptMapsValueError(f"size {size}; expected at least one pixel; None is the size of the labels")
    target = _target(concept_labels, len(values), classes, rule)
    prediction = segment(values, concept_labels, rule=rule, parity=parity)
    truth = _nearest(truth, size or tuple(truth.shape[-2:]), centered=True)
    record = {"rule": rule, "classes": classes, "parity": parity}
    record |= _counts(_nearest(prediction, truth.shape[-2:]), truth, classes, rule, parity)
    if target is not None:
        raw = parity is not None and rule == "argmax"
        heat = values[target] if raw else min_max(values[target])
        record |= _precisions(_nearest(heat, truth.shape[-2:]), truth)
    return record


def segment(
    scores: torch.Tensor, concept_labels: Sequence[int], *, rule: str = "argmax", parity: str | None = None
) -> torch.Tensor:
    """Labels of maps.

    Args:
        scores: `[concept, frame, height, width]`.
        concept_labels: the label of each concept.
        rule: "threshold": 1 where the map of the concept with label 1 is above its mean over the sample; "argmax": the
            label of the concept with the highest score, the first one on ties.
        parity: "concept_attention" renames concepts one after the other ("argmax" alone).

    Returns:
        int64 `[frame, height, width]`.

    Raises:
        ConceptMapsValueError: an unknown rule, or not one label per concept.
    """
    values = as_scores(scores, "concept, frame, height, width")
    check_choice(rule, _RULES, "rule")
    check_choice(parity, _PARITIES, "parity")
    own = torch.tensor(concept_labels, device=values.device)
    if rule == "threshold":
        target = _target(concept_labels, len(values), 2, rule)
        heat = min_max(values[target])  # so that rounding the mean puts no constant map above it
        return (heat > heat.mean()).long()
    _check_concepts(concept_labels, len(values))
    if parity is None:
        return own[values.argmax(0)]
    order = own.ne(0).long().argsort(stable=True)  # its maps start with those of the background
    background = int(own.eq(0).sum())
    found = values[order].argmax(0)
    found[found < background] = 0
    for index, label in enumerate(own[order][background:].tolist(), background):
        found[found == index] = label
    return found


def count_pixels(prediction: torch.Tensor, labels: torch.Tensor, classes: int) -> dict[str, Any]:
    """What accuracy and IoU are made of.

    Args:
        prediction: integers `[frame, height, width]` of 0 to `classes - 1`.
        labels: ground truth of that shape; -1 is left out.
        classes: number of labels, background included.

    Returns:
        JSON-able: `pixels` that are scored, `correct` ones, and lists `intersection` and `union` by class.

    Raises:
        ConceptMapsValueError: shapes or labels that cannot be used.
    """
    guess, truth = as_labels(prediction, classes, "prediction", lowest=0), as_labels(labels, classes)
    check_same(guess, truth, "prediction and labels", "bring the prediction to the size of the labels")
    scored = truth >= 0
    pairs = torch.bincount(classes * truth[scored] + guess[scored], minlength=classes**2).view(classes, classes)
    right = pairs.diag()
    return {
        "pixels": int(pairs.sum()),
        "correct": int(right.sum()),
        "intersection": right.tolist(),
        "union": (pairs.sum(0) + pairs.sum(1) - right).tolist(),
    }


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of a data set out of those of its samples, in whatever order.

    Args:
        records: results of `score_sample`, all with the same settings; other entries are left alone.

    Returns:
        `samples`, the settings, and as fractions `dataset_pixel_accuracy`, `per_image_pixel_accuracy`,
        `dataset_mean_iou`, `per_image_mean_iou` (means over the classes that occur in truth or prediction),
        `dataset_iou` (of every class), `per_image_average_precision` (the paper's mAP) and
        `per_image_foreground_average_precision`. None is a score that no sample defines.

    Raises:
        ConceptMapsValueError: no samples, or samples of different settings.
    """
    check_records(records, _SETTINGS)
    return {
        "samples": len(records),
        **{name: records[0][name] for name in _SETTINGS},
        **summarize_counts(records, "per_image"),
        "per_image_average_precision": mean_of(record.get("average_precision") for record in records),
        "per_image_foreground_average_precision": mean_of(
            record.get("foreground_average_precision") for record in records
        ),
    }


def summarize_counts(records: Sequence[Mapping[str, Any]], each: str) -> dict[str, Any]:
    """Pixel accuracy and mean IoU, over the data set and as a mean over samples.

    Args:
        records: dicts with the entries of `count_pixels`, of equally many classes.
        each: prefix of the means over samples, such as "per_image".

    Returns:
        `dataset_pixel_accuracy`, `<each>_pixel_accuracy`, `dataset_mean_iou`, `<each>_mean_iou` and `dataset_iou`.
    """
    pixels, correct = (sum(record[name] for record in records) for name in ("pixels", "correct"))
    intersection, union = (
        [sum(parts) for parts in zip(*(record[name] for record in records), strict=True)]
        for name in ("intersection", "union")
    )
    of_classes = _ious(intersection, union)
    return {
        "dataset_pixel_accuracy": correct / pixels if pixels else None,
        f"{each}_pixel_accuracy": mean_of(r["correct"] / r["pixels"] if r["pixels"] else None for r in records),
        "dataset_mean_iou": mean_of(of_classes),
        f"{each}_mean_iou": mean_of(mean_of(_ious(r["intersection"], r["union"])) for r in records),
        "dataset_iou": of_classes,
    }


def blur(scores: torch.Tensor) -> torch.Tensor:
    """The smoothing of maps that the paper's ImageNet script offers: a 3 x 3 Gaussian of deviation 1, edges mirrored.

    Args:
        scores: `[concept, frame, height, width]`, at least two pixels high and wide.

    Returns:
        float64 tensor of that shape.

    Raises:
        ConceptMapsValueError: shapes that cannot be used.
    """
    values = as_scores(scores, "concept, frame, height, width")
    if min(values.shape[-2:]) < 2:
        raise ConceptMapsValueError(
            f"maps of {values.shape[-2]} x {values.shape[-1]}; expected at least 2 x 2 to mirror the edges; leave "
            f"the blur out"
        )
    line = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64, device=values.device).square().div(-2).exp()
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = torch.nn.functional.pad(values.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    return torch.nn.functional.conv2d(padded, kernel[None, None]).view_as(values)


def _check_concepts(concept_labels: Sequence[int], concepts: int) -> None:
    """Raise unless there is one label per concept."""
    if len(concept_labels) != concepts:
        raise ConceptMapsValueError(
            f"{len(concept_labels)} concept_labels for maps of {concepts} concepts; expected one per concept; give "
            f"those of the background 0"
        )


def _target(concept_labels: Sequence[int], concepts: int, classes: int, rule: str) -> int | None:
    """The concept that is the foreground; None where there are several classes."""
    _check_concepts(concept_labels, concepts)
    if min(concept_labels) < 0 or max(concept_labels) >= classes:
        raise ConceptMapsValueError(
            f"concept_labels {list(concept_labels)}; expected 0 to {classes - 1} for {classes} classes; raise classes"
        )
    if classes == 2 and list(concept_labels).count(1) == 1:
        return list(concept_labels).index(1)
    if classes == 2 or rule == "threshold":
        raise ConceptMapsValueError(
            f"rule {rule!r} with concept_labels {list(concept_labels)} of {classes} classes; expected two classes and "
            f"one concept with label 1, the target; use rule='argmax' with more classes"
        )
    return None


def _nearest(values: torch.Tensor, size: Sequence[int], *, centered: bool = False) -> torch.Tensor:
    """`[frame, height, width]` at another size: what lies under the corner, or under the center, of the new pixel.

    The paper's scripts resize maps with PyTorch, which takes the corner, and labels with PIL, which takes the center.
    """
    if tuple(values.shape[-2:]) == tuple(size):
        return values
    mode = "nearest-exact" if centered else "nearest"
    # float64 holds every label.
    return torch.nn.functional.interpolate(values[:, None].double(), tuple(size), mode=mode)[:, 0].to(values.dtype)


def _counts(
    prediction: torch.Tensor, truth: torch.Tensor, classes: int, rule: str, parity: str | None
) -> dict[str, Any]:
    """`count_pixels`, or what the published script for this rule counts."""
    counts = count_pixels(prediction, truth, classes)
    if parity is None:
        return counts
    if classes > 2:
        stray = torch.bincount(prediction[truth < 0], minlength=classes).tolist()
        return counts | {"union": [union + more for union, more in zip(counts["union"], stray, strict=True)]}
    ignored = int((truth < 0).sum())  # 1 - (-1) is 2, which is no class but is scored; -1 is not scored
    stacked: dict[str, Any] = {"pixels": 2 * counts["pixels"] + ignored, "correct": 2 * counts["correct"]}
    if rule == "threshold":
        predicted = [counts["pixels"] + int((prediction[truth < 0] == label).sum()) for label in (1, 0)]
        stacked["intersection"] = [counts["correct"]] * 2
        stacked["union"] = [counts["pixels"] + area - counts["correct"] for area in predicted]
    return counts | stacked


def _precisions(heat: torch.Tensor, truth: torch.Tensor) -> dict[str, float | None]:
    """Average precision of the pair (1 - m, m), and of m."""
    scored = truth >= 0
    if not bool(scored.any()):
        return {"average_precision": None, "foreground_average_precision": None}
    values, positive = heat[scored], truth[scored] == 1
    pair = average_precision(torch.cat([1 - values, values]), torch.cat([~positive, positive]))
    return {
        "average_precision": defined(pair),
        "foreground_average_precision": defined(average_precision(values, positive)),
    }


def _ious(intersection: Sequence[int], union: Sequence[int]) -> list[float | None]:
    """IoU by class; None for a class that is neither there nor predicted."""
    return [part / whole if whole else None for part, whole in zip(intersection, union, strict=True)]
