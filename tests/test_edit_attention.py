"""Edited attention against attention with all its weights; and everything that is not edited is as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from backbones._case import Case, find_cases, in_double, seeded
from backbones.test_contract import output_of
from edited import Rule, attention_edited, scaled
from test_undo import assert_same, snapshot

from diffusers_concept_maps import AttentionEdit, edit_attention
from diffusers_concept_maps.backbones import find_backbone

CASES = {case.name: case for case in find_cases() if find_backbone(case.make()).editable}
TOKENS = {"dog": [1, 3], "sky": [2]}
ROWS, TEXT = 2, 5


def flipped(maps: torch.Tensor) -> torch.Tensor:
    assert maps.ndim == 4
    return 0.9 * maps.flip(-1)


def of_grid(case: Case, rule: Callable[[torch.Tensor], torch.Tensor]) -> Rule:
    """A rule over `[R, H, frame, height, width]` as one over `[R, H, N]`."""
    return lambda share: rule(share.unflatten(-1, case.grid)).flatten(2)


def edits_of(case: Case, kind: str) -> tuple[list[AttentionEdit], list[tuple[Sequence[int], Rule]]]:
    """Edits, and the rules that they stand for."""
    frames, height, width = case.grid
    soft = seeded(frames, height, width, seed=9).sigmoid()
    everywhere = torch.ones(1, 1, frames, height, width)
    edits: dict[str, tuple[list[AttentionEdit], list[tuple[Sequence[int], Rule]]]] = {
        "scale": ([AttentionEdit("dog", scale=4.0)], [([1, 3], scaled(4.0))]),
        "hide": ([AttentionEdit(["sky"], scale=0)], [([2], scaled(0.0))]),
        "soft mask": (
            [AttentionEdit("dog", scale=5.0, mask=soft)],
            [([1, 3], of_grid(case, scaled(1 + 4 * soft.double())))],
        ),
        "replace": (
            [AttentionEdit("sky", replace=soft[0])],
            [([2], of_grid(case, lambda share: soft[0].double() * everywhere))],
        ),
        "transform": (
            [AttentionEdit("dog", transform=flipped)],
            [([1, 3], of_grid(case, lambda x: 0.9 * x.flip(-1)))],
        ),
        "several": (
            [
                AttentionEdit("dog", scale=3.0),
                AttentionEdit(["dog", "sky"], transform=torch.sqrt, mask=soft),
                AttentionEdit("sky", scale=0.5),
            ],
            [
                ([1, 3], scaled(3.0)),
                ([1, 2, 3], of_grid(case, lambda x: torch.lerp(x, x.sqrt(), soft.double()))),
                ([2], scaled(0.5)),
            ],
        ),
    }
    return edits[kind]


def check(case: Case, kind: str, transformer: Any, inputs: dict[str, Any], tolerance: float) -> None:
    text, layers = case.text_lengths[-1], [0, case.layers - 1]
    edits, rules = edits_of(case, kind)
    stock = output_of(transformer, inputs)
    with attention_edited(case, text, rules, layers=layers, rows=slice(None)):
        expected = output_of(transformer, inputs)
    before = snapshot(transformer)
    with edit_attention(transformer, edits, layers=layers, prompt_tokens=TOKENS):
        actual = output_of(transformer, inputs)
    assert_same(transformer, before)
    largest = expected.abs().max().item()
    assert (actual - stock).abs().max() > 1e-3 * largest
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("kind", ["scale", "hide", "soft mask", "replace", "transform", "several"])
@pytest.mark.parametrize("name", ["CogVideoX", "Wan 2.1"])
def test_formula(name: str, kind: str) -> None:
    case = CASES[name]
    check(case, kind, *in_double(case, case.inputs(ROWS, TEXT, 1)), tolerance=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_formula_in_every_family(name: str) -> None:
    case = CASES[name]
    check(case, "several", case.make(), case.inputs(ROWS, case.text_lengths[-1], 1), tolerance=1e-4)
