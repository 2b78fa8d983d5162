"""What every data set gives: samples by name, one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError

BACKGROUND = "background"
IGNORED = -1
"""The label of pixels that no score counts."""

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Sample:
    """An image or a video with its true segmentation.

    Args:
        name: unique in its data set, and the same on every machine: result files name it.
        frames: uint8 `[frame, 3, height, width]`, RGB; an image has one frame.
        labels: int64 `[frame, height, width]`; a pixel of label i shows `classes[i]`; -1 is ignored.
        classes: `"background"`, then the classes that are in this sample: numbers differ between samples, and names do
            not.
        caption: what to tell the model of it, e.g. "a dog".

    Raises:
        ConceptMapsError: frames and labels differ in size or number, or a label has no class.
    """

    name: str
    frames: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    caption: str

    def __post_init__(self) -> None:
        frames, labels = self.frames, self.labels
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or frames.numel() == 0:
            raise ConceptMapsError(
                f"sample {self.name!r} has frames {frames.dtype} {list(frames.shape)}; expected uint8 "
                "[frame, 3, height, width] with at least one frame and pixel"
            )
        if labels.dtype != torch.int64 or labels.shape != (frames.shape[0], *frames.shape[2:]):
            raise ConceptMapsError(
                f"sample {self.name!r} has labels {labels.dtype} {list(labels.shape)} for frames "
                f"{list(frames.shape)}; expected int64, one label per pixel: check that its files belong together"
            )
        if self.classes[:1] != (BACKGROUND,):
            raise ConceptMapsError(f"sample {self.name!r} has classes {self.classes}; expected {BACKGROUND!r} first")
        low, high = int(labels.min()), int(labels.max())
        if low < IGNORED or high >= len(self.classes):
            raise ConceptMapsError(
                f"sample {self.name!r} has labels {low} to {high} for {len(self.classes)} classes; expected "
                f"{IGNORED} (ignored) to {len(self.classes) - 1}"
            )


class Dataset(ABC, Generic[Entry]):
    """A data set on disk, in the format its authors publish it in.

    Only the index is held: `read` opens the files of one sample. A subclass says its command-line `name` and the
    `source` of its format, sets `_entries` when it is made, in the data set's own order, and defines `_read`.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    _entries: Mapping[str, Entry]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(name) for name in self.names())

    def names(self) -> tuple[str, ...]:
        """Names of the samples, in the data set's own order; decodes nothing."""
        return tuple(self._entries)

    def read(self, name: str) -> Sample:
        """Read one sample.

        Args:
            name: one of `names()`.

        Raises:
            ConceptMapsValueError: there is no such sample.
            ConceptMapsError: a file is missing, broken, or not what the format says.
        """
        if name not in self._entries:
            raise ConceptMapsValueError(
                f"{self.name} has no sample {name!r}; expected one of its {len(self)} names(), such as "
                f"{next(iter(self._entries), 'none')!r}"
            )
        return self._read(name, self._entries[name])

    @abstractmethod
    def _read(self, name: str, entry: Entry) -> Sample: ...


def caption_of(classes: Sequence[str]) -> str:
    """A caption that names the classes, as in the ConceptAttention evaluation: "a dog,a cat".

    Args:
        classes: names without the background.
    """
    return ",".join(f"a {name}" for name in classes)


def compact(labels: torch.Tensor, class_names: Mapping[int, str]) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Number the classes that are in a segmentation from 1, in the order of their values on disk.

    Values of one name are one class.

    Args:
        labels: int64 of any shape; values on disk, where 0 is the background and -1 is ignored.
        class_names: the name of each value but those two.

    Returns:
        The labels with new numbers, and the classes they number, `"background"` first.

    Raises:
        ConceptMapsError: a value has no name.
    """
    present = [value for value in labels.unique().tolist() if value not in (IGNORED, 0)]
    unnamed = [value for value in present if value not in class_names]
    if unnamed:
        raise ConceptMapsError(
            f"values {unnamed} of the segmentation have no class; expected 0 to {max(class_names, default=0)} or "
            "ignored: check that the files are those of this data set"
        )
    classes = (BACKGROUND, *dict.fromkeys(class_names[value] for value in present))
    numbered = torch.where(labels == IGNORED, IGNORED, 0)
    for value in present:
        numbered[labels == value] = classes.index(class_names[value], 1)
    return numbered, classes


def choose_frames(count: int, max_frames: int | None, stride: int | None) -> list[int]:
    """Indices of the frames to take of a video.

    Args:
        count: frames the video has.
        max_frames: the most to take; None for all.
        stride: take every stride-th frame from the first, until there are `max_frames`; 1 is a clip of consecutive
            frames. None spreads `max_frames` evenly from the first frame to the last.
    """
    if stride is not None:
        return list(range(0, count, stride))[:max_frames]
    if max_frames is None or max_frames >= count:
        return list(range(count))
    if max_frames == 1:
        return [0]
    return [round(index * (count - 1) / (max_frames - 1)) for index in range(max_frames)]


def check_choice(max_frames: int | None, stride: int | None) -> None:
    """Check the options of `choose_frames`.

    Raises:
        ConceptMapsValueError: one is not a positive integer.
    """
    for option, value in (("max_frames", max_frames), ("stride", stride)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConceptMapsValueError(f"{option} is {value!r}; expected a positive integer, or None")


def check_split(dataset: str, split: str, splits: Sequence[str]) -> None:
    """Check the name of a part of a data set.

    Raises:
        ConceptMapsValueError: the data set has no such part.
    """
    if split not in splits:
        raise ConceptMapsValueError(f"{dataset} has no split {split!r}; expected one of {', '.join(splits)}")
