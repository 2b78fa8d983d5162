"""Videos and pictures as files that appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.files import whole_file
from diffusers_concept_maps.visualize import require


def write_video(path: str | os.PathLike[str], frames: Sequence[Image.Image], *, fps: int = 8) -> None:
    """Write pictures as an H.264 video that browsers play.

    An odd width or height is made even by repeating the last column or row, never by scaling.

    Args:
        path: file to write, such as `dog.mp4`; an existing one is replaced.
        frames: RGB pictures of one size.
        fps: frames per second.

    Raises:
        ConceptMapsValueError: no frames, frames of different sizes, or a file name that does not end in `.mp4`.
        ConceptMapsError: imageio-ffmpeg is not installed, the folder is not there, or the encoder failed.
    """
    ffmpeg = require("imageio_ffmpeg").get_ffmpeg_exe()
    _check(frames)
    if Path(path).suffix.lower() != ".mp4":
        raise ConceptMapsValueError(f"{os.fspath(path)!r} is no name of an MP4 file; let it end in .mp4")
    with whole_file(path) as partial:
        _encode(ffmpeg, partial, frames, fps)


def write_image(path: str | os.PathLike[str], picture: Image.Image) -> None:
    """Write a picture in the format that its file name says.

    Args:
        path: file to write, such as `sheet.png`; an existing one is replaced.
        picture: what to write.

    Raises:
        ConceptMapsError: the folder is not there.
    """
    with whole_file(path) as partial:
        picture.save(partial)


def _check(frames: Sequence[Image.Image]) -> None:
    if not frames:
        raise ConceptMapsValueError("no frames; a video has at least one")
    first = frames[0]
    for index, frame in enumerate(frames):
        if frame.size != first.size:
            raise ConceptMapsValueError(
                f"frame {index} is {frame.width} x {frame.height} pixels; expected {first.width} x {first.height}, as "
                f"the first"
            )


def _encode(ffmpeg: str, path: Path, frames: Sequence[Image.Image], fps: int) -> None:
    """Run the encoder, and look at how it ended: imageio's writers do not, and keep what a full disk cut off.

    `path` is absolute, so that its name is never read as an option or a protocol.
    """
    pixels = np.stack([_even(np.asarray(frame.convert("RGB"))) for frame in frames])
    _, height, width, _ = pixels.shape
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-")
    codec = ("-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p", "-movflags", "+faststart")
    command = (ffmpeg, "-y", "-v", "error", *source, *codec, str(path))
    done = subprocess.run(command, input=pixels.tobytes(), capture_output=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
        raise ConceptMapsError(f"no video could be written to {str(path.parent)!r}: {reason}")


def _even(frame: np.ndarray) -> np.ndarray:
    """An even number of rows and columns, which the chroma subsampling of H.264 needs."""
    return np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
