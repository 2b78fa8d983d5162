"""Masks as run lengths, against numbers worked out by hand and an encoder of its own."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_concept_maps.evaluation.datasets._rle import decode_mask


def runs_of(mask: torch.Tensor) -> list[int]:
    """Lengths of the runs down the columns; the first is of zeros, and may be empty."""
    flat = [bool(mask[row, column]) for column in range(mask.shape[1]) for row in range(mask.shape[0])]
    runs = [len(list(group)) for _, group in groupby(flat)]
    return [0, *runs] if flat[0] else runs


def compressed(runs: list[int]) -> str:
    """COCO's string: from the fourth run on differences to the run two before, in signed groups of five bits."""
    text = ""
    for index, run in enumerate(runs):
        number = run - runs[index - 2] if index > 2 else run
        width = 5
        while not -(1 << (width - 1)) <= number < 1 << (width - 1):
            width += 5
        groups = [(number >> shift) & 31 for shift in range(0, width, 5)]
        text += "".join(
            chr(48 + group + 32 * (group_index < len(groups) - 1)) for group_index, group in enumerate(groups)
        )
    return text


def test_by_hand() -> None:
    # 6, 1; 40 = 8 + 32 x 1; 4 - 1; 16 - 40 = -24 = 8 - 32 x 1.
    text = "61X13XO"
    assert compressed([6, 1, 40, 4, 16]) == text
    mask = decode_mask({"size": [67, 1], "counts": text}, 67, 1)
    assert mask.dtype == torch.bool
    assert mask[:, 0].nonzero().flatten().tolist() == [6, 47, 48, 49, 50]
    assert decode_mask({"size": [2, 2], "counts": "04"}, 2, 2).all()


def test_runs_go_down_the_columns() -> None:
    mask = decode_mask({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3)
    assert mask.tolist() == [[False, True, False], [True, False, False]]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000), st.floats(0, 1))
def test_every_mask(height: int, width: int, seed: int, share: float) -> None:
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < share
    runs = runs_of(mask)
    for counts in (runs, compressed(runs)):
        decoded = decode_mask({"size": [height, width], "counts": counts}, height, width)
        assert torch.equal(decoded, mask)


def test_long_runs() -> None:
    mask = torch.zeros(1080, 1920, dtype=torch.bool)
    mask[3, 5] = mask[900:, 1900:] = True
    counts = compressed(runs_of(mask))
    assert torch.equal(decode_mask({"size": [1080, 1920], "counts": counts}, 1080, 1920), mask)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        ([1, 2], 'expected a mask {"size"'),
        ({"counts": [4]}, 'expected a mask {"size"'),
        ({"size": [2, 2]}, 'expected a mask {"size"'),
        ({"size": [4, 1], "counts": [4]}, r"the mask has size \[4, 1\] for a frame of \[2, 2\]"),
        ({"size": [2, 2], "counts": [5]}, "add up to 5 pixels of 4"),
        ({"size": [2, 2], "counts": []}, "add up to 0 pixels of 4"),
        ({"size": [2, 2], "counts": [6, -2]}, "not lengths of runs"),
        ({"size": [2, 2], "counts": [2.0, 2.0]}, "not lengths of runs"),
        ({"size": [2, 2], "counts": None}, "not lengths of runs"),
        ({"size": [2, 2], "counts": "0O5"}, "not lengths of runs"),
        ({"size": [2, 2], "counts": "0 4"}, "have ' ' where none is expected"),
        ({"size": [2, 2], "counts": "0p"}, "have 'p' where none is expected"),
        ({"size": [2, 2], "counts": "0" + "o" * 50 + "0"}, "have 'o' where none is expected"),
        ({"size": [2, 2], "counts": "0T"}, "end within a number"),
    ],
)
def test_broken_masks(encoded: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_mask(encoded, 2, 2)
