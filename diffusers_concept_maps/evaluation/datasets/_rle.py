"""Masks as run lengths, the way COCO stores them (https://github.com/cocodataset/cocoapi, common/maskApi.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_FIRST_CHARACTER, _LAST_CHARACTER = 48, 111
_BITS, _MORE, _SIGN = 5, 32, 16


def decode_mask(encoded: Any, height: int, width: int) -> torch.Tensor:
    """Decode a mask.

    Args:
        encoded: `{"size": [height, width], "counts": ...}`; the counts are lengths of runs of 0 and 1 in turn, down
            the columns, as a list or as COCO's compressed string.
        height: of the frame it belongs to, in pixels.
        width: of the frame it belongs to, in pixels.

    Returns:
        bool `[height, width]`.

    Raises:
        ValueError: it is no such mask, or one of another size; the message says what is wrong.
    """
    if not isinstance(encoded, dict) or "counts" not in encoded or "size" not in encoded:
        raise ValueError('expected a mask {"size": [height, width], "counts": ...}')
    if list(encoded["size"]) != [height, width]:
        raise ValueError(f"the mask has size {encoded['size']} for a frame of {[height, width]}")
    counts = encoded["counts"]
    runs = _decompress(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(isinstance(run, int) and run >= 0 for run in runs):
        raise ValueError("the counts of the mask are not lengths of runs")
    if sum(runs) != height * width:
        raise ValueError(f"the counts of the mask add up to {sum(runs)} pixels of {height * width}")
    return _expand(runs).view(width, height).T


def _expand(runs: Sequence[int]) -> torch.Tensor:
    lengths = torch.tensor(runs, dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(runs)) % 2 == 1, lengths)


def _decompress(text: str) -> list[int]:
    """Run lengths of a compressed string.

    A number is written in characters of 5 bits, the lowest first, in two's complement; from the fourth on it is the
    difference to the run two before.
    """
    runs: list[int] = []
    value = bits = 0
    for character in text:
        code = ord(character) - _FIRST_CHARACTER
        if not 0 <= code <= _LAST_CHARACTER - _FIRST_CHARACTER or bits > 30:
            raise ValueError(f"the counts of the mask have {character!r} where none is expected")
        value |= (code & (_MORE - 1)) << bits
        bits += _BITS
        if not code & _MORE:
            if code & _SIGN:
                value -= 1 << bits
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = bits = 0
    if bits:
        raise ValueError("the counts of the mask end within a number")
    return runs
