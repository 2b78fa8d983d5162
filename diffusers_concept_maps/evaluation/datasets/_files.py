"""Files of data sets: paths that stay below the root, and images, lists and JSON or a clear error."""

from __future__ import annotations

import importlib
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from types import ModuleType
from typing import Any

import numpy as np
import torch

from diffusers_concept_maps.errors import ConceptMapsError

RESTORE = "fetch or unpack the data set again"
"""What to do about a file that is missing or broken."""


def require(module: str) -> ModuleType:
    """Import a module of the `data` extra, at its first use.

    Raises:
        ConceptMapsError: it cannot be imported; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConceptMapsError(
            f'reading data sets needs {module} ({error}); install it with: pip install "diffusers-concept-maps[data]"'
        ) from error


def locate(root: str | os.PathLike[str], marker: str, folders: Sequence[str] = ()) -> Path:
    """The folder of a data set: the root, or a folder in it that the archive unpacks to.

    Args:
        root: what the user named.
        marker: a file or folder that the data set has.
        folders: where below the root it may be.

    Raises:
        ConceptMapsError: `marker` is in none of them.
    """
    for folder in (Path(root), *(Path(root, folder) for folder in folders)):
        if (folder / marker).exists():
            return folder
    below = f", or in {' or '.join(folders)} below it" if folders else ""
    raise ConceptMapsError(
        f"{os.fspath(root)!r} is not the root of this data set: expected {marker!r} in it{below}; unpack the data set "
        "there, or name the folder that holds it"
    )


def below(folder: Path, *names: str, listed_in: Path) -> Path:
    """A path below a folder, from names that a file of the data set gives.

    Args:
        folder: where to stay.
        names: relative names, from a file that may come from anywhere.
        listed_in: that file.

    Raises:
        ConceptMapsError: a name leads elsewhere.
    """
    for name in names:
        # Windows' rules see drives, and both kinds of slashes, on every system.
        path = PureWindowsPath(name)
        if not path.parts or path.anchor or ".." in path.parts or "\0" in name:
            raise ConceptMapsError(
                f"{str(listed_in)!r} names {name!r}; expected a relative name below its own folder, without '..': "
                + RESTORE
            )
    return folder.joinpath(*names)


def _broken(path: Path, expected: str, error: Exception) -> ConceptMapsError:
    if not path.exists():
        return ConceptMapsError(f"there is no {str(path)!r}; expected {expected}: {RESTORE}")
    return ConceptMapsError(f"{str(path)!r} cannot be read as {expected} ({type(error).__name__}: {error}); {RESTORE}")


def read_lines(path: Path) -> list[str]:
    """Lines of a list, stripped, without the empty ones.

    Raises:
        ConceptMapsError: the file is missing, not UTF-8 text, or empty.
    """
    expected = "a list with one name per line"
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, expected, error) from error
    if not any(lines):
        raise ConceptMapsError(f"{str(path)!r} is empty; expected {expected}: {RESTORE}")
    return [line for line in lines if line]


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ConceptMapsError: the file is missing, truncated, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, "JSON", error) from error
    if not isinstance(content, dict):
        raise ConceptMapsError(
            f"{str(path)!r} holds a JSON {type(content).__name__}; expected an object with names: {RESTORE}"
        )
    return content


def read_image(path: Path) -> torch.Tensor:
    """An image in RGB.

    Returns:
        uint8 `[3, height, width]`.

    Raises:
        ConceptMapsError: the file is missing, truncated, or no image.
    """
    return torch.from_numpy(_pixels(path, "an image", "RGB")).permute(2, 0, 1).contiguous()


def read_values(path: Path) -> torch.Tensor:
    """The values of a label image: of a palette image its indices, not its colors.

    Returns:
        int64 `[height, width]`.

    Raises:
        ConceptMapsError: the file is missing, truncated, no image, or one with colors in place of values.
    """
    values = _pixels(path, "a label image", None)
    if values.ndim != 2:
        raise ConceptMapsError(
            f"{str(path)!r} is an image of {values.shape[-1]} channels; expected a palette or gray image whose values "
            f"are labels: {RESTORE}"
        )
    return torch.from_numpy(values).long()


def read_mask(path: Path) -> torch.Tensor:
    """A mask of one object or several, which shows them in any value or color but 0 or black.

    Returns:
        bool `[height, width]`.

    Raises:
        ConceptMapsError: the file is missing, truncated, or no image.
    """
    pixels = _pixels(path, "a mask", None)
    # A fourth channel is opacity.
    return torch.from_numpy(pixels[..., :3].any(axis=-1) if pixels.ndim == 3 else pixels != 0)


def _pixels(path: Path, expected: str, mode: str | None) -> np.ndarray[Any, Any]:
    image_module = require("PIL.Image")
    errors = (OSError, ValueError, SyntaxError, EOFError, struct.error, image_module.DecompressionBombError)
    try:
        with image_module.open(path) as image:
            return np.array(image if mode is None else image.convert(mode))
    except errors as error:
        raise _broken(path, expected, error) from error


def frame_files(folder: Path) -> dict[str, Path]:
    """The frames of a video, by name without suffix, in the order of their names.

    Raises:
        ConceptMapsError: there is no such folder, or no frame in it.
    """
    files = sorted(path for path in folder.glob("*.jpg") if not path.name.startswith("."))
    if not files:
        raise ConceptMapsError(f"{str(folder)!r} has no frames; expected the *.jpg files of a video: {RESTORE}")
    return {path.stem: path for path in files}


def frame_pairs(frame_folder: Path, label_folder: Path) -> list[tuple[Path, Path]]:
    """The frames of a video, each with its label image, in order.

    Raises:
        ConceptMapsError: there are no frames, or frames and label images are not the same.
    """
    frames = frame_files(frame_folder)
    labels = {path.stem: path for path in label_folder.glob("*.png") if not path.name.startswith(".")}
    unpaired = sorted(frames.keys() ^ labels.keys())
    if unpaired:
        raise ConceptMapsError(
            f"{str(frame_folder)!r} has {len(frames)} frames and {str(label_folder)!r} {len(labels)} label images, "
            f"and {unpaired[0]!r} is in one of them only; expected a label image for each frame: {RESTORE}, or take "
            "a split whose segmentations are published"
        )
    return [(path, labels[stem]) for stem, path in frames.items()]


def stack(frames: list[torch.Tensor], paths: Sequence[Path]) -> torch.Tensor:
    """Frames or label images of a video as one tensor, the frame first.

    Raises:
        ConceptMapsError: one differs from the first in size.
    """
    for frame, path in zip(frames, paths, strict=True):
        if frame.shape != frames[0].shape:
            raise ConceptMapsError(
                f"{str(path)!r} has height and width {list(frame.shape[-2:])} where {str(paths[0])!r} has "
                f"{list(frames[0].shape[-2:])}; expected one size in a video: {RESTORE}"
            )
    return torch.stack(frames)
