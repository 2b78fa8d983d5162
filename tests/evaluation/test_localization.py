"""Motion localization on maps whose answer is known; planted defects take down the scores that are theirs."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, jaccard_score, roc_auc_score

from diffusers_concept_maps import ConceptMapsValueError
from diffusers_concept_maps.evaluation.localization import SCORES, hoyer, mask_motion, score_sample, summarize
from diffusers_concept_maps.evaluation.video import boundary_accuracy

FRAMES, HEIGHT, WIDTH = 8, 40, 50
ALWAYS = [name for name in SCORES if not name.startswith("temporal")]


def masks(frames: range = range(3, 7)) -> torch.Tensor:
    """A disc that travels, in some of the frames."""
    labels = torch.zeros(FRAMES, HEIGHT, WIDTH, dtype=torch.int64)
    y, x = torch.arange(HEIGHT)[:, None], torch.arange(WIDTH)
    for frame in frames:
        labels[frame][(y - 20) ** 2 + (x - 8 - 4 * frame) ** 2 <= 36] = 1
    return labels


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores_of(record: dict[str, Any], names: Any = SCORES) -> dict[str, float]:
    return {name: record[name] for name in names}


def test_a_perfect_map() -> None:
    labels = masks()
    record = score_sample(labels.float(), labels)
    expected = dict.fromkeys(SCORES, 1.0) | {"sparseness": record["mask_sparseness"]}
    assert scores_of(record) == pytest.approx(expected, abs=1e-12)
    n, k = labels.numel(), int(labels.sum())
    assert record["mask_sparseness"] == pytest.approx((math.sqrt(n) - math.sqrt(k)) / (math.sqrt(n) - 1), abs=1e-12)
    assert record["coverage"] == pytest.approx(k / n, abs=1e-15)
    assert record["temporal_consistency"] == 1


def test_every_score_by_its_definition() -> None:
    labels = masks().masked_fill(noise(1, FRAMES, HEIGHT, WIDTH) < 0.1, -1)
    raw = noise(2, FRAMES, HEIGHT, WIDTH) + 0.5 * (labels == 1)
    record = score_sample(raw.float(), labels)
    heat = raw.float().double().numpy()
    heat = (heat - heat.min()) / (heat.max() - heat.min())
    kept, mask = labels.numpy() >= 0, labels.numpy() == 1
    guess = (heat > heat.mean()) & kept
    shown = range(3, 7)
    peaks = [mask[f].ravel()[np.where(kept[f], heat[f], -1).argmax()] for f in shown]
    activity = [heat[f][kept[f]].mean() for f in range(FRAMES)]
    when = mask.any((1, 2))
    flat = heat[kept]
    n = len(flat)
    frames = torch.from_numpy(guess[3:7]), torch.from_numpy(mask[3:7])
    expected = {
        "spatial_mass": heat[mask].sum() / flat.sum(),
        "spatial_average_precision": average_precision_score(mask[kept], flat),
        "spatial_pointing": np.mean(peaks),
        "temporal_concordance": roc_auc_score(when, activity),
        "temporal_correlation": (1 + np.corrcoef(activity, when)[0, 1]) / 2,
        "sparseness": (math.sqrt(n) - flat.sum() / np.linalg.norm(flat)) / (math.sqrt(n) - 1),
        "shape_iou_mean_threshold": jaccard_score(mask[kept], guess[kept]),
        "shape_iou_best_threshold": max(
            jaccard_score(mask[kept], flat >= value) for value in np.quantile(flat, np.linspace(0, 1, 200))
        ),
        "shape_boundary": float(boundary_accuracy(*frames).mean()),
    }
    found = scores_of(record)
    best = found.pop("shape_iou_best_threshold"), expected.pop("shape_iou_best_threshold")
    assert best[1] <= best[0] <= best[1] + 0.02  # two hundred thresholds are not all of them
    assert found == pytest.approx(expected, abs=1e-9)
    chance, share = record["chance"], mask.sum() / n
    assert chance["spatial_mass"] == chance["shape_iou_best_threshold"] == pytest.approx(share)
    assert chance["spatial_pointing"] == pytest.approx(np.mean([mask[f].sum() / kept[f].sum() for f in shown]))


def test_chance_levels_are_what_noise_has() -> None:
    labels = masks()
    records = [score_sample(noise(seed, FRAMES, HEIGHT, WIDTH), labels) for seed in range(30)]
    summary = summarize(records)
    for name in SCORES:
        within = {"temporal_concordance": 0.12, "temporal_correlation": 0.12, "spatial_pointing": 0.05}.get(name, 0.01)
        if name != "shape_boundary":  # the outlines of noise are all over the frame: no pair of outlines anywhere
            level = summary["chance"][f"per_clip_{name}"]
            assert summary[f"per_clip_{name}"] == pytest.approx(level, abs=within), name


def test_a_constant_map_knows_nothing() -> None:
    labels = masks()
    record = score_sample(torch.full((FRAMES, HEIGHT, WIDTH), 0.1), labels)
    found, chance = scores_of(record), record["chance"]
    for name in SCORES:
        if name in ("sparseness", "shape_iou_mean_threshold", "shape_boundary"):
            assert found[name] == pytest.approx(0, abs=1e-12)
        else:
            assert found[name] == pytest.approx(chance[name], abs=1e-12), name


def test_planted_defects() -> None:
    """Somewhere else, at another time, blurred, of another shape: each is seen by the scores of that name."""
    labels = masks()
    right = score_sample(labels.float(), labels)
    elsewhere = score_sample(labels.roll(-14, 1).float(), labels)
    assert elsewhere["spatial_average_precision"] < 0.1 > elsewhere["spatial_mass"]
    assert elsewhere["temporal_concordance"] == 1
    other_time = score_sample(masks(range(3)).float(), labels)
    assert other_time["temporal_concordance"] < 0.5 > other_time["temporal_correlation"]
    all_the_time = score_sample(masks(range(8)).float(), labels)
    assert 0.5 <= all_the_time["temporal_concordance"] < right["temporal_concordance"]
    assert all_the_time["spatial_pointing"] == 1
    hazy = score_sample(labels + 0.5 * noise(3, FRAMES, HEIGHT, WIDTH), labels)
    assert hazy["sparseness"] < 0.5 < right["sparseness"]
    assert hazy["spatial_average_precision"] == hazy["shape_iou_best_threshold"] == 1
    square = torch.zeros_like(labels)
    for frame in range(3, 7):
        square[frame, 16:25, 4 * frame + 4 : 4 * frame + 13] = 1
    shaped = score_sample(square.float(), labels)
    assert shaped["spatial_pointing"] == 1
    assert 0.5 < shaped["shape_iou_best_threshold"] == shaped["shape_iou_mean_threshold"] < 0.95
    assert shaped["shape_boundary"] < 0.95


def test_per_frame_scale_deletes_when_the_motion_is() -> None:
    """The published evaluation scales every frame: faint noise before the motion starts is as loud as it."""
    labels = masks()
    heat = labels + 0.01 * noise(4, FRAMES, HEIGHT, WIDTH)
    clip, published = score_sample(heat, labels), score_sample(heat, labels, parity="imap")
    assert clip["temporal_concordance"] == 1
    assert published["temporal_concordance"] == 0  # the mean of scaled noise is above that of a scaled disc
    assert clip["spatial_mass"] > 0.8 > 0.3 > published["spatial_mass"]
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    scaled = (heat - low) / (high - low)
    guess = scaled > scaled.mean((1, 2), keepdim=True)
    iou = jaccard_score(labels.flatten(), guess.flatten())
    assert published["shape_iou_mean_threshold"] == pytest.approx(iou, abs=1e-12)
    assert published["parity"] == "imap"


def test_amounts_of_motion() -> None:
    """A mask that is always there and moves at the end: its motion is between frames."""
    labels = masks(range(8))
    labels[:4] = labels[0]
    motion = mask_motion(labels)
    step = [1 - jaccard_score(labels[f].flatten(), labels[f + 1].flatten()) for f in range(7)]
    expected = [step[0], *[(step[f] + step[f + 1]) / 2 for f in range(6)], step[6]]
    np.testing.assert_allclose(motion.numpy(), expected, atol=1e-12)
    assert motion[:3].tolist() == [0, 0, 0]
    heat = labels * motion.view(-1, 1, 1)
    assert score_sample(heat, labels)["temporal_concordance"] is None
    found = score_sample(heat, labels, amount=motion * 7)
    assert found["temporal_concordance"] > 0.9 < found["temporal_correlation"]
    by_hand = heat.mean((1, 2)) / heat.max()
    assert found["temporal_correlation"] == pytest.approx((1 + np.corrcoef(by_hand, motion)[0, 1]) / 2, abs=1e-9)
    assert score_sample(-heat, labels, amount=motion)["temporal_concordance"] < 0.1


def test_left_out_pixels_change_nothing() -> None:
    labels = masks()
    heat = labels + noise(5, FRAMES, HEIGHT, WIDTH)
    heat[:, 0, :2] = torch.tensor([heat.min(), heat.max()])
    heat[:, 0, 2:] = heat.mean()  # so that neither the scale nor the mean depends on what stands there
    ignored = labels.clone()
    ignored[:, 0] = -1
    mirrored = heat.clone()
    mirrored[:, 0] = heat[:, 0].flip(-1)
    first, second = score_sample(heat, ignored), score_sample(mirrored, ignored)
    assert scores_of(first) == pytest.approx(scores_of(second), abs=1e-12)
    assert first["coverage"] == pytest.approx(float((labels == 1).sum()) / (FRAMES * (HEIGHT - 1) * WIDTH))


def test_a_silent_frame_points_anywhere_but_to_what_is_left_out() -> None:
    """A frame at the lowest of the clip has four pixels that are scored, all as high, and one of them in the mask."""
    labels = torch.tensor([[[1, 0, 0, 0, -1, -1]], [[1, 0, 0, 0, 0, 0]]])
    heat = torch.zeros(2, 1, 6)
    heat[1, 0, 0] = 1
    assert score_sample(heat, labels)["spatial_pointing"] == (1 / 4 + 1) / 2


@pytest.mark.parametrize("fill", [0, -1])
def test_without_a_mask(fill: int) -> None:
    record = score_sample(noise(6, 3, 5, 5), torch.full((3, 5, 5), fill))
    defined = {name for name, value in scores_of(record).items() if value is not None}
    assert defined == ({"sparseness"} if fill == 0 else set())
    assert record["coverage"] == (0 if fill == 0 else None)
    json.dumps(record, allow_nan=False)
    summary = summarize([record, score_sample(masks().float(), masks())])
    assert summary["defined"]["per_clip_spatial_mass"] == 1
    assert summary["per_clip_spatial_mass"] == 1


def test_a_single_frame_has_no_time() -> None:
    labels = masks()[4:5]
    record = score_sample(labels.float(), labels)
    assert record["temporal_concordance"] is record["temporal_correlation"] is record["successive_iou"] is None
    assert scores_of(record, [name for name in ALWAYS if name != "sparseness"]) == pytest.approx(
        dict.fromkeys([name for name in ALWAYS if name != "sparseness"], 1.0)
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-50, 50))
def test_scale_mirror_and_order_are_no_matter(seed: int, factor: float, offset: float) -> None:
    labels = masks()
    heat = noise(seed, FRAMES, HEIGHT, WIDTH) + labels
    record = score_sample(heat, labels)
    for name, value in scores_of(record).items():
        assert 0 <= value <= 1, name
    for other in (
        score_sample(heat * factor + offset, labels),
        score_sample(heat.flip(0), labels.flip(0)),
        score_sample(heat, labels, amount=labels.sum((1, 2)) > 0),
    ):
        assert scores_of(other) == pytest.approx(scores_of(record), abs=1e-7)
    records = [record, *(score_sample(noise(seed + i, FRAMES, HEIGHT, WIDTH), labels) for i in range(1, 4))]
    assert summarize(json.loads(json.dumps(records[::-1], allow_nan=False))) == summarize(records)
    mean = np.mean([r["spatial_mass"] for r in records])
    assert summarize(records)["per_clip_spatial_mass"] == pytest.approx(mean, abs=1e-12)


def test_hoyer() -> None:
    one = torch.zeros(9, dtype=torch.float64)
    one[4] = 3
    assert float(hoyer(one)) == pytest.approx(1)
    assert float(hoyer(torch.full((9,), 0.1, dtype=torch.float64))) == pytest.approx(0, abs=1e-12)
    assert hoyer(one[:1]).isnan()
    assert hoyer(one[:4]).isnan()


HEAT, LABELS = torch.zeros(4, 6, 6), torch.zeros(4, 6, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": HEAT[0]}, r"scores of shape \[6, 6\]; expected \[frame, height, width\] without an empty axis"),
        (
            {"scores": HEAT[:, :3]},
            r"scores and labels of shapes \[4, 3, 6\] and \[4, 6, 6\]; expected equal .*upsample",
        ),
        ({"labels": LABELS + 2}, "labels from 2 to 2; expected -1 to 1 for 2 classes"),
        ({"amount": HEAT[0, 0]}, "amount of 6 frames for masks of 4; expected one number per frame"),
        ({"parity": "vspw"}, "parity 'vspw' is unknown; expected one of None, 'imap'"),
    ],
)
def test_what_cannot_be_scored(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"scores": HEAT, "labels": LABELS} | changes
    with pytest.raises(ConceptMapsValueError, match=f"^{message}"):
        score_sample(**arguments)


def test_what_has_no_motion_or_no_summary() -> None:
    with pytest.raises(
        ConceptMapsValueError, match="^masks of 1 frame; expected at least 2 to see motion; pass amount="
    ):
        mask_motion(LABELS[:1])
    records = [score_sample(HEAT, LABELS, parity=parity) for parity in (None, "imap")]
    with pytest.raises(ConceptMapsValueError, match="^samples scored with parity None and imap; expected one parity"):
        summarize(records)
