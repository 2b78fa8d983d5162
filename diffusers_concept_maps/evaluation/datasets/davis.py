"""DAVIS, densely annotated video segmentation.

2016: Perazzi et al., CVPR 2016. 2017: Pont-Tuset et al., https://arxiv.org/abs/1704.00675.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import ClassVar

import torch

from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.evaluation.datasets._base import (
    IGNORED,
    Dataset,
    Sample,
    caption_of,
    check_choice,
    check_split,
    choose_frames,
    compact,
)
from diffusers_concept_maps.evaluation.datasets._files import (
    below,
    frame_pairs,
    locate,
    read_image,
    read_json,
    read_lines,
    read_mask,
    read_values,
    stack,
)

SPLITS = ("train", "val", "trainval")
_VOID = 255


class Davis2017(Dataset[str]):
    """Sequences of a split, with each object in its own class.

    Args:
        root: the folder `DAVIS`, or the one with it.
        split: `"train"`, `"val"` or `"trainval"`.
        categories: a JSON file that says what the objects are, `{"bike-packing": {"1": "bicycle", "2": "person"}}`, as
            the authors' `davis_semantics.json`; its numbers have to be those of `annotations`. Objects of one name are
            one class. None: "object 1", "object 2" and so on, and the sequence's name as caption.
        annotations: the folder of the segmentations, `"Annotations"` or `"Annotations_unsupervised"`.
        max_frames: the most frames to take of a sequence; None for all.
        stride: take every stride-th frame; None spreads `max_frames` evenly over the sequence.

    Raises:
        ConceptMapsValueError: there is no such split, or a number is not positive.
        ConceptMapsError: the folder does not hold the data set, or the categories cannot be read.
    """

    name = "davis-2017"
    source = "https://davischallenge.org/davis2017/code.html"
    _lists: ClassVar[tuple[str, ...]] = ("ImageSets/2017",)

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "val",
        categories: str | os.PathLike[str] | None = None,
        annotations: str = "Annotations",
        max_frames: int | None = None,
        stride: int | None = None,
    ) -> None:
        check_split(self.name, split, SPLITS)
        check_choice(max_frames, stride)
        self._folder = locate(root, "JPEGImages/480p", ("DAVIS",))
        self._annotations = locate(self._folder, f"{annotations}/480p") / annotations
        self._max_frames, self._stride = max_frames, stride
        self._categories = None if categories is None else read_json(Path(categories))
        lists = [self._folder / folder / f"{split}.txt" for folder in self._lists]
        self._list = next((path for path in lists if path.exists()), lists[0])
        self._entries = {name: name for name in map(_sequence, read_lines(self._list))}

    def _read(self, name: str, entry: str) -> Sample:
        frame_folder = below(self._folder / "JPEGImages" / "480p", entry, listed_in=self._list)
        pairs = frame_pairs(frame_folder, below(self._annotations / "480p", entry, listed_in=self._list))
        chosen = [pairs[index] for index in choose_frames(len(pairs), self._max_frames, self._stride)]
        frame_paths, label_paths = [frame for frame, _ in chosen], [label for _, label in chosen]
        values = stack([self._values(path) for path in label_paths], label_paths)
        labels, classes = compact(values, self._class_names(name, values))
        return Sample(
            name=name,
            frames=stack([read_image(path) for path in frame_paths], frame_paths),
            labels=labels,
            classes=classes,
            caption=name.replace("-", " ") if self._categories is None else caption_of(classes[1:]),
        )

    def _values(self, path: Path) -> torch.Tensor:
        """Numbers of the objects `[height, width]`."""
        values = read_values(path)
        values[values == _VOID] = IGNORED
        return values

    def _class_names(self, sequence: str, values: torch.Tensor) -> dict[int, str]:
        """Names of the objects, by their numbers."""
        numbers = range(1, int(values.max()) + 1)
        if self._categories is None:
            return {number: f"object {number}" for number in numbers}
        named = self._named_objects(sequence)
        return {number: named[str(number)] for number in numbers if str(number) in named}

    def _named_objects(self, sequence: str) -> dict[str, str]:
        named = (self._categories or {}).get(sequence)
        if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
            raise ConceptMapsError(
                f"the categories of sequence {sequence!r} are {named!r}; expected names by object number, such as "
                '{"1": "bicycle", "2": "person"}: add them to the file of categories, or leave that file out'
            )
        return named


class Davis2016(Davis2017):
    """Sequences of a split, with all their objects in one class, "object".

    Args:
        root: the folder `DAVIS`, or the one with it, of the 2016 or the 2017 archive.
        split: `"train"`, `"val"` or `"trainval"`.
        categories: as of `Davis2017`; the class has the names of all objects, such as "bicycle and person".
        annotations: the folder of the segmentations.
        max_frames: the most frames to take of a sequence; None for all.
        stride: take every stride-th frame; None spreads `max_frames` evenly over the sequence.

    Raises:
        ConceptMapsValueError: there is no such split, or a number is not positive.
        ConceptMapsError: the folder does not hold the data set, or the categories cannot be read.
    """

    name = "davis-2016"
    source = "https://davischallenge.org/davis2016/code.html"
    _lists: ClassVar[tuple[str, ...]] = ("ImageSets/2016", "ImageSets/480p")

    def _values(self, path: Path) -> torch.Tensor:
        # Objects are 255 in the 2016 archive, and numbered in the 2017 archive; neither has ignored pixels.
        return read_mask(path).long()

    def _class_names(self, sequence: str, values: torch.Tensor) -> dict[int, str]:
        if self._categories is None:
            return {1: "object"}
        return {1: " and ".join(dict.fromkeys(self._named_objects(sequence).values()))}


DATASETS = (Davis2016, Davis2017)


def _sequence(line: str) -> str:
    """Sequence of a line, which names it, or in the 2016 archive a frame of it and the segmentation of that frame."""
    first = line.split()[0]
    return PurePosixPath(first).parent.name if first.endswith(".jpg") else first
