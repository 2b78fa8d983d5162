"""Images and videos, from files or from memory, as one tensor of frames."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
import torch
from diffusers.utils import logging

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.visualize import require

if TYPE_CHECKING:
    from PIL import Image

logger = logging.get_logger(__name__)

_CLIPS = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")
"""Formats whose further pictures are frames; those of a JPEG or an icon are previews of the first."""

_RATE = re.compile(r"Video: .*? ([\d.]+)(k?) fps")


_DAMAGED = (LookupError, NotImplementedError, OSError, EOFError, SyntaxError, TypeError, ValueError, struct.error)
"""What PIL's readers raise on damaged files."""


@dataclass(frozen=True, eq=False)
class Clip:
    """The frames of one video or image.

    Attributes:
        frames: float32 CPU tensor `[frame, 3, height, width]`, RGB in 0..1.
        fps: frames per second; None where the source does not say. Where frames last differently, their mean.
        is_image: whether the source is a picture rather than a video, which may have a single frame as well.
        total: number of frames of the source, of which these are the first.
    """

    frames: torch.Tensor
    fps: float | None
    is_image: bool
    total: int


def read_frames(source: Any, *, max_frames: int | None = None) -> Clip:
    """Read the frames of one video or image.

    Pictures are turned as their EXIF orientation says, transparent ones are laid on white, and gray ones of 16 bits
    keep them all. Videos are turned as their metadata says; their pixels are taken as stored, in 8 bits, and each
    stored frame once.

    Args:
        source: the path of a picture, an animation (GIF, WebP, PNG, AVIF, pages of a TIFF), a video that ffmpeg reads
            or a folder of pictures (in natural order: 2 before 10); or a PIL image, a sequence of them, an array of
            uint8 or of floats in 0..1 `[height, width, 3]` or `[frame, height, width, 3]`, or such a tensor
            `[3, height, width]` or `[frame, 3, height, width]`.
        max_frames: read this many from the start at most; None is all.

    Raises:
        ConceptMapsValueError: no such file, no frames, values outside 0..1 or not a number, frames of different sizes,
            or anything else.
        ConceptMapsError: a file is broken or is neither picture nor video, or imageio-ffmpeg is not installed.
    """
    if max_frames is not None and max_frames < 1:
        raise ConceptMapsValueError(f"max_frames is {max_frames}; expected at least 1, or None for all")
    if isinstance(source, (str, os.PathLike)):
        return _from_path(Path(source), max_frames)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _from_array(source, max_frames)
    from PIL import Image

    if isinstance(source, Image.Image):
        return Clip(_stack([_pixels(source)]), None, is_image=True, total=1)
    if isinstance(source, Sequence) and source and all(isinstance(picture, Image.Image) for picture in source):
        return Clip(_stack(map(_pixels, source[:max_frames])), None, is_image=False, total=len(source))
    raise ConceptMapsValueError(
        f"frames are {type(source).__name__}{' without an item' if source == [] else ''}; expected the path of a "
        f"picture, a video or a folder of pictures, PIL images, an array [frame, height, width, 3] or a tensor "
        f"[frame, 3, height, width]"
    )


def _from_path(path: Path, max_frames: int | None) -> Clip:
    if not path.exists():
        raise ConceptMapsValueError(f"there is no file {str(path)!r}; expected a picture, a video or a folder")
    if path.is_dir():
        files = _folder(path)
        return Clip(_stack(map(_only_picture, files[:max_frames])), None, is_image=False, total=len(files))
    return _picture_file(path, max_frames) or _video_file(path, max_frames)


def _folder(path: Path) -> list[Path]:
    """The pictures of a folder in natural order; other files, and hidden ones, are passed over."""
    from PIL import Image

    suffixes = Image.registered_extensions()
    files = [file for file in path.iterdir() if file.suffix.lower() in suffixes and not file.name.startswith(".")]
    if not files:
        raise ConceptMapsValueError(f"the folder {str(path)!r} holds no picture; expected one file per frame")
    return sorted(files, key=_natural)


def _only_picture(path: Path) -> np.ndarray:
    """The picture `[height, width, 3]` of a file that has one."""
    clip = _picture_file(path, 2)
    if clip is None:
        raise ConceptMapsError(f"{str(path)!r} is no picture, as its name says; remove or replace it")
    if not clip.is_image:
        raise ConceptMapsValueError(
            f"{str(path)!r} holds several frames; expected a folder of single pictures, or read that file alone"
        )
    return clip.frames[0].permute(1, 2, 0).numpy()


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Numbers in a name by value."""
    parts = re.findall(r"\d+|\D+", path.name.casefold())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name


def _picture_file(path: Path, max_frames: int | None) -> Clip | None:
    """A file that PIL reads; None if it is of another kind."""
    from PIL import Image, ImageSequence, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            if file.format == "MPEG":  # PIL knows the sight of it, but reads no frame
                return None
            count = getattr(file, "n_frames", 1) if file.format in _CLIPS else 1
            first = int(file.info.get("default_image", False))  # what a viewer without animation shows instead
            stop = first + (max_frames or count) if count > 1 else 1
            pictures = [picture.copy() for picture in islice(ImageSequence.Iterator(file), first, stop)]
    except UnidentifiedImageError:
        return None
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise ConceptMapsError(f"cannot read the picture {str(path)!r}: {error}") from error
    durations = [picture.info.get("duration", 0) for picture in pictures]  # in milliseconds
    fps = 1000 * len(pictures) / sum(durations) if all(durations) else None
    total = max(count - first, 1)
    return Clip(_stack(map(_pixels, pictures)), fps if count > 1 else None, is_image=count == 1, total=total)


def _pixels(picture: Image.Image) -> np.ndarray:
    """An opaque picture upright, `[height, width, 3]`: uint8, or float32 in 0..1 where it has more bits."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        gray = np.asarray(picture).astype(np.float32) / (1 if picture.mode == "F" else 65535)
        if not (gray.size == 0 or (gray.min() >= 0 and gray.max() <= 1)):
            raise ConceptMapsValueError(
                f"a picture of mode {picture.mode!r} has values from {gray.min():.3g} to {gray.max():.3g} of the "
                f"brightest; expected 0..1: scale it first"
            )
        return np.repeat(gray[..., None], 3, axis=2)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def _video_file(path: Path, max_frames: int | None) -> Clip:
    """A file that ffmpeg reads, frame by frame."""
    ffmpeg = require("imageio_ffmpeg").get_ffmpeg_exe()
    # A playlist may name addresses and other files to fetch; nothing but this file is opened.
    source = ("-nostdin", "-v", "level+info", "-protocol_whitelist", "file", "-i", f"file:{path.absolute()}")
    limit = () if max_frames is None else ("-frames:v", str(max_frames))
    target = ("-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-")
    command = (ffmpeg, *source, "-map", "0:V:0", *limit, *target)
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
            frames = list(_netpbm(cast("IO[bytes]", process.stdout)))
        log.seek(0)
        said = log.read().decode(errors="replace").splitlines()
    errors = [line.split("[error] ")[-1] for line in said if "[error] " in line]
    if process.returncode != 0 or not frames:
        reason = "; ".join(errors[:2]) or f"exit status {process.returncode}, {len(frames)} frames"
        if any("Input #0" in line for line in said) and not any("Video: " in line for line in said):
            reason = "it holds no pictures"
        raise ConceptMapsError(f"cannot read {str(path)!r} as a picture or a video: {reason}")
    if errors:
        logger.warning(
            f"{str(path)!r} is damaged ({errors[0]}): {len(frames)} frames could be read. If some are missing, encode "
            f"it anew."
        )
    total = len(frames) if len(frames) != max_frames else _count_frames(path, len(frames))
    return Clip(_stack(frames), _frames_per_second(said), is_image=False, total=total)


def _count_frames(path: Path, least: int) -> int:
    """Number of frames of a video, at least those that were read; none of them is decoded for it."""
    try:
        count, _ = require("imageio_ffmpeg").count_frames_and_secs(f"file:{path.absolute()}")
    except RuntimeError:  # it cannot tell
        return least
    return max(int(count), least)


def _netpbm(stream: IO[bytes]) -> Iterator[np.ndarray]:
    """Pictures `[height, width, 3]` of a stream of binary PPM."""
    while stream.readline() == b"P6\n":
        width, height = map(int, stream.readline().split())
        stream.readline()
        pixels = stream.read(width * height * 3)
        if len(pixels) < width * height * 3:
            return
        yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def _frames_per_second(said: Sequence[str]) -> float | None:
    """The rate in what ffmpeg says of the input, of its first video that is no cover picture."""
    rates = [_RATE.search(line) for line in said if "Video: " in line and "(attached pic)" not in line]
    if not rates or rates[0] is None:
        return None
    return float(rates[0][1]) * (1000 if rates[0][2] else 1)


def _stack(pictures: Iterable[np.ndarray]) -> torch.Tensor:
    """Pictures `[height, width, 3]` of one size as a float32 tensor `[frame, 3, height, width]` in 0..1."""
    arrays = list(pictures)
    height, width = arrays[0].shape[:2]
    frames = torch.empty(len(arrays), 3, height, width)
    for index, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise ConceptMapsValueError(
                f"frame {index} is {array.shape[0]} x {array.shape[1]} pixels (height x width) and the first {height} "
                f"x {width}; expected one size for a video"
            )
        frames[index] = _from_array(array, None).frames[0]
    return frames


def _from_array(source: np.ndarray | torch.Tensor, max_frames: int | None) -> Clip:
    last = isinstance(source, np.ndarray)
    is_image = source.ndim == 3
    if source.ndim not in (3, 4) or source.shape[-1 if last else -3] != 3 or 0 in source.shape:
        kind, place = ("an array", "[frame, height, width, 3]") if last else ("a tensor", "[frame, 3, height, width]")
        raise ConceptMapsValueError(
            f"frames are {kind} of shape {tuple(source.shape)}; expected {place}, or one frame of it (arrays have "
            f"their channels last, tensors first), with at least one frame and pixel"
        )
    total = 1 if is_image else len(source)
    frames = _native(source[None] if is_image else source[:max_frames])
    frames = frames.permute(0, 3, 1, 2) if last else frames
    if frames.dtype == torch.uint8:
        return Clip(frames.float().div_(255).contiguous(), None, is_image, total)
    low, high = float(frames.min()), float(frames.max())  # not a number, if one is
    if not (low >= 0 and high <= 1):
        raise ConceptMapsValueError(
            f"frames are {str(source.dtype).removeprefix('torch.')} from {low:.3g} to {high:.3g}; expected uint8, or "
            f"floats in 0..1 as pipelines return them (latents are no frames)"
        )
    return Clip(frames.float().contiguous(), None, is_image, total)


def _native(source: np.ndarray | torch.Tensor) -> torch.Tensor:
    """On the CPU, uint8 or floating; an array is copied, because torch takes not all of them (reversed, read-only)."""
    if isinstance(source, np.ndarray) and (source.dtype == np.uint8 or source.dtype.kind == "f"):
        return torch.from_numpy(np.array(source, np.uint8 if source.dtype == np.uint8 else np.float32))
    if isinstance(source, torch.Tensor) and (source.dtype == torch.uint8 or source.is_floating_point()):
        return source.detach().cpu()
    raise ConceptMapsValueError(f"frames are of type {source.dtype}; expected uint8, or floats in 0..1")
