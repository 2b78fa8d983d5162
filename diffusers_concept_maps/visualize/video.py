"""Videos and pictures as files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError


def write_video(path: str | os.PathLike[str], frames: Sequence[Image.Image], *, fps: int = 8) -> None:
    """Write pictures as an H.264 video that browsers play.

    An odd width or height is made even by repeating the last column or row, never by scaling.

    Args:
        path: file to write, such as `dog.mp4`; an existing one is replaced.
        frames: RGB pictures of one size.
        fps: frames per second.

    Raises:
        ConceptMapsValueError: no frames, or frames of different sizes.
        ConceptMapsError: imageio-ffmpeg is not installed.
    """
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ConceptMapsError(
            'videos need imageio-ffmpeg; install it with: pip install "diffusers-concept-maps[viz]"'
        ) from error
    _check(frames)
    target = Path(path)
    partial = target.with_name(f".{target.stem}.partial{target.suffix}")
    try:
        pixels = [_even(np.asarray(frame.convert("RGB"))) for frame in frames]
        height, width, _ = pixels[0].shape
        writer = imageio_ffmpeg.write_frames(
            str(partial), (width, height), fps=fps, codec="libx264", pix_fmt_out="yuv420p", macro_block_size=1
        )
        with closing(writer):
            writer.send(None)  # starts the encoder
            for frame in pixels:
                writer.send(np.ascontiguousarray(frame))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_image(path: str | os.PathLike[str], picture: Image.Image) -> None:
    """Write a picture in the format that its file name says.

    Args:
        path: file to write, such as `sheet.png`; an existing one is replaced.
        picture: what to write.
    """
    target = Path(path)
    partial = target.with_name(f".{target.stem}.partial{target.suffix}")
    try:
        picture.save(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


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


def _even(frame: np.ndarray) -> np.ndarray:
    """An even number of rows and columns, which the chroma subsampling of H.264 needs."""
    return np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
