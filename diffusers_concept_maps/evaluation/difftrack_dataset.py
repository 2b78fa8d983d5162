"""DiffTrack's data set: prompts of generated videos, and the tracks of points in them.

Source: Nam et al., "Emergent Temporal Correspondences from Video Diffusion Transformers", 2025 (arXiv 2506.17220).

A folder `<model>/<fg or bg>` has `prompt.txt` and, by the number of a line of it, `tracks/000.npy` and
`visibility/000.npy`; image-to-video models also `image/000.png`. The videos are not part of it: they are generated
anew from the prompts, with the seed that the authors used. The tracks are those of another tracker on the authors'
videos, and hold only where the video comes out as theirs did.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsError

SEED = 42
"""Of the generator that the authors' videos were made with."""

SIZE = (480, 720)
"""Height and width of the videos whose pixels the tracks are in."""

_NUMBERED = re.compile(r"\d{3,}\.npy")


@dataclass(frozen=True)
class MatchingSample:
    """A prompt, and the tracks of the video that is generated from it.

    Attributes:
        name: the number of the prompt, such as "007".
        prompt: what to generate.
        tracks: float32 `[point, frame, 2]`: (x, y) in pixel-center coordinates of frames of `SIZE`.
        visibility: bool `[point, frame]`; a point that is not on what it is meant to be on is never visible.
        image: uint8 `[3, height, width]`, the first frame that an image-to-video model starts from; else None.
    """

    name: str
    prompt: str
    tracks: torch.Tensor
    visibility: torch.Tensor
    image: torch.Tensor | None


def read_difftrack(folder: str | os.PathLike[str]) -> Iterator[MatchingSample]:
    """The samples of one model and one kind of points.

    There may be more prompts than tracks, as in the published set for HunyuanVideo, which has 46: prompts without
    tracks are passed over, and the others keep their numbers.

    Args:
        folder: such as `dataset/cogvideox_t2v_2b/fg`.

    Yields:
        The samples that have tracks, by number.

    Raises:
        ConceptMapsError: the folder is no such data set, a file is missing or damaged, or tracks have no prompt.
    """
    folder = Path(folder)
    prompts = _prompts(folder / "prompt.txt")
    files = sorted(path for path in folder.glob("tracks/*.npy") if _NUMBERED.fullmatch(path.name))
    if not files:
        raise ConceptMapsError(f"{str(folder)!r} has no tracks/000.npy; expected a folder <model>/<fg or bg>")
    images = (folder / "image").is_dir()
    for path in files:
        number = int(path.stem)
        if number >= len(prompts) or not prompts[number].strip():
            raise ConceptMapsError(
                f"{str(path)!r} has no prompt: {str(folder / 'prompt.txt')!r} has {len(prompts)} lines; expected the "
                f"prompt of 000 in the first, and so on"
            )
        tracks, visibility = _tracks(path, folder / "visibility" / path.name)
        image = _image(folder / "image" / f"{path.stem}.png") if images else None
        yield MatchingSample(path.stem, prompts[number].strip(), tracks, visibility, image)


def _prompts(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConceptMapsError(f"cannot read the prompts {str(path)!r}: {error}") from error


def _tracks(path: Path, visibility_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Tracks and visibility, which the files have as `[1, frame, point, ...]`, by point."""
    tracks, visibility = _array(path), _array(visibility_path)
    if tracks.ndim != 4 or (tracks.shape[0], tracks.shape[3]) != (1, 2) or tracks.dtype.kind != "f":
        raise ConceptMapsError(
            f"{str(path)!r} is {tracks.dtype} of shape {tracks.shape}; expected floats [1, frame, point, 2]"
        )
    if visibility.shape != tracks.shape[:3] or visibility.dtype != bool:
        raise ConceptMapsError(
            f"{str(visibility_path)!r} is {visibility.dtype} of shape {visibility.shape}; expected bool of shape "
            f"{tracks.shape[:3]}, as its tracks"
        )
    if not np.isfinite(tracks[visibility]).all():
        raise ConceptMapsError(f"{str(path)!r} has a visible point that is nowhere (not finite); the file is damaged")
    by_point = tracks[0].astype(np.float32).swapaxes(0, 1)
    return torch.from_numpy(by_point.copy()), torch.from_numpy(visibility[0].T.copy())


def _array(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ConceptMapsError(f"cannot read {str(path)!r} as an array: {error}") from error


def _image(path: Path) -> torch.Tensor:
    try:
        with Image.open(path) as picture:
            return torch.from_numpy(np.asarray(picture.convert("RGB")).transpose(2, 0, 1).copy())
    except OSError as error:
        raise ConceptMapsError(f"cannot read {str(path)!r} as a picture: {error}") from error
