"""Evaluation on images in the format of PASCAL VOC, with the words that the embedded model knows as classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation.moving_shapes import BACKGROUND, write_voc
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps.evaluation.datasets import open_dataset, pascal_voc
from diffusers_concept_maps.evaluation.protocol import Settings, concepts_of
from diffusers_concept_maps.evaluation.runner import evaluate, seed_of
from diffusers_concept_maps.shapes.scenes import COLORS

IMAGES = 12


@pytest.fixture(scope="module")
def pipe() -> Any:
    return dcm.load_shapes_pipeline()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pascal_voc, "NAMES", {color: color for color in COLORS})
    write_voc(tmp_path / "VOC2012", IMAGES)
    return tmp_path


def test_images_of_several_classes(pipe: Any, root: Path) -> None:
    names = ["background", *sorted(COLORS)]
    intersection, union, means = np.zeros(5), np.zeros(5), []
    for sample in open_dataset("pascal-voc", root):
        concepts, labels = concepts_of(sample.classes, BACKGROUND)
        maps = dcm.encode(pipe, sample.frames, concepts, prompt=sample.caption, seed=seed_of(sample.name, 5))
        heat = torch.nn.functional.interpolate(maps.get()[0, :, 0][None].double(), (32, 32), mode="bilinear")
        place = np.array([names.index(name) for name in sample.classes])
        with Image.open(root / "VOC2012" / "SegmentationClass" / f"{sample.name}.png") as image:
            values = np.array(image)
        scored = values < 255
        truth = np.array([0, *(names.index(color) for color in COLORS)])[np.where(scored, values, 0)]
        guess = place[np.array(labels)[heat[0].argmax(0).numpy()]]
        own = [
            (((guess == i) & (truth == i) & scored).sum(), (((guess == i) | (truth == i)) & scored).sum())
            for i in range(5)
        ]
        intersection, union = intersection + [a for a, _ in own], union + [b for _, b in own]
        means.append(np.mean([a / b for a, b in own if b]))
    summary = evaluate(pipe, "pascal-voc", root, root / "out", settings=Settings(background=BACKGROUND, seed=5))
    assert summary is not None
    assert set(summary["methods"]["concept_attention"]) == {"segmentation"}
    scores = summary["methods"]["concept_attention"]["segmentation"]
    assert scores["dataset_iou"] == pytest.approx(
        {name: intersection[i] / union[i] for i, name in enumerate(names) if union[i]}
    )
    assert scores["per_image_mean_iou"] == pytest.approx(np.mean(means))


def test_images_of_one_class(pipe: Any, root: Path) -> None:
    given = Settings(("concept_attention", "cross_attention"), background=BACKGROUND, parity="concept_attention")
    summary = evaluate(pipe, "pascal-voc-single", root, root / "out", settings=given)
    assert summary is not None
    assert list(summary["methods"]) == ["concept_attention", "cross_attention"]
    for scores in summary["methods"].values():
        found = scores["segmentation"]
        right = found["dataset_pixel_accuracy"]
        assert (found["rule"], found["samples"] > 1) == ("threshold", True)
        # The pair of mask and inverse has this IoU, but for the ignored pixels, which are half right.
        assert found["dataset_mean_iou"] == pytest.approx(right / (2 - right), abs=2e-3)
        assert found["per_image_average_precision"] is not None
