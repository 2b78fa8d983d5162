"""ImageNet-Segmentation out of a MATLAB 7.3 file, written as MATLAB lays it out."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.evaluation.datasets import Dataset, open_dataset

SIZES = ((6, 9), (8, 5))  # height, width
SYNSETS = ("n02121808_17", "n01440764_2048")
WORDS = "n00001740\tentity\nn01440764\ttench, Tinca tinca\nn02121808\tdomestic cat, house cat, Felis domesticus\n"
GENERATOR = np.random.default_rng(0)
IMAGES = [GENERATOR.integers(0, 256, size=(height, width, 3), dtype=np.uint8) for height, width in SIZES]
MASKS = [GENERATOR.integers(0, 2, size=size, dtype=np.uint8) for size in SIZES]


def write_mat(
    path: Path, images: list[np.ndarray], masks: list[np.ndarray], synsets: tuple[str, ...], row: bool
) -> None:
    """Write a struct array with the fields img, gt (cells of a mask), id and target.

    MATLAB's columns come first, so that an array of height, width and channels appears with its axes reversed, and a
    character is a number of 16 bits.
    """
    with h5py.File(path, "w", userblock_size=512) as file:
        cells = file.create_group("#refs#")

        def add(name: str, content: np.ndarray) -> h5py.Reference:
            return cells.create_dataset(name, data=content).ref

        def text(name: str, content: str) -> h5py.Reference:
            return add(name, np.array([[ord(character)] for character in content], dtype=np.uint16))

        def field(name: str, references: list[h5py.Reference]) -> None:
            shape = (1, len(references)) if row else (len(references), 1)
            file.create_dataset(f"value/{name}", data=np.array(references, dtype=h5py.ref_dtype).reshape(shape))

        inner = [add(f"mask{index}", mask.T) for index, mask in enumerate(masks)]
        spare = add("spare", np.full((2, 2), 9, dtype=np.uint8))
        outer = [
            add(f"gt{index}", np.array([[reference], [spare]], dtype=h5py.ref_dtype))
            for index, reference in enumerate(inner)
        ]
        field("img", [add(f"img{index}", image.transpose()) for index, image in enumerate(images)])
        field("gt", outer)
        field("id", [text(f"id{index}", synset) for index, synset in enumerate(synsets)])
        field("target", [text(f"target{index}", synset.partition("_")[0]) for index, synset in enumerate(synsets)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_mat(tmp_path / "gtsegs_ijcv.mat", IMAGES, MASKS, SYNSETS, row=False)
    (tmp_path / "words.txt").write_text(WORDS)
    return tmp_path


def opened(root: Path) -> Dataset[int]:
    return open_dataset("imagenet-segmentation", root)


@pytest.mark.parametrize("row", [False, True])
def test_samples(row: bool, root: Path) -> None:
    write_mat(root / "gtsegs_ijcv.mat", IMAGES, MASKS, SYNSETS, row)
    dataset = opened(root)
    assert dataset.names() == ("0000", "0001")
    for sample, image, mask, name in zip(dataset, IMAGES, MASKS, ("domestic cat", "tench"), strict=True):
        assert sample.classes == ("background", name)
        assert sample.caption == f"a {name}"
        assert torch.equal(sample.frames, torch.from_numpy(image).permute(2, 0, 1)[None])
        assert sample.labels.tolist() == [mask.tolist()]


def test_any_value_of_a_mask_is_the_object(root: Path) -> None:
    write_mat(root / "gtsegs_ijcv.mat", IMAGES, [mask * 255 for mask in MASKS], SYNSETS, row=False)
    assert opened(root).read("0000").labels.tolist() == [MASKS[0].tolist()]


def test_other_files_of_class_names(root: Path) -> None:
    (root / "words.txt").unlink()
    index = {"0": ["n01440764", "tench"], "283": ["n02121808", "domestic_cat"]}
    (root / "imagenet_class_index.json").write_text(json.dumps(index))
    assert opened(root).read("0000").classes[1] == "domestic cat"
    (root / "LOC_synset_mapping.txt").write_text("n02121808 house cat, cat\nn01440764 tench, Tinca tinca\n")
    assert opened(root).read("0000").classes[1] == "house cat"


def test_short_names(root: Path) -> None:
    (root / "imagenet_class_map.json").write_text(json.dumps({"categories": {"domestic cat": "cat"}}))
    sample = opened(root).read("0000")
    assert (sample.classes, sample.caption) == (("background", "cat"), "a cat")
    with pytest.raises(
        ConceptMapsError, match="imagenet_class_map.json has no short name for 'tench' .n01440764.; expect"
    ):
        opened(root).read("0001")
    for content in ({"domestic cat": "cat"}, {"categories": ["cat"]}):
        (root / "imagenet_class_map.json").write_text(json.dumps(content))
        with pytest.raises(ConceptMapsError, match=r'imagenet_class_map\.json\' has no "categories"; expected'):
            opened(root)


def test_no_class_names(root: Path) -> None:
    words = root / "words.txt"
    words.write_text("n02121808\tdomestic cat\n")
    assert opened(root).read("0000").classes[1] == "domestic cat"
    with pytest.raises(
        ConceptMapsError, match="no class name for the synset 'n01440764' of .* put the complete words.txt"
    ):
        opened(root).read("0001")
    words.write_text("cat\ndog\n")
    with pytest.raises(ConceptMapsError, match=r"words\.txt' names no synset; expected lines like 'n02084071 dog"):
        opened(root)
    words.unlink()
    with pytest.raises(
        ConceptMapsError, match=r"has no class names; put words\.txt of ImageNet there .*LOC_synset_map"
    ):
        opened(root)
    for content in ({"0": "tench"}, {"0": ["n01440764", 3]}, {"0": 1}):
        (root / "imagenet_class_index.json").write_text(json.dumps(content))
        with pytest.raises(
            ConceptMapsError, match=r"imagenet_class_index\.json' is not what was expected: .*\"tench\""
        ):
            opened(root)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConceptMapsError, match=r"not the root of this data set: expected 'gtsegs_ijcv\.mat' in it"):
        opened(tmp_path)


def test_a_broken_file(root: Path) -> None:
    path = root / "gtsegs_ijcv.mat"
    whole = path.read_bytes()
    for content in (b"MATLAB 5.0 MAT-file", whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        with pytest.raises(
            ConceptMapsError, match=r"gtsegs_ijcv\.mat' cannot be read as MATLAB 7\.3 data .*fetch it again"
        ):
            opened(root)


def test_a_file_of_something_else(root: Path) -> None:
    path = root / "gtsegs_ijcv.mat"
    with h5py.File(path, "w") as file:
        file["value/pictures"] = np.zeros(3)
    with pytest.raises(
        ConceptMapsError, match="cannot be read as MATLAB 7.3 data with references value/img, value/gt"
    ):
        opened(root)
    with h5py.File(path, "w") as file:
        for field in ("img", "gt", "id"):
            file[f"value/{field}"] = np.zeros((2, 1))
    with pytest.raises(
        ConceptMapsError, match="cannot be read as MATLAB 7.3 data with references value/img, value/gt"
    ):
        opened(root).read("0000")


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        (
            [image[..., 0] for image in IMAGES],
            MASKS,
            r"is uint8 \[9, 6\] with a mask \[9, 6\]; expected uint8 \[3, width",
        ),
        ([image.astype(float) for image in IMAGES], MASKS, r"is float64 \[3, 9, 6\]"),
        (IMAGES, MASKS[::-1], r"is uint8 \[3, 9, 6\] with a mask \[5, 8\]"),
    ],
)
def test_arrays_of_other_shapes(images: list[np.ndarray], masks: list[np.ndarray], message: str, root: Path) -> None:
    write_mat(root / "gtsegs_ijcv.mat", images, masks, SYNSETS, row=False)
    with pytest.raises(ConceptMapsError, match="image 0000 of .* " + message):
        opened(root).read("0000")
