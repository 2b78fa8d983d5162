"""What a file format is to an export."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Write = Callable[[np.ndarray], None]
"""Takes the next frame, float `[height, width, channel]` with 1 (gray), 3 (RGB) or 4 (RGBA) channels."""


@dataclass(frozen=True)
class Picture:
    """What all frames of a file have in common: height and width in pixels, channels, frames per second."""

    size: tuple[int, int]
    channels: int
    fps: int


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        name: what it is called in the command and in errors.
        suffix: of its files; "" for a sequence, which is a folder of one file for each frame.
        open: from a path and what its frames have in common to a context that yields how to write a frame. A sequence
            makes its folder. Nothing but the frame being written is kept in memory.
        levels: whole numbers that a gray frame has above 0; None keeps float32 as it is.
        alpha: whether it has any.
        check: raises `ConceptMapsError` where a package that it needs is missing.
        even: whether an odd height or width is made even by repeating the last row or column.
    """

    name: str
    suffix: str
    open: Callable[[Path, Picture], AbstractContextManager[Write]]
    levels: int | None
    alpha: bool
    check: Callable[[], None]
    even: bool = False
