"""Sequences of 16-bit PNG files: gray, RGB or RGBA."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from diffusers_concept_maps.visualize.export._base import Format, Picture, Write

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOR_TYPES = {1: 0, 3: 2, 4: 6}  # by number of channels, see the PNG specification, 11.2.1
_UP = 2  # the filter that takes the difference to the row above


@contextmanager
def open_sequence(path: Path, picture: Picture) -> Iterator[Write]:
    """Make the folder `path`; every frame becomes a file `00000.png` and so on in it."""
    path.mkdir()
    numbers = itertools.count()

    def write(frame: np.ndarray) -> None:
        (path / f"{next(numbers):05d}.png").write_bytes(encode(frame))

    yield write


def encode(frame: np.ndarray) -> bytes:
    """A PNG file of 16 bits for each channel, which Pillow can write of gray only.

    Args:
        frame: float `[height, width, channel]` in 0..1.
    """
    height, width, channels = frame.shape
    rows = np.rint(frame * 65535).astype(">u2").reshape(height, -1).view(np.uint8)
    above = np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])
    lines = np.concatenate([np.full((height, 1), _UP, np.uint8), rows - above], 1)
    header = struct.pack(">IIBBBBB", width, height, 16, _COLOR_TYPES[channels], 0, 0, 0)
    return (
        _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(lines.tobytes())) + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _needs_nothing() -> None:
    pass


FORMATS = (Format("png", "", open_sequence, levels=65535, alpha=True, check=_needs_nothing),)
