"""Frames as data URLs that fit into so many bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

_QUALITIES = (90, 80, 70, 55, 40, 25, 10)
_SAMPLE = 8  # every so many frames are encoded to find the quality
_PREFIX = "data:image/webp;base64,"


def encoded(pictures: Sequence[Image.Image], budget: int) -> list[str]:
    """Pictures as WebP, as good as the budget allows: exact where there are few pixels, and smaller where need be.

    Args:
        pictures: RGB, all of one size.
        budget: bytes of all data URLs together; of pictures of a few pixels only it may be exceeded.
    """
    width, height = pictures[0].size
    urls: list[str] = []
    for options, scale in _attempts(len(pictures) * width * height * 3 <= budget, max(width, height)):
        size = (max(1, width // scale), max(1, height // scale))
        if _total(pictures[::_SAMPLE], size, options) * len(pictures) > budget * len(pictures[::_SAMPLE]):
            continue
        urls = _urls(pictures, size, options)
        if sum(map(len, urls)) <= budget:
            return urls
    return urls or _urls(pictures, size, options)


def _attempts(exact: bool, longest: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Options of the encoder and by what to divide the size, the best first."""
    if exact:
        yield {"lossless": True}, 1
    for scale in (1, 2, 4, 8):
        if scale == 1 or longest // scale >= 64:
            yield from (({"quality": quality, "method": 2}, scale) for quality in _QUALITIES)


def _total(pictures: Sequence[Image.Image], size: tuple[int, int], options: dict[str, Any]) -> int:
    return sum(map(len, _urls(pictures, size, options)))


def _urls(pictures: Sequence[Image.Image], size: tuple[int, int], options: dict[str, Any]) -> list[str]:
    urls = []
    for picture in pictures:
        buffer = io.BytesIO()
        scaled = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
        scaled.save(buffer, "WEBP", **options)
        urls.append(_PREFIX + base64.b64encode(buffer.getvalue()).decode())
    return urls
