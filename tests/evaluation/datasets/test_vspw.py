"""VSPW as its archive unpacks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.datasets._write import blocks, write_frame, write_values

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.evaluation.datasets import open_dataset

CLASSES = {"others": "0", "wall": "1", "handrail_or_fence": "8", "person": "61", "train": "124"}
FRAMES = 7


@pytest.fixture
def frames(tmp_path: Path) -> torch.Tensor:
    """Write two videos of which one has labels that change; return its frames."""
    root = tmp_path / "VSPW_480p"
    video = root / "data" / "5_kqkCxY"
    shown = []
    for index in range(FRAMES):
        shown.append(write_frame(video / "origin" / f"{index * 3:08}.jpg", seed=index))
        write_values(video / "mask" / f"{index * 3:08}.png", values(index), palette=False)
    (root / "label_num_dic_final.json").write_text(json.dumps(CLASSES))
    (root / "val.txt").write_text("5_kqkCxY\n127_-hIVCYO4C90\n")
    (root / "train.txt").write_text("5_kqkCxY\n")
    return torch.stack(shown)


def values(index: int) -> np.ndarray:
    return blocks(0, 1, 8, 255) if index < FRAMES - 1 else blocks(61, 1, 0, 8)


def expected(indices: list[int], numbers: dict[int, int]) -> list[list[list[int]]]:
    return [[[numbers[value] for value in row] for row in values(index).tolist()] for index in indices]


def test_a_whole_video(frames: torch.Tensor, tmp_path: Path) -> None:
    dataset = open_dataset("vspw", tmp_path)
    assert dataset.names() == ("5_kqkCxY", "127_-hIVCYO4C90")
    sample = dataset.read("5_kqkCxY")
    assert sample.classes == ("background", "wall", "handrail or fence", "person")
    assert sample.caption == "a wall,a handrail or fence,a person"
    assert torch.equal(sample.frames, frames)
    assert sample.labels.tolist() == expected(list(range(FRAMES)), {0: -1, 255: -1, 1: 1, 8: 2, 61: 3})


@pytest.mark.parametrize(
    ("options", "chosen"),
    [({"max_frames": 3}, [0, 3, 6]), ({"stride": 1, "max_frames": 2}, [0, 1]), ({"stride": 5}, [0, 5])],
)
def test_some_frames(options: dict[str, int], chosen: list[int], frames: torch.Tensor, tmp_path: Path) -> None:
    sample = open_dataset("vspw", tmp_path / "VSPW_480p", split="train", **options).read("5_kqkCxY")
    assert torch.equal(sample.frames, frames[chosen])
    assert sample.labels.tolist() == expected(chosen, {0: -1, 255: -1, 1: 1, 8: 2, 61: 3})
    # The classes are those of the frames that were taken.
    assert ("person" in sample.classes) == (FRAMES - 1 in chosen)


def test_only_chosen_frames_are_decoded(frames: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "VSPW_480p/data/5_kqkCxY/origin/00000003.jpg").write_bytes(b"")
    assert len(open_dataset("vspw", tmp_path, max_frames=2).read("5_kqkCxY").frames) == 2
    with pytest.raises(ConceptMapsError, match=r"00000003\.jpg' cannot be read as an image"):
        open_dataset("vspw", tmp_path).read("5_kqkCxY")


def test_broken_class_names(frames: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "VSPW_480p" / "label_num_dic_final.json"
    for content in ({"wall": "one"}, {"wall": None}, {"wall": [1]}):
        path.write_text(json.dumps(content))
        with pytest.raises(
            ConceptMapsError, match=r"label_num_dic_final\.json' is not what was expected: .*\"wall\": \"1"
        ):
            open_dataset("vspw", tmp_path)
    path.write_text(json.dumps({"wall": 1}))
    with pytest.raises(ConceptMapsError, match=r"values \[8, 61\] of the segmentation have no class"):
        open_dataset("vspw", tmp_path).read("5_kqkCxY")


def test_missing_and_mismatched_files(frames: torch.Tensor, tmp_path: Path) -> None:
    dataset = open_dataset("vspw", tmp_path)
    with pytest.raises(ConceptMapsError, match=r"127_-hIVCYO4C90.*has no frames; expected the \*\.jpg files"):
        dataset.read("127_-hIVCYO4C90")
    video = tmp_path / "VSPW_480p" / "data" / "5_kqkCxY"
    write_values(video / "mask" / "00000006.png", blocks(0, height=5), palette=False)
    with pytest.raises(ConceptMapsError, match=r"mask.*00000006\.png' has height and width \[5, 20\] where"):
        dataset.read("5_kqkCxY")
    write_values(video / "mask" / "00000006.png", values(2), palette=False)
    write_frame(video / "origin" / "00000006.jpg", seed=0, width=7)
    with pytest.raises(ConceptMapsError, match=r"origin.*00000006\.jpg' has height and width \[12, 7\] where"):
        dataset.read("5_kqkCxY")
    (video / "mask" / "00000006.png").unlink()
    with pytest.raises(
        ConceptMapsError, match="7 frames and '.*mask' 6 label images, and '00000006' is in one of them"
    ):
        dataset.read("5_kqkCxY")


def test_a_list_that_leads_elsewhere(frames: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "VSPW_480p" / "val.txt").write_text("/etc\n../data/5_kqkCxY\n")
    dataset = open_dataset("vspw", tmp_path)
    for name in dataset.names():
        with pytest.raises(ConceptMapsError, match=rf"val\.txt' names '{name}'; expected a relative name"):
            dataset.read(name)


def test_there_is_no_test_split(frames: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ConceptMapsValueError, match="vspw has no split 'test'; expected one of train, val"):
        open_dataset("vspw", tmp_path, split="test")
