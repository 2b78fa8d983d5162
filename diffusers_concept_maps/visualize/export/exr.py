"""Sequences of OpenEXR files of float32: gray as the scores themselves, RGB, or RGBA with alpha multiplied in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from diffusers_concept_maps.visualize import require
from diffusers_concept_maps.visualize.export._base import Format, Picture, Write

_CHANNELS = {1: "Y", 3: "RGB", 4: "RGBA"}


@contextmanager
def open_sequence(path: Path, picture: Picture) -> Iterator[Write]:
    """Make the folder `path`; every frame becomes a file `00000.exr` and so on in it."""
    exr = require("OpenEXR", "export")
    path.mkdir()
    numbers = itertools.count()
    header = {"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage, "framesPerSecond": float(picture.fps)}

    def write(frame: np.ndarray) -> None:
        pixels = frame.astype(np.float32)
        if picture.channels == 4:
            pixels[..., :3] *= pixels[..., 3:]  # as EXR has it
        name = _CHANNELS[picture.channels]
        channels = {name: pixels[..., 0]} if picture.channels == 1 else {name: pixels}
        with exr.File(header, {key: np.ascontiguousarray(value) for key, value in channels.items()}) as file:
            file.write(str(path / f"{next(numbers):05d}.exr"))

    yield write


def _check() -> None:
    require("OpenEXR", "export")


FORMATS = (Format("exr", "", open_sequence, levels=None, alpha=True, check=_check),)
