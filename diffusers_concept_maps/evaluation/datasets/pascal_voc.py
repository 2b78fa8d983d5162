"""PASCAL VOC 2012 segmentation (Everingham et al., "The Pascal Visual Object Classes Challenge", IJCV 2015)."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.evaluation.datasets._base import (
    IGNORED,
    Dataset,
    Sample,
    caption_of,
    check_split,
    compact,
)
from diffusers_concept_maps.evaluation.datasets._files import below, locate, read_image, read_lines, read_values

NAMES = {
    "aeroplane": "plane",
    "bicycle": "bike",
    "bird": "bird",
    "boat": "boat",
    "bottle": "bottle",
    "bus": "bus",
    "car": "car",
    "cat": "cat",
    "chair": "chair",
    "cow": "cow",
    "dining table": "table",
    "dog": "dog",
    "horse": "horse",
    "motorbike": "motorcycle",
    "person": "person",
    "potted plant": "pot",
    "sheep": "sheep",
    "sofa": "sofa",
    "train": "train",
    "tv monitor": "monitor",
}
"""The classes of the values 1 to 20 as words, and each in a single word, as ConceptAttention's scores ask for it."""

SPLITS = ("train", "val", "trainval")
_VOID = 255


class PascalVOC(Dataset[str]):
    """All images of a split, with the classes that each shows.

    Args:
        root: the folder with `VOCdevkit/VOC2012`, or that one itself.
        split: `"train"`, `"val"` or `"trainval"`.
        short_names: whether each class is named by a single word, as in `NAMES`: "plane" for "aeroplane".

    Raises:
        ConceptMapsValueError: there is no such split.
        ConceptMapsError: the folder does not hold the data set.
    """

    name = "pascal-voc"
    source = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"

    def __init__(self, root: str | os.PathLike[str], split: str = "val", short_names: bool = False) -> None:
        check_split(self.name, split, SPLITS)
        self._folder = locate(root, "ImageSets/Segmentation", ("VOC2012", "VOCdevkit/VOC2012"))
        self._class_names = dict(enumerate(NAMES.values() if short_names else NAMES, start=1))
        self._list = self._folder / "ImageSets" / "Segmentation" / f"{split}.txt"
        self._entries = {name: name for name in read_lines(self._list)}

    def _file(self, folder: str, name: str) -> Path:
        return below(self._folder / folder, name, listed_in=self._list)

    def _labels(self, name: str) -> torch.Tensor:
        values = read_values(self._file("SegmentationClass", f"{name}.png"))
        values[values == _VOID] = IGNORED
        return values

    def _read(self, name: str, entry: str) -> Sample:
        labels, classes = compact(self._labels(entry), self._class_names)
        return Sample(
            name=name,
            frames=read_image(self._file("JPEGImages", f"{entry}.jpg")).unsqueeze(0),
            labels=labels.unsqueeze(0),
            classes=classes,
            caption=caption_of(classes[1:]),
        )


class PascalVOCSingleClass(PascalVOC):
    """The images of a split that show exactly one class, as the ConceptAttention evaluation takes them.

    No list says which these are, so opening decodes the label image of every one: some seconds for `"val"`.

    Args:
        root: the folder with `VOCdevkit/VOC2012`, or that one itself.
        split: `"train"`, `"val"` or `"trainval"`.
        short_names: whether each class is named by a single word, as in `NAMES`: "plane" for "aeroplane".

    Raises:
        ConceptMapsValueError: there is no such split.
        ConceptMapsError: the folder does not hold the data set, a label image is broken, or no image shows one class.
    """

    name = "pascal-voc-single"

    def __init__(self, root: str | os.PathLike[str], split: str = "val", short_names: bool = False) -> None:
        super().__init__(root, split, short_names)
        listed = self._entries
        self._entries = {
            name: name for name in listed if int(self._labels(name).clamp(min=0).unique().count_nonzero()) == 1
        }
        if not self._entries:
            raise ConceptMapsError(
                f"none of the {len(listed)} images of {str(self._list)!r} shows exactly one class; take pascal-voc"
            )


DATASETS = (PascalVOC, PascalVOCSingleClass)
