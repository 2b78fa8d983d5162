"""Animated WebP, every frame kept.

PIL's own writer, as libwebp's encoder of animations behind it, joins frames that look alike, so that a still moment
has fewer frames than its video. Here each frame is coded as a picture of its own, and the container
(https://developers.google.com/speed/webp/docs/riff_container) is put around them.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction

from PIL import Image

_ALPHA, _ANIMATION = 0x10, 0x02  # flags of the file
_REPLACE = 0x02  # flag of a frame: it takes the place of what was there, and is not blended with it


def animated_webp(frames: Sequence[Image.Image], fps: Fraction, *, lossless: bool = False) -> bytes:
    """Pictures as an animated WebP that repeats forever.

    A frame lasts whole milliseconds; each ends as near to its time in the video as that allows, so that a long clip
    does not drift.

    Args:
        frames: RGB or RGBA pictures of one size, at most 16383 pixels wide and high.
        fps: frames per second, at most 1000.
        lossless: keep every pixel, also what is under transparent ones.

    Returns:
        The file.
    """
    width, height = frames[0].size
    flags = _ANIMATION | (_ALPHA if any(frame.mode == "RGBA" for frame in frames) else 0)
    header = _chunk(b"VP8X", struct.pack("<I", flags) + _three_bytes(width - 1) + _three_bytes(height - 1))
    endless = _chunk(b"ANIM", struct.pack("<IH", 0, 0))  # background, number of repetitions
    body = [header, endless]
    for frame, duration in zip(frames, durations(len(frames), fps), strict=True):
        place = b"".join(map(_three_bytes, (0, 0, width - 1, height - 1, duration)))
        body.append(_chunk(b"ANMF", place + bytes([_REPLACE]) + b"".join(_image_chunks(frame, lossless))))
    return _chunk(b"RIFF", b"WEBP" + b"".join(body))


def durations(count: int, fps: Fraction) -> Iterator[int]:
    """Milliseconds that each frame lasts."""
    for index in range(count):
        yield round((index + 1) * 1000 / fps) - round(index * 1000 / fps)


def _image_chunks(frame: Image.Image, lossless: bool) -> Iterable[bytes]:
    """What a WebP of one picture holds beside its header: its colors, and before them its alpha where it is apart."""
    buffer = io.BytesIO()
    frame.save(buffer, "WEBP", lossless=lossless, exact=lossless, quality=90, method=4)
    data = buffer.getvalue()
    start = 12  # behind RIFF, its size and WEBP
    while start < len(data):
        name, size = struct.unpack_from("<4sI", data, start)
        if name in (b"ALPH", b"VP8 ", b"VP8L"):
            yield _chunk(name, data[start + 8 : start + 8 + size])
        start += 8 + size + size % 2


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _three_bytes(number: int) -> bytes:
    return number.to_bytes(3, "little")
