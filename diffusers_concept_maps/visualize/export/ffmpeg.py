"""Videos by the ffmpeg that comes with imageio-ffmpeg: FFV1, ProRes 4444 and H.264, frame by frame."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.visualize import require
from diffusers_concept_maps.visualize.export._base import Format, Picture, Write

_INPUT = {1: "gray16le", 3: "rgb48le", 4: "rgba64le"}  # by number of channels
_BT709 = (
    "-vf",
    "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,"
    "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709",
)
_FFV1: dict[int, tuple[str, ...]] = {
    channels: ("-c:v", "ffv1", "-level", "3", "-g", "1", "-slicecrc", "1", "-pix_fmt", pixels)
    for channels, pixels in {1: "gray16le", 3: "gbrp16le", 4: "gbrap16le"}.items()
}
_PRORES: dict[int, tuple[str, ...]] = {
    channels: ("-c:v", "prores_ks", "-profile:v", "4444", "-vendor", "apl0", *_BT709, "-pix_fmt", pixels, *more)
    for channels, pixels, more in (
        (1, "yuv444p10le", ()),
        (3, "yuv444p10le", ()),
        (4, "yuva444p10le", ("-alpha_bits", "16")),
    )
}
_H264: dict[int, tuple[str, ...]] = dict.fromkeys(
    (1, 3), ("-c:v", "libx264", "-crf", "12", *_BT709, "-pix_fmt", "yuv420p", "-movflags", "+faststart")
)


@contextlib.contextmanager
def open_video(path: Path, picture: Picture, *, codecs: Mapping[int, tuple[str, ...]], even: bool) -> Iterator[Write]:
    """Run the encoder for the time of the context.

    Args:
        path: of the video; absolute, so that it is never read as an option or a protocol.
        picture: what its frames have in common.
        codecs: arguments of the encoder by number of channels.
        even: repeat the last row or column of an odd size.

    Raises:
        ConceptMapsError: imageio-ffmpeg is not installed, or the encoder failed.
    """
    height, width = (pixels + (pixels % 2 if even else 0) for pixels in picture.size)
    pad = ((0, height - picture.size[0]), (0, width - picture.size[1]), (0, 0))
    source = (
        "-f",
        "rawvideo",
        "-pix_fmt",
        _INPUT[picture.channels],
        "-s",
        f"{width}x{height}",
        "-r",
        f"{picture.fps}",
    )
    command = (_executable(), "-y", "-v", "error", *source, "-i", "-", *codecs[picture.channels], str(path.absolute()))
    with tempfile.TemporaryFile() as errors, _process(command, errors) as encoder:
        assert encoder.stdin is not None  # a pipe
        pipe = encoder.stdin

        def write(frame: np.ndarray) -> None:
            pixels = np.rint(np.pad(frame, pad, mode="edge") * 65535).astype("<u2")
            with _told(encoder, errors, path):
                pipe.write(pixels.tobytes())

        yield write
        with _told(encoder, errors, path):
            pipe.close()
        if encoder.wait() != 0:
            raise _failure(encoder, errors, path)


@contextlib.contextmanager
def _process(command: tuple[str, ...], errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone after the context."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


@contextlib.contextmanager
def _told(encoder: subprocess.Popen[bytes], errors: IO[bytes], path: Path) -> Iterator[None]:
    """An encoder that has gone away breaks the pipe; what it has said is why."""
    try:
        yield
    except BrokenPipeError as error:
        encoder.wait()
        raise _failure(encoder, errors, path) from error


def _failure(encoder: subprocess.Popen[bytes], errors: IO[bytes], path: Path) -> ConceptMapsError:
    errors.seek(0)
    reason = errors.read().decode(errors="replace").strip() or f"exit status {encoder.returncode}"
    return ConceptMapsError(f"no video could be written to {str(path.parent)!r}: {reason}")


def _executable() -> str:
    return str(require("imageio_ffmpeg", "export").get_ffmpeg_exe())


def _check() -> None:
    _executable()


def _format(name: str, suffix: str, codecs: dict[int, tuple[str, ...]], levels: int, *, even: bool = False) -> Format:
    opened = functools.partial(open_video, codecs=codecs, even=even)
    return Format(name, suffix, opened, levels=levels, alpha=4 in codecs, check=_check, even=even)


FORMATS = (
    _format("ffv1", ".mkv", _FFV1, 65535),
    _format("prores", ".mov", _PRORES, 1023),
    _format("h264", ".mp4", _H264, 255, even=True),
)
