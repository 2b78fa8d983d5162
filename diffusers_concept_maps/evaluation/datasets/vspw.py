"""VSPW, video scene parsing in the wild: 124 classes in every frame (Miao et al., CVPR 2021)."""

from __future__ import annotations

import os

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
    RESTORE,
    below,
    frame_pairs,
    locate,
    read_image,
    read_json,
    read_lines,
    read_values,
    stack,
)

CLASSES = "label_num_dic_final.json"
SPLITS = ("train", "val")
_VOID = (0, 255)
"""Values that the authors leave out of every score: "others", and pixels without a label."""


class VSPW(Dataset[str]):
    """Videos of a split, with the classes that each shows.

    No pixel is background: what is none of the classes is ignored, as the authors ask for.

    Args:
        root: the folder `VSPW_480p`, or the one with it.
        split: `"train"` or `"val"`; the segmentations of the test videos are not published.
        max_frames: the most frames to take of a video; None for all.
        stride: take every stride-th frame; None spreads `max_frames` evenly over the video.

    Raises:
        ConceptMapsValueError: there is no such split, or a number is not positive.
        ConceptMapsError: the folder does not hold the data set.
    """

    name = "vspw"
    source = "https://github.com/VSPW-dataset/VSPW-dataset-download"

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "val",
        max_frames: int | None = None,
        stride: int | None = None,
    ) -> None:
        check_split(self.name, split, SPLITS)
        check_choice(max_frames, stride)
        self._folder = locate(root, CLASSES, ("VSPW_480p", "VSPW"))
        self._max_frames, self._stride = max_frames, stride
        self._class_names = self._read_class_names()
        self._list = self._folder / f"{split}.txt"
        self._entries = {name: name for name in read_lines(self._list)}

    def _read_class_names(self) -> dict[int, str]:
        path = self._folder / CLASSES
        try:
            return {int(value): name.replace("_", " ") for name, value in read_json(path).items()}
        except (TypeError, ValueError) as error:
            raise ConceptMapsError(
                f'{str(path)!r} is not what was expected: {{"others": "0", "wall": "1", ...}} ({error}); {RESTORE}'
            ) from error

    def _read(self, name: str, entry: str) -> Sample:
        video = below(self._folder / "data", entry, listed_in=self._list)
        pairs = frame_pairs(video / "origin", video / "mask")
        chosen = [pairs[index] for index in choose_frames(len(pairs), self._max_frames, self._stride)]
        frame_paths, label_paths = [frame for frame, _ in chosen], [label for _, label in chosen]
        values = stack([read_values(path) for path in label_paths], label_paths)
        for void in _VOID:
            values[values == void] = IGNORED
        labels, classes = compact(values, self._class_names)
        return Sample(
            name=name,
            frames=stack([read_image(path) for path in frame_paths], frame_paths),
            labels=labels,
            classes=classes,
            caption=caption_of(classes[1:]),
        )


DATASETS = (VSPW,)
