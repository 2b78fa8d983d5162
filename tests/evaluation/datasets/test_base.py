"""What every data set has in common: samples that fit together, frames chosen, readers found by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evaluation.datasets._write import blocks, write_frame, write_values

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.evaluation import datasets
from diffusers_concept_maps.evaluation.datasets import Sample, dataset_names, find_dataset, open_dataset
from diffusers_concept_maps.evaluation.datasets._base import choose_frames, compact

FRAMES = torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
LABELS = torch.zeros(2, 4, 5, dtype=torch.int64)
READER = """
from diffusers_concept_maps.evaluation.datasets.pascal_voc import PascalVOC


class Other(PascalVOC):
    name = {name!r}


DATASETS = (Other,)
"""


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    for number, name in enumerate(("b", "a")):
        write_frame(tmp_path / "JPEGImages" / f"{name}.jpg", seed=number)
        write_values(tmp_path / "SegmentationClass" / f"{name}.png", blocks(0, 12 + number))
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("b\na\n")
    return tmp_path


def test_names_of_the_data_sets() -> None:
    names = ("davis-2016", "davis-2017", "imagenet-segmentation", "mevis", "pascal-voc", "pascal-voc-single", "vspw")
    assert dataset_names() == names
    assert [find_dataset(name).name for name in names] == list(names)
    assert all(find_dataset(name).source.startswith("http") for name in names)


def test_a_file_beside_the_readers_adds_a_data_set(
    voc: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("readers")
    (folder / "added_reader.py").write_text(READER.format(name="added"))
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(folder)])
    assert "added" in dataset_names()
    assert open_dataset("added", voc).names() == ("b", "a")


def test_two_data_sets_of_one_name(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("readers")
    (folder / "second_reader.py").write_text(READER.format(name="vspw"))
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(folder)])
    with pytest.raises(
        ConceptMapsError, match="VSPW and Other are both named 'vspw'; rename one|Other and VSPW are both"
    ):
        dataset_names()


def test_unknown_names(voc: Path) -> None:
    with pytest.raises(ConceptMapsValueError, match="no data set 'voc'; expected one of davis-2016, .*, vspw"):
        open_dataset("voc", voc)
    with pytest.raises(
        ConceptMapsValueError, match="pascal-voc has no option stride; expected some of split, short_na"
    ):
        open_dataset("pascal-voc", voc, stride=2)
    with pytest.raises(
        ConceptMapsValueError, match="pascal-voc has no split 'test'; expected one of train, val, trainv"
    ):
        open_dataset("pascal-voc", voc, split="test")
    with pytest.raises(ConceptMapsValueError, match=r"no sample 'c'; expected one of its 2 names\(\), such as 'b'"):
        open_dataset("pascal-voc", voc).read("c")


def test_samples_come_one_at_a_time_in_the_order_of_the_list(voc: Path) -> None:
    dataset = open_dataset("pascal-voc", voc)
    assert len(dataset) == 2
    # The second sample cannot be read: the first comes all the same, and the index too.
    (voc / "JPEGImages" / "a.jpg").unlink()
    samples = iter(dataset)
    assert next(samples).name == "b"
    with pytest.raises(ConceptMapsError, match=r"there is no '.*a\.jpg'; expected an image"):
        next(samples)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frames": FRAMES.float()}, r"frames torch.float32 \[2, 3, 4, 5\]; expected uint8"),
        ({"frames": FRAMES[:, 0]}, r"frames torch.uint8 \[2, 4, 5\]; expected uint8"),
        ({"frames": FRAMES[:0]}, "at least one frame"),
        ({"labels": LABELS.int()}, r"labels torch.int32 \[2, 4, 5\]"),
        ({"labels": LABELS[:1]}, r"labels torch.int64 \[1, 4, 5\] for frames \[2, 3, 4, 5\]"),
        ({"labels": LABELS.transpose(1, 2)}, "check that its files belong together"),
        ({"classes": ("dog", "background")}, "expected 'background' first"),
        ({"labels": LABELS + 2}, "labels 2 to 2 for 2 classes; expected -1"),
        ({"labels": LABELS - 2}, "labels -2 to -2"),
    ],
)
def test_a_sample_that_does_not_fit_together(changed: dict[str, object], message: str) -> None:
    given = {"name": "s", "frames": FRAMES, "labels": LABELS, "classes": ("background", "dog"), "caption": "a dog"}
    Sample(**given)
    with pytest.raises(ConceptMapsError, match=message):
        Sample(**(given | changed))


def test_compact_numbers_what_is_there() -> None:
    values = torch.tensor([[0, 7, 3], [-1, 9, 3]])
    labels, classes = compact(values, {3: "cat", 7: "dog", 8: "cow", 9: "cat"})
    assert classes == ("background", "cat", "dog")
    assert labels.tolist() == [[0, 2, 1], [-1, 1, 1]]
    with pytest.raises(ConceptMapsError, match=r"values \[7, 9\] of the segmentation have no class; expected 0 to 3"):
        compact(values, {3: "cat"})


@pytest.mark.parametrize(
    ("count", "max_frames", "stride", "chosen"),
    [
        (5, None, None, [0, 1, 2, 3, 4]),
        (5, 9, None, [0, 1, 2, 3, 4]),
        (9, 3, None, [0, 4, 8]),
        (9, 1, None, [0]),
        (100, 4, None, [0, 33, 66, 99]),
        (9, None, 4, [0, 4, 8]),
        (9, 2, 4, [0, 4]),
        (9, 3, 1, [0, 1, 2]),
    ],
)
def test_chosen_frames(count: int, max_frames: int | None, stride: int | None, chosen: list[int]) -> None:
    assert choose_frames(count, max_frames, stride) == chosen


def test_evenly_spread_frames_are_different_ones() -> None:
    for count in range(49, 120):
        chosen = choose_frames(count, 49, None)
        steps = {after - before for before, after in zip(chosen, chosen[1:], strict=False)}
        assert (len(chosen), chosen[0], chosen[-1]) == (49, 0, count - 1)
        assert max(steps) - min(steps) <= 1
        assert min(steps) >= 1


@pytest.mark.parametrize("option", ["max_frames", "stride"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
@pytest.mark.parametrize("name", ["davis-2017", "mevis", "vspw"])
def test_numbers_of_frames_are_positive(name: str, option: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(ConceptMapsValueError, match=f"{option} is {value}; expected a positive integer, or None"):
        open_dataset(name, tmp_path, **{option: value})


def test_importing_needs_no_extra() -> None:
    """The readers are found without what reads their files."""
    code = (
        "import sys; from diffusers_concept_maps.evaluation.datasets import dataset_names; dataset_names(); "
        "sys.exit(','.join({'h5py', 'matplotlib', 'scipy', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (1, "")
