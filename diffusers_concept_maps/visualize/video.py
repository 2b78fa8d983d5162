"""Videos, animations and pictures as files that appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.files import whole_file
from diffusers_concept_maps.visualize import require
from diffusers_concept_maps.visualize.animation import animated_webp

_PALETTE = "split[a][b];[a]palettegen=stats_mode=full:reserve_transparent=0[p];[b][p]paletteuse=dither=sierra2_4a"

_ENCODERS = {
    ".mp4": ("-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv420p", "-movflags", "+faststart"),
    ".webm": ("-c:v", "libvpx-vp9", "-crf", "18", "-b:v", "0"),
    ".gif": ("-lavfi", _PALETTE, "-loop", "0"),
}
"""What ffmpeg is told, by suffix."""

_SLOWEST, _FASTEST, _FASTEST_GIF = 0.01, 1000, 50
"""Frames per second: a frame of a WebP lasts at least a millisecond, and browsers slow down what is a faster GIF."""

_LONGEST_SIDE_OF_WEBP = 16383


def write_video(
    path: str | os.PathLike[str], frames: Sequence[Image.Image], *, fps: float = 8, lossless: bool = False
) -> None:
    """Write pictures as a video or an animation, by the suffix of the file; every frame is kept.

    - `.mp4`: H.264, which browsers play; no alpha.
    - `.webm`: VP9, with alpha where the pictures have it.
    - `.webp`: animated WebP, with alpha likewise; `lossless` keeps every pixel.
    - `.gif`: 256 colors for the whole clip, no alpha; a frame lasts whole hundredths of a second.

    In an MP4 or WebM, an odd width or height is made even by repeating the last column or row, never by scaling. What
    is transparent is laid on white where alpha cannot be kept.

    Args:
        path: file to write, such as `dog.mp4`; an existing one is replaced.
        frames: RGB or RGBA pictures of one size.
        fps: frames per second, 0.01 to 1000; in a GIF to 50.
        lossless: for WebP alone.

    Raises:
        ConceptMapsValueError: no frames, frames of different sizes or too large for the format, another suffix, or a
            rate or `lossless` that the format has not.
        ConceptMapsError: imageio-ffmpeg is not installed (a WebP needs none), the folder is not there, or the encoder
            failed.
    """
    suffix = Path(path).suffix.lower()
    ffmpeg = "" if suffix == ".webp" else require("imageio_ffmpeg").get_ffmpeg_exe()
    _check(frames)
    rate = _rate(path, suffix, fps, lossless)
    if suffix == ".webp" and max(frames[0].size) > _LONGEST_SIDE_OF_WEBP:
        raise ConceptMapsValueError(
            f"frames of {frames[0].width} x {frames[0].height} pixels; expected at most {_LONGEST_SIDE_OF_WEBP} on a "
            f"side in a WebP: make them smaller, or write an MP4"
        )
    pictures = _same_mode(frames, opaque=suffix in (".mp4", ".gif"))
    with whole_file(path) as partial:
        if suffix == ".webp":
            partial.write_bytes(animated_webp(pictures, rate, lossless=lossless))
        else:
            _encode(ffmpeg, partial, pictures, rate)


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


def _rate(path: str | os.PathLike[str], suffix: str, fps: float, lossless: bool) -> Fraction:
    """Frames per second as ffmpeg takes them, if the format can have them."""
    if suffix not in (*_ENCODERS, ".webp"):
        raise ConceptMapsValueError(
            f"{os.fspath(path)!r} is no name of a video; let it end in .mp4 (or .webm, .webp, .gif)"
        )
    if lossless and suffix != ".webp":
        raise ConceptMapsValueError(
            f"lossless=True for {os.fspath(path)!r}; only a .webp can be: write one, or leave lossless out"
        )
    fastest = _FASTEST_GIF if suffix == ".gif" else _FASTEST
    if not _SLOWEST <= fps <= fastest:
        raise ConceptMapsValueError(f"fps is {fps}; expected {_SLOWEST} to {fastest} frames per second in a {suffix}")
    return Fraction(fps).limit_denominator(10000)


def _same_mode(frames: Sequence[Image.Image], *, opaque: bool) -> list[Image.Image]:
    """RGB pictures; RGBA ones if one of them has transparency and that can be kept."""
    if not any(frame.has_transparency_data for frame in frames):
        return [frame.convert("RGB") for frame in frames]
    pictures = [frame.convert("RGBA") for frame in frames]
    if not opaque:
        return pictures
    white = Image.new("RGBA", frames[0].size, "white")
    return [Image.alpha_composite(white, picture).convert("RGB") for picture in pictures]


def _encode(ffmpeg: str, path: Path, frames: Sequence[Image.Image], fps: Fraction) -> None:
    """Run the encoder, and look at how it ended: imageio's writers do not, and keep what a full disk cut off.

    `path` is absolute, so that its name is never read as an option or a protocol.
    """
    suffix, has_alpha = path.suffix.lower(), frames[0].mode == "RGBA"
    pixels = np.stack([np.asarray(frame) for frame in frames])
    if suffix != ".gif":
        pixels = _even(pixels)
    _, height, width, _ = pixels.shape
    layout = "rgba" if has_alpha else "rgb24"
    source = ("-f", "rawvideo", "-pix_fmt", layout, "-s", f"{width}x{height}", "-r", str(fps), "-i", "-")
    colors = ("-pix_fmt", "yuva420p" if has_alpha else "yuv420p") if suffix == ".webm" else ()
    command = (ffmpeg, "-y", "-v", "error", *source, *_ENCODERS[suffix], *colors, str(path))
    done = subprocess.run(command, input=pixels.tobytes(), capture_output=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
        raise ConceptMapsError(f"no video could be written to {str(path.parent)!r}: {reason}")


def _even(frames: np.ndarray) -> np.ndarray:
    """An even number of rows and columns, which the chroma subsampling of the encoders needs."""
    _, height, width, _ = frames.shape
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
