"""DAVIS 2016 and 2017 as their archives unpack."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.datasets._write import blocks, write_frame, write_values

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.evaluation.datasets import open_dataset

SEQUENCE = "bike-packing"
VALUES = [blocks(0, 1, 2), blocks(0, 2, 1), blocks(0, 0, 3), blocks(255, 0, 0)]
CATEGORIES = {SEQUENCE: {"1": "bicycle", "2": "person", "3": "bicycle"}}


def write_sequence(root: Path, values: list[np.ndarray], palette: bool) -> torch.Tensor:
    for index, content in enumerate(values):
        write_values(root / "Annotations" / "480p" / SEQUENCE / f"{index:05}.png", content, palette)
    folder = root / "JPEGImages" / "480p" / SEQUENCE
    return torch.stack([write_frame(folder / f"{index:05}.jpg", seed=index) for index in range(len(values))])


@pytest.fixture
def frames(tmp_path: Path) -> torch.Tensor:
    """Write the 2017 archive; return the frames of a sequence."""
    root = tmp_path / "DAVIS"
    for year in ("2016", "2017"):
        (root / "ImageSets" / year).mkdir(parents=True)
        (root / "ImageSets" / year / "val.txt").write_text(f"{SEQUENCE}\nblackswan\n")
    return write_sequence(root, VALUES, palette=True)


def relabeled(indices: list[int], numbers: dict[int, int]) -> list[list[list[int]]]:
    return [[[numbers[value] for value in row] for row in VALUES[index].tolist()] for index in indices]


def test_objects_of_2017(frames: torch.Tensor, tmp_path: Path) -> None:
    dataset = open_dataset("davis-2017", tmp_path)
    assert dataset.names() == (SEQUENCE, "blackswan")
    sample = dataset.read(SEQUENCE)
    assert sample.classes == ("background", "object 1", "object 2", "object 3")
    assert sample.caption == "bike packing"
    assert torch.equal(sample.frames, frames)
    assert sample.labels.tolist() == relabeled([0, 1, 2, 3], {0: 0, 1: 1, 2: 2, 3: 3, 255: -1})


def test_categories_of_2017(frames: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "davis_semantics.json"
    path.write_text(json.dumps(CATEGORIES))
    sample = open_dataset("davis-2017", tmp_path / "DAVIS", categories=path).read(SEQUENCE)
    assert (sample.classes, sample.caption) == (("background", "bicycle", "person"), "a bicycle,a person")
    assert sample.labels.tolist() == relabeled([0, 1, 2, 3], {0: 0, 1: 1, 2: 2, 3: 1, 255: -1})


def test_some_frames(frames: torch.Tensor, tmp_path: Path) -> None:
    sample = open_dataset("davis-2017", tmp_path, max_frames=2).read(SEQUENCE)
    assert torch.equal(sample.frames, frames[[0, 3]])
    assert sample.classes == ("background", "object 1", "object 2")
    assert sample.labels.tolist() == relabeled([0, 3], {0: 0, 1: 1, 2: 2, 255: -1})
    clip = open_dataset("davis-2017", tmp_path, stride=1, max_frames=3).read(SEQUENCE)
    assert torch.equal(clip.frames, frames[:3])


def test_2016_in_the_2017_archive(frames: torch.Tensor, tmp_path: Path) -> None:
    sample = open_dataset("davis-2016", tmp_path).read(SEQUENCE)
    assert (sample.classes, sample.caption) == (("background", "object"), "bike packing")
    assert torch.equal(sample.frames, frames)
    assert sample.labels.tolist() == relabeled([0, 1, 2, 3], {0: 0, 1: 1, 2: 1, 3: 1, 255: 1})


def test_2016(tmp_path: Path) -> None:
    """The 2016 archive lists frames and segmentations, and objects are white."""
    white = [np.where(values == 0, 0, 255) for values in VALUES]
    frames = write_sequence(tmp_path, white, palette=False)
    lists = tmp_path / "ImageSets" / "480p"
    lists.mkdir(parents=True)
    pairs = [
        f"/JPEGImages/480p/{SEQUENCE}/{index:05}.jpg /Annotations/480p/{SEQUENCE}/{index:05}.png "
        for index in range(4)
    ]
    (lists / "val.txt").write_text("\n".join(pairs))
    dataset = open_dataset("davis-2016", tmp_path)
    assert dataset.names() == (SEQUENCE,)
    sample = dataset.read(SEQUENCE)
    assert torch.equal(sample.frames, frames)
    assert sample.labels.tolist() == relabeled([0, 1, 2, 3], {0: 0, 1: 1, 2: 1, 3: 1, 255: 1})
    (tmp_path / "names.json").write_text(json.dumps(CATEGORIES))
    named = open_dataset("davis-2016", tmp_path, categories=tmp_path / "names.json").read(SEQUENCE)
    assert (named.classes, named.caption) == (("background", "bicycle and person"), "a bicycle and person")
    with pytest.raises(ConceptMapsError, match=r"there is no '.*2017.val\.txt'; expected a list"):
        open_dataset("davis-2017", tmp_path)


@pytest.mark.parametrize("named", [None, {}, {"1": 2}, "bicycle"])
def test_no_category(named: object, frames: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text(json.dumps({SEQUENCE: named}))
    for name in ("davis-2016", "davis-2017"):
        with pytest.raises(
            ConceptMapsError, match="the categories of sequence 'bike-packing' are .*; expected names by ob"
        ):
            open_dataset(name, tmp_path, categories=path).read(SEQUENCE)


def test_a_category_too_few(frames: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text(json.dumps({SEQUENCE: {"1": "bicycle", "3": "bag"}}))
    with pytest.raises(ConceptMapsError, match=r"values \[2\] of the segmentation have no class; expected 0 to 3"):
        open_dataset("davis-2017", tmp_path, categories=path).read(SEQUENCE)


def test_other_annotations(frames: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ConceptMapsError, match="expected 'Annotations_unsupervised/480p' in it"):
        open_dataset("davis-2017", tmp_path, annotations="Annotations_unsupervised")
    for index in range(4):
        write_values(tmp_path / f"DAVIS/Annotations_unsupervised/480p/{SEQUENCE}/{index:05}.png", blocks(0, 0, 0, 1))
    sample = open_dataset("davis-2017", tmp_path, annotations="Annotations_unsupervised").read(SEQUENCE)
    assert sample.labels.tolist() == [blocks(0, 0, 0, 1).tolist()] * 4


def test_missing_files(frames: torch.Tensor, tmp_path: Path) -> None:
    dataset = open_dataset("davis-2017", tmp_path)
    with pytest.raises(ConceptMapsError, match="blackswan' has no frames"):
        dataset.read("blackswan")
    # As in the test splits, of which only the first frame has a segmentation.
    for index in (1, 2, 3):
        (tmp_path / f"DAVIS/Annotations/480p/{SEQUENCE}/{index:05}.png").unlink()
    with pytest.raises(
        ConceptMapsError, match="4 frames and .* 1 label images, and '00001' .* take a split whose segment"
    ):
        dataset.read(SEQUENCE)
    with pytest.raises(
        ConceptMapsValueError, match="davis-2017 has no split 'test-dev'; expected one of train, val, tra"
    ):
        open_dataset("davis-2017", tmp_path, split="test-dev")
    with pytest.raises(ConceptMapsError, match="expected 'JPEGImages/480p' in it, or in DAVIS below it"):
        open_dataset("davis-2017", tmp_path / "DAVIS" / "ImageSets")


@pytest.mark.parametrize("name", ["../480p/bike-packing", "/etc"])
def test_a_list_that_leads_elsewhere(name: str, frames: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "DAVIS" / "ImageSets" / "2017" / "val.txt").write_text(name)
    with pytest.raises(ConceptMapsError, match=rf"val\.txt' names '{name}'; expected a relative name"):
        open_dataset("davis-2017", tmp_path).read(name)
