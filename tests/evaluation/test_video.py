"""Scores of video segmentation, against scikit-learn, scipy's morphology and definitions written out."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation
from sklearn.metrics import jaccard_score

from diffusers_concept_maps import ConceptMapsValueError
from diffusers_concept_maps.evaluation.video import (
    boundary_accuracy,
    boundary_chance,
    frame_statistics,
    grown,
    outline,
    region_similarity,
    score_sample,
    summarize,
    temporal_consistency,
    video_consistency,
)


def masks_of(seed: int, *shape: int, share: float = 0.4) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def labels_of(seed: int, *shape: int, classes: int = 3, ignored: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < ignored, -1)


def disc(row: float, column: float, radius: float, size: tuple[int, int] = (60, 90)) -> torch.Tensor:
    y, x = torch.arange(size[0])[:, None], torch.arange(size[1])
    return (y - row) ** 2 + (x - column) ** 2 <= radius**2


def naive_outline(mask: np.ndarray) -> np.ndarray:
    """A pixel is on it if it differs from its neighbor to the right, below or both, inside the frame."""
    height, width = mask.shape
    line = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            down, right = min(y + 1, height - 1), min(x + 1, width - 1)
            line[y, x] = any(mask[y, x] != mask[p] for p in ((y, right), (down, x), (down, right)))
    return line


def naive_f(guess: np.ndarray, truth: np.ndarray, tolerance: float) -> float:
    radius = math.ceil(tolerance * np.linalg.norm(guess.shape))
    offset = np.arange(-radius, radius + 1)
    disk = offset[:, None] ** 2 + offset**2 <= radius**2
    lines = [naive_outline(guess), naive_outline(truth)]
    near = [binary_dilation(line, disk) for line in lines]
    if not lines[0].any() or not lines[1].any():
        return float(lines[0].any() == lines[1].any())
    precision, recall = (lines[0] & near[1]).sum() / lines[0].sum(), (lines[1] & near[0]).sum() / lines[1].sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_region_similarity_is_the_jaccard_score_of_every_frame() -> None:
    guess, truth, void = (masks_of(seed, 6, 9, 11) for seed in range(3))
    guess[2] = truth[2] = truth[3] = False
    expected = [
        jaccard_score(t[~v], g[~v], zero_division=1.0 if not t.any() and not g.any() else 0.0)
        for g, t, v in zip(guess.numpy(), truth.numpy(), void.numpy(), strict=True)
    ]
    np.testing.assert_allclose(region_similarity(guess, truth, void).numpy(), expected, atol=1e-12)
    assert expected[2:4] == [1, 0]


@pytest.mark.parametrize("tolerance", [0.008, 0.05, 0.2])
def test_boundary_accuracy_by_hand(tolerance: float) -> None:
    """Blobs, noise, masks that touch the edge, an empty one and two empty ones."""
    guess = torch.stack([disc(20, 30, 9), disc(5, 85, 12), masks_of(3, 60, 90), disc(30, 40, 50), disc(0, 0, -1)])
    truth = torch.stack([disc(22, 33, 10), disc(55, 85, 9), masks_of(4, 60, 90), disc(0, 0, -1), disc(0, 0, -1)])
    truth, guess = torch.cat([truth, truth[:1]]), torch.cat([guess, guess[4:]])
    expected = [naive_f(*pair, tolerance) for pair in zip(guess.numpy(), truth.numpy(), strict=True)]
    np.testing.assert_allclose(boundary_accuracy(guess, truth, tolerance=tolerance).numpy(), expected, atol=1e-12)
    assert expected[3:] == [0, 1, 0]


def test_void_belongs_to_no_mask() -> None:
    guess, truth, void = (masks_of(seed, 3, 20, 30, share=0.3) for seed in (5, 6, 7))
    expected = boundary_accuracy(guess & ~void, truth & ~void)
    assert boundary_accuracy(guess, truth, void).equal(expected)


def test_outline_and_growth() -> None:
    mask = masks_of(8, 2, 13, 17)
    for index in range(2):
        np.testing.assert_array_equal(outline(mask)[index].numpy(), naive_outline(mask[index].numpy()))
    point = torch.zeros(1, 11, 11, dtype=torch.bool)
    point[0, 5, 4] = True
    for radius in range(4):
        assert grown(point, radius)[0].equal(disc(5, 4, radius, (11, 11)))
    scattered = masks_of(9, 2, 7, 12, share=0.02)
    for radius in (0, 1, 3, 6, 20):
        offset = np.arange(-radius, radius + 1)
        disk = offset[:, None] ** 2 + offset**2 <= radius**2
        expected = [binary_dilation(mask, disk) for mask in scattered.numpy()]
        np.testing.assert_array_equal(grown(scattered, radius).numpy(), expected)


def test_boundary_chance_is_what_outlines_anywhere_have() -> None:
    """The mean over every place on the frame, edges joined, of precision and of recall."""
    guess, truth = disc(20, 30, 7)[None], disc(40, 50, 12)[None]
    lines = outline(guess), outline(truth)
    near = [grown(line, 1) for line in lines]
    places = [(row, column) for row in range(60) for column in range(90)]
    rates = [
        sum(int((lines[i].roll(place, (1, 2)) & near[1 - i]).sum()) for place in places)
        / (len(places) * int(lines[i].sum()))
        for i in (0, 1)
    ]
    chance = boundary_chance(guess, truth, tolerance=0.005)
    assert float(chance) == pytest.approx(2 * rates[0] * rates[1] / sum(rates), abs=1e-12)
    assert float(boundary_chance(guess & False, truth & False)) == 0


def test_statistics_of_frames() -> None:
    """Nine frames: quarters are frames 0 to 2, 2 to 4, 4 to 6 and 6 to 8."""
    values = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    expected = {"mean": 0.5, "recall": 4 / 9, "decay": 0.8 - 0.2}
    assert frame_statistics(values) == pytest.approx(expected, abs=1e-6)
    assert frame_statistics(values[:1]) == pytest.approx({"mean": 0.9, "recall": 1, "decay": 0}, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90))
def test_quarters_are_those_of_numpy(frames: int) -> None:
    values = np.random.default_rng(frames).random(frames)
    ids = (np.round(np.linspace(1, frames, 5) + 1e-10) - 1).astype(int)
    expected = values[: ids[1] + 1].mean() - values[ids[3] :].mean()
    assert frame_statistics(torch.from_numpy(values))["decay"] == pytest.approx(expected, abs=1e-12)


def naive_consistency(guess: np.ndarray, truth: np.ndarray, length: int, starts: int, *, ignore: bool) -> list[Any]:
    found = []
    for start in range(starts):
        window = range(start, start + length)
        common = np.logical_and.reduce([truth[start] == truth[frame] for frame in window])
        if ignore:
            common &= np.logical_and.reduce([truth[frame] >= 0 for frame in window])
        held = np.logical_and.reduce([guess[start] == guess[frame] for frame in window])
        found.append((common & held).sum() / common.sum() if common.any() else None)
    return found


@pytest.mark.parametrize("length", [2, 3, 4, 6, 7])
def test_video_consistency_by_window(length: int) -> None:
    truth = labels_of(9, 6, 30, 40, classes=2, ignored=0.1)
    guess = labels_of(10, 6, 30, 40, classes=2)
    expected = naive_consistency(guess.numpy(), truth.numpy(), length, max(0, 7 - length), ignore=True)
    assert video_consistency(guess, truth, length) == pytest.approx(expected, abs=1e-12)
    published = naive_consistency(guess.numpy(), truth.numpy(), length, max(0, 6 - length), ignore=False)
    assert video_consistency(guess, truth, length, parity="vspw") == pytest.approx(published, abs=1e-12)


def test_consistency_does_not_ask_what_is_right() -> None:
    truth = labels_of(11, 5, 8, 8, classes=2)
    constant = labels_of(12, 1, 8, 8).expand(5, 8, 8)
    assert video_consistency(constant, truth, 2) == [1.0] * 4
    assert video_consistency(truth, truth, 2) == [1.0] * 4
    moving = torch.arange(5)[:, None, None].expand(5, 8, 8)
    assert video_consistency(moving, moving, 2) == [None] * 4


def test_temporal_consistency_of_masks_and_maps() -> None:
    """A mask that moves one of its two pixels has an IoU of 1/3 with itself; one that flickers has 0."""
    truth = torch.zeros(3, 1, 6, dtype=torch.bool)
    for frame in range(3):
        truth[frame, 0, frame : frame + 2] = True
    flicker = truth.clone()
    flicker[1] = False
    steady, real = temporal_consistency(truth, truth), temporal_consistency(flicker, truth)
    assert steady == pytest.approx({"successive_iou": 1 / 3, "truth_successive_iou": 1 / 3, "temporal_consistency": 1})
    assert real == pytest.approx({"successive_iou": 0, "truth_successive_iou": 1 / 3, "temporal_consistency": 0})
    soft = torch.tensor([[[0.2, 0.8]], [[0.4, 0.4]], [[0.0, 0.0]], [[0.0, 0.0]]])
    found = temporal_consistency(soft, torch.zeros(4, 1, 2, dtype=torch.bool))
    assert found["successive_iou"] == pytest.approx((0.6 / 1.2 + 0 + 1) / 3)
    assert found["truth_successive_iou"] == 1
    apart = torch.eye(3, dtype=torch.bool)[:, None]
    assert temporal_consistency(apart, apart)["temporal_consistency"] == 1
    assert set(temporal_consistency(truth[:1], truth[:1]).values()) == {None}


def clip(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two objects that travel, some void, and a prediction that has one right and half of the other."""
    truth = torch.zeros(10, 60, 90, dtype=torch.int64)
    guess = truth.clone()
    for frame in range(10):
        for label, (row, reach) in enumerate([(15, 1.0), (40, 0.6)], 1):
            truth[frame][disc(row, 10 + 6 * frame + seed, 8)] = label
            guess[frame][disc(row, 10 + 6 * frame + seed, 8 * reach)] = label
    guess[3] = 0
    return guess, truth.masked_fill(masks_of(seed, 10, 60, 90, share=0.02), -1)


def test_a_clip_and_a_data_set() -> None:
    records = [score_sample(*clip(seed), classes=4, lengths=(2, 8, 16)) for seed in (1, 2)]
    guess, truth = clip(1)
    assert set(records[0]["objects"]) == {"1", "2"}
    for label, scores in records[0]["objects"].items():
        pair = (guess == int(label), truth == int(label), truth < 0)
        regions = region_similarity(*pair)
        assert {name: scores[f"j_{name}"] for name in ("mean", "recall", "decay")} == frame_statistics(regions)
        assert scores["f_mean"] == frame_statistics(boundary_accuracy(*pair))["mean"]
        steadiness = temporal_consistency(pair[0] & ~pair[2], pair[1])
        assert steadiness.items() <= scores.items()
        assert steadiness["temporal_consistency"] < 1
    assert records[0]["objects"]["1"]["j_mean"] == pytest.approx(0.9)
    assert records[0]["objects"]["1"]["f_recall"] == pytest.approx(0.9)
    assert records[0]["consistency"]["16"] == {"sum": 0.0, "windows": 0}
    summary = summarize(records)
    objects = [scores for record in records for scores in record["objects"].values()]
    for name in ("j_mean", "f_decay", "temporal_consistency"):
        assert summary[f"per_object_{name}"] == pytest.approx(np.mean([scores[name] for scores in objects]))
    both = (summary["per_object_j_mean"] + summary["per_object_f_mean"]) / 2
    assert summary["per_object_j_and_f"] == pytest.approx(both)
    assert summary["per_clip_j_mean"] == pytest.approx(summary["per_object_j_mean"])  # as many objects in each
    assert (summary["clips"], summary["objects"]) == (2, 4)
    kept = [truth >= 0 for _, truth in map(clip, (1, 2))]
    flat = [
        torch.cat([clip(seed)[part][mask] for seed, mask in zip((1, 2), kept, strict=True)]).numpy() for part in (1, 0)
    ]
    assert summary["dataset_mean_iou"] == pytest.approx(jaccard_score(*flat, average="macro"))
    windows = [video_consistency(*clip(seed), 8) for seed in (1, 2)]
    assert summary["video_consistency"]["8"]["per_window"] == pytest.approx(np.mean(windows))
    assert summary["video_consistency"]["8"]["per_clip"] == pytest.approx(np.mean(windows))
    assert summary["video_consistency"]["16"] == {"per_clip": None, "per_window": None}
    assert summarize(json.loads(json.dumps(records[::-1], allow_nan=False))) == summary


def test_clips_of_unlike_length_and_objects_weigh_by_the_named_average() -> None:
    guess, truth = clip(3)
    short = score_sample(guess[:4].clamp(max=1), truth[:4].clamp(max=1), classes=3, lengths=(2,))
    both = [score_sample(guess, truth, classes=3, lengths=(2,)), short]
    parts = [(record["consistency"]["2"]["sum"], record["consistency"]["2"]["windows"]) for record in both]
    assert [count for _, count in parts] == [9, 3]
    found = summarize(both)["video_consistency"]["2"]
    assert found["per_window"] == pytest.approx((parts[0][0] + parts[1][0]) / 12)
    assert found["per_clip"] == pytest.approx((parts[0][0] / 9 + parts[1][0] / 3) / 2)
    means = [[o["j_mean"] for o in record["objects"].values()] for record in both]
    assert summarize(both)["per_clip_j_mean"] == pytest.approx((np.mean(means[0]) + np.mean(means[1])) / 2)
    assert summarize(both)["per_object_j_mean"] == pytest.approx(np.mean([*means[0], *means[1]]))


def test_a_clip_without_objects() -> None:
    empty = torch.zeros(3, 8, 8, dtype=torch.int64)
    summary = summarize([score_sample(empty, empty, classes=2)])
    assert summary["objects"] == 0
    assert summary["per_object_j_mean"] is summary["per_object_j_and_f"] is summary["per_clip_j_mean"] is None
    assert summary["dataset_iou"] == [1.0, None]
    ignored = summarize([score_sample(empty, empty - 1, classes=2, lengths=(2,))])
    assert ignored["video_consistency"] == {"2": {"per_clip": None, "per_window": None}}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_symmetry_and_bounds(seed: int, share: float) -> None:
    guess, truth = masks_of(seed, 4, 12, 14, share=share), masks_of(seed + 1, 4, 12, 14)
    for score in (region_similarity, boundary_accuracy):
        assert score(guess, truth).equal(score(truth, guess))
        assert score(truth, truth).equal(torch.ones(4, dtype=torch.float64))
        assert bool(((score(guess, truth) >= 0) & (score(guess, truth) <= 1)).all())
    assert region_similarity(guess.flip(1), truth.flip(1)).equal(region_similarity(guess, truth))
    record = score_sample(guess.long(), truth.long(), classes=2, lengths=(2,))
    renamed = score_sample(2 * guess.long(), 2 * truth.long(), classes=3, lengths=(2,))
    assert renamed["objects"]["2"] == record["objects"]["1"]
    assert renamed["consistency"] == record["consistency"]


LABELS = torch.zeros(4, 6, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prediction": LABELS[:3]},
            r"prediction and labels of shapes \[3, 6, 6\] and \[4, 6, 6\]; expected equal shap",
        ),
        ({"prediction": LABELS - 1}, "prediction from -1 to -1; expected 0 to 1 for 2 classes"),
        ({"labels": LABELS + 2}, "labels from 2 to 2; expected -1 to 1 for 2 classes"),
        ({"lengths": (1,)}, "windows of 1 frames; expected at least 2; VSPW has 8 and 16"),
        ({"parity": "davis"}, "parity 'davis' is unknown; expected one of None, 'vspw'"),
    ],
)
def test_what_cannot_be_scored(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"prediction": LABELS, "labels": LABELS, "classes": 2} | changes
    with pytest.raises(ConceptMapsValueError, match=f"^{message}"):
        score_sample(**arguments)


def test_masks_that_cannot_be_compared() -> None:
    mask = LABELS.bool()
    with pytest.raises(ConceptMapsValueError, match="^prediction and target of shapes"):
        region_similarity(mask[:1], mask)
    with pytest.raises(ConceptMapsValueError, match="^void and target of shapes"):
        boundary_accuracy(mask, mask, mask[:1])
    with pytest.raises(ConceptMapsValueError, match="^target from 2 to 2; expected 0 to 1"):
        boundary_accuracy(mask, LABELS + 2)
    with pytest.raises(
        ConceptMapsValueError, match="^a map down to -1; expected no negative values; scale it to 0..1"
    ):
        temporal_consistency(LABELS - 1, mask)
    records = [score_sample(LABELS, LABELS, classes=classes) for classes in (2, 3)]
    with pytest.raises(ConceptMapsValueError, match="scored with classes 2 and 3; expected one classes"):
        summarize(records)
    records = [score_sample(LABELS, LABELS, classes=2, lengths=lengths) for lengths in ((2,), (2, 3))]
    with pytest.raises(ConceptMapsValueError, match=r"scored with lengths \[2, 3\] and \[2\]; expected one lengths"):
        summarize(records)
