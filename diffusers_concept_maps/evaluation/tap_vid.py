"""TAP-Vid: videos with point tracks, from the pickles that its authors publish.

Source: Doersch et al., "TAP-Vid: A Benchmark for Tracking Any Point in a Video", NeurIPS 2022 (arXiv 2211.03726).

Coordinates: the files hold x over width and y over height, where 0 is the outer edge of the first pixel and 1 that of
the last one, so that the center of pixel i of n is at (i + 0.5) / n. Samples hold pixel-center coordinates, where it
is at i: `x = stored * width - 0.5`, with the width of the sample's own frames, resized or not.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.evaluation.array_pickle import load_array_pickle, stored_array
from diffusers_concept_maps.evaluation.tracking import RESOLUTION

_PART = re.compile(r"(\d+)_of_(\d+)\.pkl")
_FIELDS = ("video", "points", "occluded")


@dataclass(frozen=True)
class TrackSample:
    """A video with true tracks.

    Attributes:
        name: unique and stable.
        frames: uint8 `[frame, 3, height, width]`.
        tracks: float32 `[point, frame, 2]`: (x, y) in pixel-center coordinates of `frames`; where a point is not
            visible, whatever the file has.
        visibility: bool `[point, frame]`.
    """

    name: str
    frames: torch.Tensor
    tracks: torch.Tensor
    visibility: torch.Tensor


def read_davis(path: str | os.PathLike[str], *, size: tuple[int, int] | None = RESOLUTION) -> Iterator[TrackSample]:
    """TAP-Vid-DAVIS: one pickle of a dict from the name of each video to its frames and tracks.

    RoboTAP's files have this form as well. A pickle can only be read as a whole; what was yielded is let go of.

    Args:
        path: such as `tapvid_davis.pkl`.
        size: height and width to resize the videos to, 256 x 256 being the protocol; None to leave them as they are.

    Yields:
        The videos in the file's order, under their names.

    Raises:
        ConceptMapsValueError: a size below one pixel.
        ConceptMapsError: the file cannot be read, holds more than arrays and strings, or is no such data set.
    """
    yield from _samples(Path(path), dict, "", size)


def read_rgb_stacking(
    path: str | os.PathLike[str], *, size: tuple[int, int] | None = RESOLUTION
) -> Iterator[TrackSample]:
    """TAP-Vid-RGB-Stacking: one pickle of a list of videos.

    Args:
        path: such as `tapvid_rgb_stacking.pkl`.
        size: as for `read_davis`.

    Yields:
        The videos in the file's order, as `rgb_stacking_000` and so on.

    Raises:
        ConceptMapsValueError: a size below one pixel.
        ConceptMapsError: as for `read_davis`.
    """
    yield from _samples(Path(path), list, "rgb_stacking", size)


def read_kinetics(
    folder: str | os.PathLike[str], *, size: tuple[int, int] | None = RESOLUTION
) -> Iterator[TrackSample]:
    """TAP-Vid-Kinetics: a folder of pickles, each with a part of the videos, whose frames may be JPEG files.

    One part is in memory at a time, and of its JPEG files one video is decoded at a time. TAP-Vid's script moves the
    annotated points by half a pixel of the original video before it writes them; as in the benchmark's own reader,
    what the files then hold is taken like that of the other sets.

    Args:
        folder: that of `0000_of_0010.pkl`, `0001_of_0010.pkl` and so on.
        size: as for `read_davis`.

    Yields:
        The videos in the order of the files, as `0000_of_0010_000` and so on, or under the names that a file has.

    Raises:
        ConceptMapsValueError: a size below one pixel.
        ConceptMapsError: there is no such file, one is missing before the last, or as for `read_davis`.
    """
    for path in _parts(Path(folder)):
        yield from _samples(path, dict | list, path.stem, size)


def _parts(folder: Path) -> list[Path]:
    """The files of Kinetics without a gap, since the scores of fewer videos are those of another benchmark."""
    found = sorted(path for path in folder.glob("*.pkl") if _PART.fullmatch(path.name))
    if not found:
        raise ConceptMapsError(
            f"{str(folder)!r} has no file such as 0000_of_0010.pkl; expected what TAP-Vid's generate_tapvid.py writes"
        )
    parts = {path.name for path in found}
    count = found[0].stem.rpartition("_")[2]
    for number in range(len(found)):
        if (name := f"{number:04}_of_{count}.pkl") not in parts:
            raise ConceptMapsError(f"{str(folder)!r} lacks {name}; expected every part of one run, without a gap")
    return found


def _samples(path: Path, kind: type | UnionType, prefix: str, size: tuple[int, int] | None) -> Iterator[TrackSample]:
    if size is not None and min(size) < 1:
        raise ConceptMapsValueError(f"size is {size}; expected height and width of at least one pixel")
    videos: Any = load_array_pickle(path)
    if not isinstance(videos, kind) or not videos:
        expected = "a dict" if kind is dict else "a list"
        raise ConceptMapsError(
            f"{str(path)!r} holds {_describe(videos)}; expected {expected} of videos, at least one, as TAP-Vid's files"
        )
    if isinstance(videos, list):
        videos = {f"{prefix}_{index:03d}": video for index, video in enumerate(videos)}
    for name in list(videos):
        yield _sample(f"{str(path)!r}, video {name!r}", str(name), videos.pop(name), size)


def _sample(where: str, name: str, video: Any, size: tuple[int, int] | None) -> TrackSample:
    if not isinstance(video, dict) or not video.keys() >= set(_FIELDS):
        raise ConceptMapsError(f"{where} is {_describe(video)}; expected a dict of {', '.join(_FIELDS)}")
    points, occluded = stored_array(video["points"]), stored_array(video["occluded"])
    if points is None or points.ndim != 3 or points.shape[2] != 2 or points.dtype.kind != "f":
        raise ConceptMapsError(f"{where}: points are {_describe(video['points'])}; expected floats [point, frame, 2]")
    if occluded is None or occluded.shape != points.shape[:2] or occluded.dtype != bool:
        raise ConceptMapsError(
            f"{where}: occluded is {_describe(video['occluded'])}; expected bool {points.shape[:2]}, as points"
        )
    if not np.isfinite(points[~occluded]).all():
        raise ConceptMapsError(f"{where}: a visible point is nowhere (not finite); the file is damaged")
    frames = _frames(where, video["video"], size)
    if len(frames) != points.shape[1]:
        raise ConceptMapsError(f"{where}: {len(frames)} frames, and tracks of {points.shape[1]}; expected as many")
    height, width = frames.shape[2:]
    tracks = points.astype(np.float64) * (width, height) - 0.5
    return TrackSample(name, frames, torch.from_numpy(tracks.astype(np.float32)), torch.from_numpy(~occluded))


def _frames(where: str, video: Any, size: tuple[int, int] | None) -> torch.Tensor:
    """Frames `[frame, 3, height, width]` of an array of pixels or of JPEG files, resized as the benchmark does it."""
    stored = stored_array(video)
    if stored is not None and stored.ndim == 4 and stored.shape[3] == 3 and stored.dtype == np.uint8 and stored.size:
        pictures: Iterator[Image.Image] = map(Image.fromarray, stored)
    else:
        pictures = _decoded(where, _files(where, video))
    frames: list[np.ndarray] = []
    sizes = set()
    for picture in pictures:
        sizes.add(picture.size)
        if len(sizes) > 1:
            raise ConceptMapsError(f"{where}: frame {len(frames)} is not of the first one's size; expected one size")
        if size is not None and picture.size != size[::-1]:
            picture = picture.resize(size[::-1], Image.Resampling.LANCZOS)
        frames.append(np.asarray(picture).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(frames))


def _files(where: str, video: Any) -> list[bytes]:
    """The JPEG files of a video: an array of byte strings, or a list of them."""
    stored = stored_array(video)
    files = stored.tolist() if stored is not None and stored.ndim == 1 and stored.dtype.kind == "S" else video
    if not isinstance(files, list | tuple) or not files or not all(isinstance(file, bytes) for file in files):
        raise ConceptMapsError(
            f"{where}: video is {_describe(video)}; expected uint8 [frame, height, width, 3] or a JPEG file per frame"
        )
    return list(files)


def _decoded(where: str, files: list[bytes]) -> Iterator[Image.Image]:
    for index, file in enumerate(files):
        try:
            with Image.open(io.BytesIO(file), formats=["JPEG"]) as picture:
                yield picture.convert("RGB")
        except OSError as error:
            raise ConceptMapsError(f"{where}: frame {index} is no JPEG file ({error})") from error


def _describe(value: Any) -> str:
    array = stored_array(value)
    if array is not None:
        return f"{array.dtype} of shape {array.shape}"
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(str, list(value)[:5])) or 'nothing'}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, list | tuple) else type(value).__name__
