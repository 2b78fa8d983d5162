"""Segmentation of video: DAVIS's J and F, VSPW's video consistency, and how steady masks are.

- J, region similarity: IoU of an object's mask in every frame; F, boundary accuracy: F-measure of its outline within a
  tolerance; of both the mean over frames, the recall (share of frames above one half) and the decay (first quarter
  of the clip minus last quarter), then the mean over all objects: Perazzi et al., CVPR 2016, and DAVIS 2017
  (arXiv 1704.00675), over all frames of a clip as in its unsupervised task.
- VC_n, video consistency: Miao et al., VSPW, CVPR 2021.
- Temporal consistency, of this package: `temporal_consistency`.
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
    mean_of,
)
from diffusers_concept_maps.evaluation.segmentation import count_pixels, summarize_counts

_TOLERANCE = 0.008  # of the frame's diagonal, as DAVIS has it
_RESIZE = "bring the prediction to the size of the labels"
_PARITIES = (None, "vspw")
_SETTINGS = ("classes", "lengths", "parity")
_OBJECT_SCORES = (
    *(f"{kind}_{statistic}" for kind in ("j", "f") for statistic in ("mean", "recall", "decay")),
    "successive_iou",
    "truth_successive_iou",
    "temporal_consistency",
)


def score_sample(
    prediction: torch.Tensor,
    labels: torch.Tensor,
    *,
    classes: int,
    lengths: Sequence[int] = (8, 16),
    parity: str | None = None,
) -> dict[str, Any]:
    """Compare the predicted labels of one clip with its ground truth.

    Args:
        prediction: integers `[frame, height, width]` of 0 to `classes - 1`, such as of `segmentation.segment`.
        labels: ground truth of that shape; 0 is background, -1 is left out. Every other label is an object.
        classes: number of labels, background included.
        lengths: window lengths `n` of VC_n, in frames.
        parity: "vspw" takes VC_n as its published code does; see `video_consistency`.

    Returns:
        JSON-able: the entries of `segmentation.count_pixels`; `frames`; `objects`, by label (a string, as in JSON) the
        statistics `j_mean`, `j_recall`, `j_decay`, `f_mean`, `f_recall`, `f_decay` and the entries of
        `temporal_consistency`; `consistency`, by window length the `sum` over windows and their number; the settings.

    Raises:
        ConceptMapsValueError: shapes, labels or options that cannot be used.
    """
    record = {"classes": classes, "lengths": list(lengths), "parity": parity, "frames": len(labels)}
    record |= count_pixels(prediction, labels, classes)
    objects: dict[str, Any] = {}
    for label in labels.unique().tolist():
        if label > 0:
            guess, truth, void = prediction == label, labels == label, labels < 0
            regions, outlines = region_similarity(guess, truth, void), boundary_accuracy(guess, truth, void)
            objects[str(int(label))] = {
                **{f"j_{name}": value for name, value in frame_statistics(regions).items()},
                **{f"f_{name}": value for name, value in frame_statistics(outlines).items()},
                **temporal_consistency(guess & ~void, truth),
            }
    consistency = {}
    for length in lengths:
        windows = [
            value for value in video_consistency(prediction, labels, length, parity=parity) if value is not None
        ]
        consistency[str(length)] = {"sum": math.fsum(windows), "windows": len(windows)}
    return record | {"objects": objects, "consistency": consistency}


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of a data set out of those of its clips, in whatever order.

    Args:
        records: results of `score_sample`, all with the same settings; other entries are left alone.

    Returns:
        `clips`, the settings, the entries of `segmentation.summarize_counts` (`per_clip_*`), and:
        `per_object_*`: the mean over all objects of all clips, DAVIS's way, of `j_mean`, `j_recall`, `j_decay`, the
        same of `f_`, `successive_iou`, `truth_successive_iou`, `temporal_consistency`; `per_object_j_and_f`;
        `per_clip_j_mean`: the mean over clips of the mean over a clip's objects;
        `video_consistency`: by window length `per_clip` (mean over clips of the mean over windows) and
        `per_window` (mean over all windows of all clips, as VSPW's published code has it).
        None is a score that no clip defines.

    Raises:
        ConceptMapsValueError: no clips, or clips of different settings.
    """
    check_records(records, _SETTINGS)
    objects = [scores for record in records for scores in record["objects"].values()]
    summary = {"clips": len(records), "objects": len(objects), **{name: records[0][name] for name in _SETTINGS}}
    summary |= summarize_counts(records, "per_clip")
    summary |= {f"per_object_{name}": mean_of(scores[name] for scores in objects) for name in _OBJECT_SCORES}
    both = [summary["per_object_j_mean"], summary["per_object_f_mean"]]
    return summary | {
        "per_object_j_and_f": mean_of(both),
        "per_clip_j_mean": mean_of(mean_of(o["j_mean"] for o in record["objects"].values()) for record in records),
        "video_consistency": {length: _consistency(records, length) for length in map(str, records[0]["lengths"])},
    }


def region_similarity(
    prediction: torch.Tensor, target: torch.Tensor, void: torch.Tensor | None = None
) -> torch.Tensor:
    """IoU of two masks in every frame, DAVIS's J.

    Args:
        prediction: bool `[frame, height, width]`.
        target: the true mask, of that shape.
        void: pixels to leave out, of that shape.

    Returns:
        float64 `[frame]`; 1 where both masks are empty.

    Raises:
        ConceptMapsValueError: shapes that cannot be used.
    """
    guess, truth = _masks(prediction, target, void)
    union = (guess | truth).sum((-2, -1))
    return torch.where(union > 0, (guess & truth).sum((-2, -1)) / union.double(), 1.0)


def boundary_accuracy(
    prediction: torch.Tensor, target: torch.Tensor, void: torch.Tensor | None = None, *, tolerance: float = _TOLERANCE
) -> torch.Tensor:
    """F-measure of the outlines of two masks in every frame, DAVIS's F.

    Precision is the share of the predicted outline that is within the tolerance of the true one, recall the reverse.

    Args:
        prediction: bool `[frame, height, width]`.
        target: the true mask, of that shape.
        void: pixels that belong to neither mask, of that shape.
        tolerance: as a fraction of the diagonal of a frame; rounded up to whole pixels.

    Returns:
        float64 `[frame]`; 1 where there is no outline in either, 0 where there is one in one of them.

    Raises:
        ConceptMapsValueError: shapes that cannot be used.
    """
    guess, truth = (outline(mask) for mask in _masks(prediction, target, void))
    radius = math.ceil(tolerance * math.hypot(*target.shape[-2:]))
    return _harmonic_mean(_share(guess, grown(truth, radius)), _share(truth, grown(guess, radius)))


def boundary_chance(prediction: torch.Tensor, target: torch.Tensor, *, tolerance: float = _TOLERANCE) -> torch.Tensor:
    """What `boundary_accuracy` has for outlines of this length that lie anywhere.

    The expected precision is then the share of the frame within the tolerance of the true outline, and the expected
    recall that of the predicted one; this is their harmonic mean.

    Args:
        prediction: as for `boundary_accuracy`.
        target: as for `boundary_accuracy`.
        tolerance: as for `boundary_accuracy`.

    Returns:
        float64 `[frame]`.

    Raises:
        ConceptMapsValueError: shapes that cannot be used.
    """
    radius = math.ceil(tolerance * math.hypot(*target.shape[-2:]))
    guess, truth = (grown(outline(mask), radius) for mask in _masks(prediction, target, None))
    return _harmonic_mean(truth.double().mean((-2, -1)), guess.double().mean((-2, -1)))


def frame_statistics(values: torch.Tensor) -> dict[str, float]:
    """DAVIS's statistics of a score of frames.

    Args:
        values: `[frame]`.

    Returns:
        `mean`; `recall`, the share of frames above one half; `decay`, the mean over the first quarter of the frames
        minus that over the last, neighboring quarters sharing a frame.
    """
    scores = values.double()
    edges = (torch.linspace(1, len(scores), 5, dtype=torch.float64) + 1e-10).round().long() - 1
    decay = scores[: edges[1] + 1].mean() - scores[edges[3] :].mean()
    return {"mean": float(scores.mean()), "recall": float((scores > 0.5).double().mean()), "decay": float(decay)}


def video_consistency(
    prediction: torch.Tensor, labels: torch.Tensor, length: int, *, parity: str | None = None
) -> list[float | None]:
    """VSPW's VC_n by window: of the pixels whose true label stays the same, the share whose predicted label does.

    Whether the predicted label is right is not asked; that is what IoU is for. A constant prediction has 1.

    Args:
        prediction: integers `[frame, height, width]`.
        labels: ground truth of that shape; pixels that are -1 in a frame of a window are left out of it.
        length: frames in a window, n; windows start at every frame.
        parity: "vspw" does as the published code: a clip has one window less, the last one is never looked at, and
            -1 is a label as any other.

    Returns:
        One number per window; None where no pixel keeps its true label; an empty list for a clip that is too short.

    Raises:
        ConceptMapsValueError: shapes or options that cannot be used.
    """
    check_choice(parity, _PARITIES, "parity")
    check_same(prediction, labels, "prediction and labels", _RESIZE)
    if length < 2:
        raise ConceptMapsValueError(f"windows of {length} frames; expected at least 2; VSPW has 8 and 16")
    windows = len(labels) - length + (1 if parity is None else 0)
    same, held = labels[1:] == labels[:-1], prediction[1:] == prediction[:-1]
    if parity is None:
        same = same & (labels[1:] >= 0)
    steady = [_throughout(same, start, length) for start in range(windows)]
    kept = [mask & _throughout(held, start, length) for start, mask in enumerate(steady)]
    counts = [(int(part.sum()), int(whole.sum())) for part, whole in zip(kept, steady, strict=True)]
    return [part / whole if whole else None for part, whole in counts]


def temporal_consistency(prediction: torch.Tensor, target: torch.Tensor) -> dict[str, float | None]:
    """How steady a mask or map is from frame to frame, for how much the truth moves.

    Args:
        prediction: bool mask or map of values from 0 up, `[frame, height, width]`.
        target: the true mask, of that shape.

    Returns:
        `successive_iou`: mean over successive frames of their IoU, for maps the sum of minima over that of maxima, 1
        where both are empty; `truth_successive_iou`: the same of the target; `temporal_consistency`: the former over
        the latter, at most 1. 1 is no less steady than the truth, and flicker takes it down. A map that never changes
        has 1 as well, so it says something beside a score of accuracy only. All are None for a single frame.

    Raises:
        ConceptMapsValueError: shapes that cannot be used, or negative values.
    """
    check_same(prediction, target, "prediction and target", _RESIZE)
    guess, truth = (as_scores(values, "frame, height, width") for values in (prediction, target))
    if float(guess.min()) < 0:
        raise ConceptMapsValueError(
            f"a map down to {float(guess.min()):g}; expected no negative values; scale it to 0..1 over the clip"
        )
    if len(guess) < 2:
        return {"successive_iou": None, "truth_successive_iou": None, "temporal_consistency": None}
    steady, real = (float(_successive(values).mean()) for values in (guess, truth))
    ratio = min(1.0, steady / real) if real else 1.0
    return {"successive_iou": steady, "truth_successive_iou": real, "temporal_consistency": ratio}


def outline(mask: torch.Tensor) -> torch.Tensor:
    """One-pixel boundary of a mask: pixels that differ from the next one to the right, below, or both.

    Args:
        mask: bool `[frame, height, width]`.

    Returns:
        Bool tensor of that shape.
    """
    right = torch.cat([mask[..., 1:], mask[..., -1:]], -1)
    below, diagonal = (torch.cat([part[..., 1:, :], part[..., -1:, :]], -2) for part in (mask, right))
    return (mask ^ right) | (mask ^ below) | (mask ^ diagonal)


def grown(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Pixels within `radius` of a mask's (dilation by a disk).

    Args:
        mask: bool `[frame, height, width]`.
        radius: in pixels.

    Returns:
        Bool tensor of that shape.
    """
    height, width = mask.shape[-2:]
    # A disk is a stack of horizontal runs. How many pixels a run meets is the difference of two sums so far, which
    # makes this linear in the radius, where a convolution is quadratic.
    before = torch.nn.functional.pad(mask.int().cumsum(-1, dtype=torch.int32), (radius + 1, 0))
    sums = torch.cat([before, before[..., -1:].expand(*mask.shape[:-1], radius)], -1)
    near = torch.zeros_like(mask)
    for rise in range(min(radius, height - 1) + 1):
        reach = math.isqrt(radius**2 - rise**2)
        first, last = radius - reach, radius + reach + 1
        run = sums[..., last : last + width] > sums[..., first : first + width]
        near[..., rise:, :] |= run[..., : height - rise, :]
        near[..., : height - rise, :] |= run[..., rise:, :]
    return near


def _masks(
    prediction: torch.Tensor, target: torch.Tensor, void: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both masks, checked, without the void."""
    guess, truth = as_labels(prediction, 2, "prediction", 0).bool(), as_labels(target, 2, "target", 0).bool()
    check_same(guess, truth, "prediction and target", _RESIZE)
    if void is None:
        return guess, truth
    check_same(void, truth, "void and target", "void pixels are a mask as the target is")
    return guess & ~void.bool(), truth & ~void.bool()


def _share(line: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Share of an outline that is near the other one; without an outline, 1."""
    count = line.sum((-2, -1))
    return torch.where(count > 0, (line & near).sum((-2, -1)) / count.double(), 1.0)


def _harmonic_mean(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Harmonic mean; 0 of two zeros."""
    total = first + second
    return torch.where(total > 0, 2 * first * second / total, 0.0)


def _throughout(unchanged: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """Pixels that do not change in a window, `unchanged` being the comparison with the next frame."""
    return unchanged[start : start + length - 1].all(0)


def _successive(values: torch.Tensor) -> torch.Tensor:
    """IoU of every frame with the next one."""
    minima, maxima = torch.minimum(values[1:], values[:-1]), torch.maximum(values[1:], values[:-1])
    whole = maxima.sum((-2, -1))
    return torch.where(whole > 0, minima.sum((-2, -1)) / whole, 1.0)


def _consistency(records: Sequence[Mapping[str, Any]], length: str) -> dict[str, float | None]:
    """Both means of one VC_n."""
    parts = [record["consistency"][length] for record in records]
    windows = sum(part["windows"] for part in parts)
    return {
        "per_clip": mean_of(part["sum"] / part["windows"] if part["windows"] else None for part in parts),
        "per_window": math.fsum(part["sum"] for part in parts) / windows if windows else None,
    }
