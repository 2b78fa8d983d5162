"""PASCAL VOC 2012 as its archive unpacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.datasets._write import blocks, write_frame, write_values

from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.evaluation.datasets import open_dataset

VALUES = {
    "2007_000033": blocks(0, 12, 255, 12),  # dog
    "2007_000042": blocks(0, 15, 12, 1),  # aeroplane, dog, person
    "2007_000061": blocks(0, 255),
    "2007_000123": blocks(20, 20),  # tv monitor
}


@pytest.fixture
def frames(tmp_path: Path) -> dict[str, torch.Tensor]:
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for name, values in VALUES.items():
        write_values(folder / "SegmentationClass" / f"{name}.png", values)
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    # Not in the order of their names.
    (folder / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(reversed(VALUES)) + "\n")
    (folder / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_000042\n")
    return {name: write_frame(folder / "JPEGImages" / f"{name}.jpg", seed) for seed, name in enumerate(VALUES)}


def relabeled(values: np.ndarray, numbers: dict[int, int]) -> list[list[list[int]]]:
    return [[[numbers[value] for value in row] for row in values.tolist()]]


def test_all_classes(frames: dict[str, torch.Tensor], tmp_path: Path) -> None:
    dataset = open_dataset("pascal-voc", tmp_path)
    assert dataset.names() == tuple(reversed(VALUES))
    for sample in dataset:
        assert torch.equal(sample.frames, frames[sample.name][None])
    several = dataset.read("2007_000042")
    assert several.classes == ("background", "aeroplane", "dog", "person")
    assert several.caption == "a aeroplane,a dog,a person"
    assert several.labels.tolist() == relabeled(VALUES["2007_000042"], {0: 0, 1: 1, 12: 2, 15: 3})
    one = dataset.read("2007_000033")
    assert (one.classes, one.caption) == (("background", "dog"), "a dog")
    assert one.labels.tolist() == relabeled(VALUES["2007_000033"], {0: 0, 12: 1, 255: -1})
    none = dataset.read("2007_000061")
    assert (none.classes, none.caption) == (("background",), "")
    assert none.labels.tolist() == relabeled(VALUES["2007_000061"], {0: 0, 255: -1})


def test_one_class(frames: dict[str, torch.Tensor], tmp_path: Path) -> None:
    dataset = open_dataset("pascal-voc-single", tmp_path / "VOCdevkit" / "VOC2012")
    assert dataset.names() == ("2007_000123", "2007_000033")
    assert [sample.classes for sample in dataset] == [("background", "tv monitor"), ("background", "dog")]
    assert dataset.read("2007_000123").labels.unique().tolist() == [1]
    with pytest.raises(
        ConceptMapsError, match=r"none of the 1 images of '.*train\.txt' shows exactly one class; take pasc"
    ):
        open_dataset("pascal-voc-single", tmp_path, split="train")


def test_short_names(frames: dict[str, torch.Tensor], tmp_path: Path) -> None:
    sample = open_dataset("pascal-voc", tmp_path, split="train", short_names=True).read("2007_000042")
    assert sample.classes == ("background", "plane", "dog", "person")


def test_a_value_without_a_class(frames: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_values(tmp_path / "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png", blocks(0, 21))
    with pytest.raises(ConceptMapsError, match=r"values \[21\] of the segmentation have no class; expected 0 to 20"):
        open_dataset("pascal-voc", tmp_path).read("2007_000033")


def test_a_label_image_of_another_size(frames: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_values(tmp_path / "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png", blocks(0, 12, height=5))
    with pytest.raises(
        ConceptMapsError, match="sample '2007_000033' has labels .* check that its files belong together"
    ):
        open_dataset("pascal-voc", tmp_path).read("2007_000033")


def test_a_list_that_leads_elsewhere(frames: dict[str, torch.Tensor], tmp_path: Path) -> None:
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text("../../2007_000033\n")
    with pytest.raises(
        ConceptMapsError, match=r"val\.txt' names '\.\./\.\./2007_000033\.png'; expected a relative name"
    ):
        open_dataset("pascal-voc", tmp_path).read("../../2007_000033")


def test_missing_files(frames: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(
        ConceptMapsError, match="expected 'ImageSets/Segmentation' in it, or in VOC2012 or VOCdevkit/VOC2"
    ):
        open_dataset("pascal-voc", tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages")
    with pytest.raises(ConceptMapsError, match=r"there is no '.*trainval\.txt'; expected a list"):
        open_dataset("pascal-voc", tmp_path, split="trainval")
    (tmp_path / "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png").unlink()
    with pytest.raises(
        ConceptMapsError, match=r"there is no '.*SegmentationClass.*2007_000033\.png'; expected a label"
    ):
        open_dataset("pascal-voc", tmp_path).read("2007_000033")
