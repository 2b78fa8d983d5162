"""Segmentation scores, against scikit-learn, and the published scripts' arithmetic written out in numpy."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from sklearn.metrics import accuracy_score, average_precision_score, confusion_matrix, jaccard_score

from diffusers_concept_maps import ConceptMapsValueError
from diffusers_concept_maps.evaluation.segmentation import (
    blur,
    count_pixels,
    score_sample,
    segment,
    summarize,
)

VOC = (0, 0, 0, 2, 5, 4)  # labels of six concepts, three of the background


def maps_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(seed: int, *shape: int, classes: int = 2, ignored: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < ignored, -1)


def binary_sample(seed: int, ignored: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of a target and two other concepts, on two frames, that know something of the truth."""
    labels = labels_of(seed, 2, 9, 7, ignored=ignored)
    maps = maps_of(seed + 100, 3, 2, 9, 7)
    maps[1] += labels.clamp(min=0)
    return maps, labels


def stacked(values: np.ndarray) -> np.ndarray:
    return np.stack([1 - values, values])


def scaled(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min())


def test_one_sample_is_scored_as_scikit_learn_scores_it() -> None:
    maps, labels = binary_sample(0)
    record = score_sample(maps, labels, [0, 1, 0])
    heat, truth = maps[1].numpy(), labels.numpy()
    kept = truth >= 0
    guess = (heat > heat.mean())[kept]
    assert record["pixels"] == kept.sum()
    assert record["correct"] == (guess == truth[kept]).sum()
    matrix = confusion_matrix(truth[kept], guess)
    assert record["intersection"] == matrix.diagonal().tolist()
    assert record["union"] == (matrix.sum(0) + matrix.sum(1) - matrix.diagonal()).tolist()
    m = scaled(heat)[kept]
    expected = average_precision_score(stacked(truth[kept]).ravel(), stacked(m).ravel())
    assert record["average_precision"] == pytest.approx(expected, abs=1e-12)
    assert record["foreground_average_precision"] == pytest.approx(average_precision_score(truth[kept], m), abs=1e-12)
    summary = summarize([record])
    assert summary["dataset_pixel_accuracy"] == pytest.approx(accuracy_score(truth[kept], guess), abs=1e-12)
    assert summary["dataset_iou"] == pytest.approx(jaccard_score(truth[kept], guess, average=None).tolist(), abs=1e-12)
    assert {"rule": "threshold", "classes": 2, "parity": None}.items() <= record.items()


def test_averages_over_the_data_set_and_per_image() -> None:
    samples = [binary_sample(seed, ignored=0.1 * seed) for seed in range(4)]
    records = [score_sample(maps, labels, [0, 1, 0]) for maps, labels in samples]
    truths = [labels[labels >= 0].numpy() for _, labels in samples]
    guesses = [(maps[1] > maps[1].mean())[labels >= 0].numpy() for maps, labels in samples]
    pairs = list(zip(truths, guesses, strict=True))
    whole = (np.concatenate(truths), np.concatenate(guesses))
    expected = {
        "dataset_pixel_accuracy": accuracy_score(*whole),
        "per_image_pixel_accuracy": np.mean([accuracy_score(*pair) for pair in pairs]),
        "dataset_mean_iou": jaccard_score(*whole, average="macro"),
        "per_image_mean_iou": np.mean([jaccard_score(*pair, average="macro") for pair in pairs]),
        "per_image_average_precision": np.mean([record["average_precision"] for record in records]),
    }
    summary = summarize(records)
    assert {name: summary[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert summary["dataset_mean_iou"] != pytest.approx(summary["per_image_mean_iou"], abs=1e-6)
    assert summary["samples"] == 4


def test_several_classes() -> None:
    """Maps know the truth in part; class 1 and 3 have no concept, and class 3 is nowhere."""
    labels = labels_of(1, 3, 8, 10, classes=6, ignored=0.2)
    labels[labels == 3] = 0
    maps = maps_of(2, 6, 3, 8, 10)
    records = [score_sample(maps, labels, VOC, classes=6, rule="argmax")]
    guess = np.array(VOC)[maps.numpy().argmax(0)]
    assert segment(maps, VOC).equal(torch.from_numpy(guess))
    kept = labels.numpy() >= 0
    truth, guess = labels.numpy()[kept], guess[kept]
    ious = jaccard_score(truth, guess, average=None, labels=range(6), zero_division=0.0).tolist()
    summary = summarize(records)
    assert summary["dataset_iou"] == pytest.approx([*ious[:3], None, *ious[4:]], abs=1e-12)
    assert summary["dataset_mean_iou"] == pytest.approx(np.mean([*ious[:3], *ious[4:]]), abs=1e-12)
    assert summary["dataset_pixel_accuracy"] == pytest.approx(accuracy_score(truth, guess), abs=1e-12)
    assert summary["per_image_average_precision"] is None


def test_argmax_of_two_classes_has_a_precision_of_its_target() -> None:
    maps, labels = binary_sample(3)
    record = score_sample(maps, labels, [0, 1, 0], rule="argmax")
    by_threshold = score_sample(maps, labels, [0, 1, 0])
    assert record["average_precision"] == by_threshold["average_precision"]
    guess = maps.argmax(0) == 1
    assert record["correct"] == int((guess == labels.bool())[labels >= 0].sum())
    assert segment(maps, [0, 1, 0]).equal(guess.long())


def test_maps_become_pixels_after_they_were_thresholded() -> None:
    """At 224 as in the paper: 64 does not divide it, so the mean of the map in pixels is another one."""
    maps, labels = maps_of(4, 2, 1, 64, 64), labels_of(5, 1, 300, 250)
    maps[..., ::2, ::2] += 3  # these rows and columns have four pixels each, the others three
    record = score_sample(maps, labels, [1, 0], size=(224, 224))
    corner = torch.arange(224) * 64 // 224
    pixels = maps[0, 0][corner][:, corner]
    center = [((torch.arange(224) + 0.5) * size / 224).long() for size in (300, 250)]
    truth = labels[0][center[0]][:, center[1]].bool()
    assert record["correct"] == int(((pixels > maps[0].mean()) == truth).sum())
    assert record["correct"] != int(((pixels > pixels.mean()) == truth).sum())
    assert record["pixels"] == 224**2
    foreground = average_precision_score(truth.ravel(), pixels.ravel())
    assert record["foreground_average_precision"] == pytest.approx(foreground, abs=1e-12)
    assert score_sample(maps, labels, [1, 0])["pixels"] == 300 * 250


def published_pixel_accuracy(guess: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    scored = truth + 1 > 0
    return int(((guess == truth) & scored).sum()), int(scored.sum())


def published_iou(guess: np.ndarray, truth: np.ndarray, classes: int) -> tuple[list[int], list[int]]:
    """By histograms of values plus 1 over 1 to the number of classes; what is beyond falls out."""
    guess, truth = (guess + 1) * (truth + 1 > 0), truth + 1
    areas = [
        np.histogram(values, bins=classes, range=(1, classes))[0]
        for values in (guess * (guess == truth), guess, truth)
    ]
    return areas[0].tolist(), (areas[1] + areas[2] - areas[0]).tolist()


def published_precision(heat: np.ndarray, truth: np.ndarray) -> float:
    one_hot = stacked((truth.clip(0) == 1).astype(int))
    kept = np.broadcast_to(truth, one_hot.shape) != -1
    return average_precision_score(one_hot[kept], stacked(heat)[kept])


@pytest.mark.parametrize("ignored", [0.0, 0.2])
def test_parity_of_the_threshold_rule(ignored: float) -> None:
    maps, labels = binary_sample(6, ignored)
    record = score_sample(maps, labels, [0, 1, 0], parity="concept_attention")
    heat, truth = maps[1].numpy(), labels.numpy()
    mask = (heat > heat.mean()).astype(int)
    assert (record["correct"], record["pixels"]) == published_pixel_accuracy(stacked(mask), stacked(truth))
    assert (record["intersection"], record["union"]) == published_iou(stacked(mask), stacked(truth), 2)
    assert record["average_precision"] == pytest.approx(published_precision(scaled(heat), truth), abs=1e-12)


def test_published_iou_is_a_function_of_the_accuracy() -> None:
    """And of it alone, in whatever class the errors are; the paper's 0.83 and 0.71 are a pair."""
    for seed in range(5):
        maps, labels = binary_sample(seed, 0.0)
        summary = summarize([score_sample(maps, labels, [0, 1, 0], parity="concept_attention")])
        accuracy = summary["dataset_pixel_accuracy"]
        assert summary["dataset_mean_iou"] == pytest.approx(accuracy / (2 - accuracy), abs=1e-12)
        right = summarize([score_sample(maps, labels, [0, 1, 0])])
        assert right["dataset_pixel_accuracy"] == accuracy
        assert right["dataset_mean_iou"] < summary["dataset_mean_iou"]
    assert round(0.83 / (2 - 0.83), 2) == 0.71


def test_parity_of_argmax_with_two_classes() -> None:
    maps, labels = binary_sample(7, 0.2)
    record = score_sample(maps, labels, [0, 1, 0], rule="argmax", parity="concept_attention")
    mask, truth = (maps.argmax(0) == 1).long().numpy(), labels.numpy()
    assert (record["correct"], record["pixels"]) == published_pixel_accuracy(stacked(mask), stacked(truth))
    assert (record["intersection"], record["union"]) == published_iou(mask, truth, 2)
    assert record["average_precision"] == pytest.approx(published_precision(maps[1].numpy(), truth), abs=1e-12)
    assert record["average_precision"] != score_sample(maps, labels, [0, 1, 0], rule="argmax")["average_precision"]


def test_parity_of_argmax_with_several_classes() -> None:
    """Three of the background: the concept of class 2 is number 3, that of class 5 number 4, that of class 4 number 5.

    Class 5's pixels are renamed to 5 before number 5 becomes class 4, and so become class 4 with it.
    """
    maps, labels = maps_of(8, 6, 1, 20, 20), labels_of(9, 1, 20, 20, classes=6, ignored=0.2)
    record = score_sample(maps, labels, VOC, classes=6, rule="argmax", parity="concept_attention")
    guess = maps.numpy().argmax(0)
    guess[guess < 3] = 0
    for index, name in enumerate(VOC[3:]):
        guess[guess == 3 + index] = name
    assert not (guess == 5).any()
    truth = labels.numpy()
    assert (record["correct"], record["pixels"]) == published_pixel_accuracy(guess, truth)
    assert record["intersection"] == [int(((guess == c) & (truth == c)).sum()) for c in range(6)]
    assert record["union"] == [int(((guess == c) | (truth == c)).sum()) for c in range(6)]
    # Concepts in another order than the script's are taken in its order.
    order = [3, 0, 4, 1, 5, 2]
    mixed = [VOC[index] for index in order]
    assert score_sample(maps[order], labels, mixed, classes=6, rule="argmax", parity="concept_attention") == record


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-50, 50), st.randoms(use_true_random=False))
def test_what_a_score_does_not_depend_on(seed: int, factor: float, offset: float, random: Any) -> None:
    maps, labels = binary_sample(seed, 0.2)
    record = score_sample(maps, labels, [0, 1, 0])
    for other in (
        score_sample(maps * factor + offset, labels, [0, 1, 0]),
        score_sample(maps.flip(-1), labels.flip(-1), [0, 1, 0]),
        score_sample(maps.transpose(-1, -2), labels.transpose(-1, -2), [0, 1, 0]),
        score_sample(maps.flip(0)[1:], labels, [1, 0]),
    ):
        for name, value in record.items():
            assert other[name] == (pytest.approx(value, abs=1e-9) if "precision" in name else value)
    records = [score_sample(*binary_sample(seed + index, 0.2), [0, 1, 0]) for index in range(6)]
    expected = summarize(records)
    random.shuffle(records)
    assert summarize([json.loads(json.dumps(record | {"name": "x"})) for record in records]) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.bool])
def test_any_dtype_is_scored_as_its_float64(dtype: torch.dtype) -> None:
    maps, labels = (maps_of(10, 2, 1, 6, 6) * 3).to(dtype), labels_of(11, 1, 6, 6)
    expected = score_sample(maps.double(), labels, [1, 0])
    assert score_sample(maps, labels.to(torch.int8), [1, 0]) == expected
    assert score_sample(maps, labels.bool(), [1, 0]) == expected


def test_a_sample_without_a_scored_pixel_is_left_out_of_means() -> None:
    maps, labels = binary_sample(12)
    full, empty = (score_sample(maps, truth, [0, 1, 0]) for truth in (labels, torch.full_like(labels, -1)))
    assert empty["pixels"] == 0
    assert empty["average_precision"] is None
    assert empty["foreground_average_precision"] is None
    assert summarize([full, empty]) == summarize([full]) | {"samples": 2}
    alone = summarize([empty])
    assert {value for name, value in alone.items() if name.startswith("per_image")} == {None}
    assert alone["dataset_pixel_accuracy"] is None
    assert alone["dataset_iou"] == [None, None]
    json.dumps(alone, allow_nan=False)


def test_empty_masks_and_constant_maps() -> None:
    """A constant map is nowhere above its mean, and ranks nothing: the pair's precision is chance."""
    constant, labels = torch.full((2, 1, 4, 4), 3.0), torch.zeros(1, 4, 4, dtype=torch.int64)
    record = score_sample(constant, labels, [1, 0])
    assert (record["correct"], record["union"]) == (16, [16, 0])
    assert record["average_precision"] == 0.5
    assert record["foreground_average_precision"] is None
    assert summarize([record])["dataset_mean_iou"] == 1
    labels[0, 0] = 1
    record = score_sample(constant, labels, [1, 0])
    assert (record["average_precision"], record["foreground_average_precision"]) == (0.5, 0.25)


def test_rounding_the_mean_puts_no_constant_map_above_it() -> None:
    rounded = 0
    for side in range(2, 12):
        for value in (0.1, 1 / 3, 0.7, 0.9):
            constant = torch.full((1, 1, side, side), value, dtype=torch.float64)
            rounded += int((constant > constant.mean()).any())
            assert not segment(constant, [1], rule="threshold").any()
    assert rounded  # some of these means are below what they are the mean of


def test_extreme_values_do_not_overflow() -> None:
    maps, labels = binary_sample(13)
    huge = maps / maps.abs().max() * 1.7e308
    assert score_sample(huge, labels, [0, 1, 0])["average_precision"] == pytest.approx(
        score_sample(maps, labels, [0, 1, 0])["average_precision"], abs=1e-9
    )


def test_blur_is_the_gaussian_of_scipy() -> None:
    maps = maps_of(14, 2, 3, 7, 5)
    expected = gaussian_filter(maps.numpy(), 1, axes=(2, 3), radius=1, mode="mirror")
    np.testing.assert_allclose(blur(maps).numpy(), expected, atol=1e-12)


MAPS, LABELS = torch.zeros(2, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": MAPS[0]}, r"scores of shape \[1, 4, 4\]; expected \[concept, frame, height, width\] without"),
        ({"scores": MAPS[:, :0]}, r"scores of shape \[2, 0, 4, 4\]; expected"),
        ({"scores": MAPS + 1j}, r"scores of torch.complex64; expected real numbers; pass their magnitude"),
        ({"scores": MAPS.clone().fill_(torch.nan)}, "scores with 32 values that are not finite; expected none"),
        ({"scores": MAPS.expand(2, 3, 4, 4)}, r"scores of 3 frames for labels of 1; expected as many; spread"),
        ({"labels": LABELS[0]}, r"labels of shape \[4, 4\]; expected \[frame, height, width\] without an empty axis"),
        ({"labels": LABELS.float()}, "labels of torch.float32; expected integers or bool; convert them"),
        ({"labels": LABELS + 2}, "labels from 2 to 2; expected -1 to 1 for 2 classes; in the ground truth, -1 is"),
        ({"labels": LABELS - 2}, "labels from -2 to -2; expected -1 to 1"),
        ({"concept_labels": [1]}, "1 concept_labels for maps of 2 concepts; expected one per concept"),
        ({"concept_labels": [1, 2]}, r"concept_labels \[1, 2\]; expected 0 to 1 for 2 classes; raise classes"),
        ({"concept_labels": [0, 0]}, r"rule 'threshold' with concept_labels \[0, 0\] of 2 classes; expected two"),
        ({"concept_labels": [1, 1], "rule": "argmax"}, r"rule 'argmax' with concept_labels \[1, 1\] of 2 classes"),
        ({"classes": 3}, r"rule 'threshold' with .* of 3 classes; expected two classes and one .*; use rule='argmax'"),
        ({"rule": "mean"}, "rule 'mean' is unknown; expected one of 'threshold', 'argmax'$"),
        ({"parity": "imap"}, "parity 'imap' is unknown; expected one of None, 'concept_attention'$"),
        ({"size": (0, 4)}, r"size \(0, 4\); expected at least one pixel; None is the size of the labels"),
    ],
)
def test_what_cannot_be_scored(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"scores": MAPS, "labels": LABELS, "concept_labels": [1, 0]} | changes
    with pytest.raises(ConceptMapsValueError, match=f"^{message}"):
        score_sample(**arguments)


def test_what_cannot_be_counted_blurred_or_summarized() -> None:
    with pytest.raises(ConceptMapsValueError, match=r"prediction and labels of shapes \[1, 4, 3\] and \[1, 4, 4\]"):
        count_pixels(LABELS[..., :3], LABELS, 2)
    with pytest.raises(ConceptMapsValueError, match="^prediction from -1 to -1; expected 0 to 1 for 2 classes"):
        count_pixels(LABELS - 1, LABELS, 2)
    with pytest.raises(ConceptMapsValueError, match="^maps of 1 x 4; expected at least 2 x 2 to mirror the edges"):
        blur(MAPS[:, :, :1])
    with pytest.raises(ConceptMapsValueError, match="^no samples to summarize; expected at least one"):
        summarize([])
    records = [score_sample(MAPS, LABELS, [1, 0], rule=rule) for rule in ("argmax", "threshold")]
    with pytest.raises(ConceptMapsValueError, match="scored with rule argmax and threshold; expected one rule"):
        summarize(records)
