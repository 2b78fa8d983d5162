"""MeViS: videos, expressions of motion, and masks of what they mean (Ding et al., https://arxiv.org/abs/2308.08544)."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.evaluation.datasets._base import (
    BACKGROUND,
    Dataset,
    Sample,
    check_choice,
    check_split,
    choose_frames,
)
from diffusers_concept_maps.evaluation.datasets._files import RESTORE, below, locate, read_image, read_json, stack
from diffusers_concept_maps.evaluation.datasets._rle import decode_mask

EXPRESSIONS, MASKS = "meta_expressions.json", "mask_dict.json"
SPLITS = ("valid_u", "train", "valid")
_NEXT, _COLON, _END = re.compile(r"\s*[{,]\s*"), re.compile(r"\s*:\s*"), re.compile(r"\s*\}")


@dataclass(frozen=True)
class _Expression:
    video: str
    frames: tuple[str, ...]
    text: str
    masks: tuple[str, ...]


class MeViS(Dataset[_Expression]):
    """Pairs of a video and an expression; the class is the expression, and its mask the union of the objects it means.

    Args:
        root: the folder with `valid_u` and `train`.
        split: `"valid_u"` or `"train"`; the masks of `"valid"` are not published.
        max_frames: the most frames to take of a video; None for all. The clips of IMAP have 49.
        stride: take every stride-th frame, 1 for a clip of consecutive ones; None spreads `max_frames` evenly over the
            video.

    Raises:
        ConceptMapsValueError: there is no such split, or a number is not positive.
        ConceptMapsError: the folder does not hold the data set, or the split has no masks.
    """

    name = "mevis"
    source = "https://henghuiding.github.io/MeViS"

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "valid_u",
        max_frames: int | None = None,
        stride: int | None = None,
    ) -> None:
        check_split(self.name, split, SPLITS)
        check_choice(max_frames, stride)
        self._folder = locate(root, f"{split}/{EXPRESSIONS}", ("mevis", "MeViS", "MeViS_release")) / split
        if not (self._folder / MASKS).exists():
            raise ConceptMapsError(
                f"{str(self._folder)!r} has no {MASKS}, so nothing can be scored; the masks of valid are not "
                "published: take valid_u, or train, with its mask file"
            )
        self._max_frames, self._stride = max_frames, stride
        self._entries = _expressions(self._folder / EXPRESSIONS)
        self._places = _find_members(self._folder / MASKS)

    def _read(self, name: str, entry: _Expression) -> Sample:
        listed_in = self._folder / EXPRESSIONS
        chosen = choose_frames(len(entry.frames), self._max_frames, self._stride)
        paths = [
            below(self._folder / "JPEGImages", entry.video, f"{entry.frames[index]}.jpg", listed_in=listed_in)
            for index in chosen
        ]
        frames = stack([read_image(path) for path in paths], paths)
        labels = torch.zeros(len(chosen), *frames.shape[2:], dtype=torch.int64)
        for mask in entry.masks:
            encoded = self._masks(mask, len(entry.frames))
            for label, index in zip(labels, chosen, strict=True):
                if encoded[index] is not None:
                    label |= self._decode(mask, index, encoded[index], label.shape)
        return Sample(name, frames, labels, (BACKGROUND, entry.text), entry.text)

    def _masks(self, mask: str, frames: int) -> list[Any]:
        """Encoded masks of an object, one per frame of the video; None where it is out of sight."""
        path = self._folder / MASKS
        if mask not in self._places:
            raise ConceptMapsError(
                f"{str(path)!r} has no masks {mask!r}, which an expression in {EXPRESSIONS} names; {RESTORE}"
            )
        start, end = self._places[mask]
        with path.open("rb") as file:
            file.seek(start)
            encoded = json.loads(file.read(end - start))
        if not isinstance(encoded, list) or len(encoded) != frames:
            found = len(encoded) if isinstance(encoded, list) else f"a {type(encoded).__name__}"
            raise ConceptMapsError(
                f"{str(path)!r} has {found} masks {mask!r} for a video of {frames} frames; expected one for each: "
                + RESTORE
            )
        return encoded

    def _decode(self, mask: str, index: int, encoded: Any, size: torch.Size) -> torch.Tensor:
        try:
            return decode_mask(encoded, *size)
        except (ValueError, TypeError) as error:
            raise ConceptMapsError(
                f"mask {mask!r} of frame {index} in {str(self._folder / MASKS)!r} is broken: {error}; {RESTORE}"
            ) from error


DATASETS = (MeViS,)


def _expressions(path: Path) -> dict[str, _Expression]:
    """Every expression by `VIDEO_NUMBER`, in the order of the file."""
    found = {}
    try:
        for video, content in read_json(path)["videos"].items():
            frames = tuple(sorted(content["frames"]))
            if not frames:
                raise ConceptMapsError(f"{str(path)!r} lists no frames of video {video!r}; {RESTORE}")
            for number, expression in content["expressions"].items():
                text = " ".join(expression["exp"].split())
                masks = tuple(str(mask) for mask in expression["anno_id"])
                found[f"{video}_{number}"] = _Expression(video, frames, text, masks)
    except (AttributeError, KeyError, TypeError) as error:
        raise ConceptMapsError(
            f'{str(path)!r} is not what was expected: {{"videos": {{VIDEO: {{"frames": [...], "expressions": '
            f'{{NUMBER: {{"exp": ..., "anno_id": [...]}}}}}}}}}} ({type(error).__name__}: {error}); {RESTORE}'
        ) from error
    return found


def _find_members(path: Path) -> dict[str, tuple[int, int]]:
    """Where the members of a JSON object start and end in its file, in bytes, so that one can be read alone.

    The masks of the train split take gigabytes as Python objects; their places take a few bytes each.
    """
    decoder = json.JSONDecoder()
    places: dict[str, tuple[int, int]] = {}
    position = 0
    try:
        # One character per byte, whatever the text.
        text = path.read_bytes().decode("latin-1")
        while not _END.match(text, position):
            key, position = decoder.raw_decode(text, _after(_NEXT, text, position))
            start = _after(_COLON, text, position)
            _, position = decoder.raw_decode(text, start)
            places[str(key)] = (start, position)
    except (OSError, ValueError, RecursionError) as error:
        raise ConceptMapsError(
            f"{str(path)!r} cannot be read as a JSON object of masks ({type(error).__name__}: {error}); {RESTORE}"
        ) from error
    return places


def _after(separator: re.Pattern[str], text: str, position: int) -> int:
    match = separator.match(text, position)
    if match is None:
        raise ValueError(f"byte {position} is not {separator.pattern!r}")
    return match.end()
