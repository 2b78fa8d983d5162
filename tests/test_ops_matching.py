"""Matching between frames through its checked door, against every probability computed at once in float64."""

from __future__ import annotations

from typing import Any

import naive_matching
import pytest
import torch
from naive_matching import Inputs

from diffusers_concept_maps import ConceptMapsValueError, ops_matching

SCALE = 8**-0.5  # of a head width of 8


def matching(**changed: Any) -> tuple[torch.Tensor, ...]:
    inputs = Inputs.random(rows=2, heads=3, source=30, frames=3, height=5, width=7, head_width=8, queries=4)
    return ops_matching.temporal_matching(**(inputs._asdict() | changed))


def segments(**changed: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = Inputs.random(rows=2, heads=3, source=30, frames=3, height=5, width=7, head_width=8, queries=4)
    arguments = {
        "image_query": inputs.source_query,
        "tokens": inputs.tokens,
        "text_key": inputs.source_key[:, :, :6],
        "image_key": inputs.target_key,
        "head_weights": inputs.head_weights,
        "frames": 3,
    }
    return ops_matching.segment_attention(**(arguments | changed))


def assert_close(results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for result, exact in zip(results, expected, strict=True):
        assert result.dtype == (torch.float32 if exact.is_floating_point() else torch.int64)
        torch.testing.assert_close(result.to(exact.dtype), exact, rtol=0, atol=2e-6)


def test_matching() -> None:
    inputs = Inputs.random(rows=2, heads=3, source=30, frames=3, height=5, width=7, head_width=8, queries=4)
    assert_close(matching(), naive_matching.temporal_matching(inputs, SCALE, "both", 0))
    for direction in ops_matching.DIRECTIONS:
        expected = naive_matching.temporal_matching(inputs, 0.5, direction, 2)
        assert_close(matching(scale=0.5, direction=direction, radius=2), expected)


def test_segments() -> None:
    inputs = Inputs.random(rows=2, heads=3, source=30, frames=3, height=5, width=7, head_width=8, queries=4)
    sides = (inputs.source_query, inputs.tokens, inputs.source_key[:, :, :6], inputs.target_key)
    mask = torch.arange(6) < torch.tensor([[6], [2]])
    expected = naive_matching.segment_attention(*sides, None, inputs.head_weights, 3, SCALE)
    assert_close(segments(), expected)
    expected = naive_matching.segment_attention(*sides, mask, inputs.head_weights, 3, 0.5)
    assert_close(segments(text_mask=mask, scale=0.5), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"source_key": torch.ones(2, 3, 29, 8)}, r"^source_key has shape .*; expected \(2, 3, 30, 8\)$"),
        ({"target_key": torch.ones(2, 1, 105, 8)}, r"^target_key has shape .*; expected \(2, 3, 105, 8\)$"),
        ({"target_query": torch.ones(2, 3, 104, 8)}, r"^target_query has shape .*; expected \(2, 3, 105, 8\)$"),
        ({"tokens": torch.zeros(2, 4)}, r"^tokens are torch.float32 \(2, 4\); expected torch.int64 \[2, Q\]$"),
        ({"tokens": torch.zeros(1, 4).long()}, r"^tokens are torch.int64 \(1, 4\); expected torch.int64 \[2, Q\]$"),
        ({"tokens": torch.zeros(2).long()}, r"^tokens are torch.int64 \(2,\); expected torch.int64 \[2, Q\]$"),
        ({"head_weights": torch.ones(2, 4)}, r"^head_weights has shape \(2, 4\); expected \(2, 3\)$"),
        ({"frames": 0}, "^105 target tokens are not 0 frames of lines of 7$"),
        ({"frames": 2}, "^105 target tokens are not 2 frames of lines of 7$"),
        ({"width": 0}, "^105 target tokens are not 3 frames of lines of 0$"),
        ({"width": 6}, "^105 target tokens are not 3 frames of lines of 6$"),
        (
            {"target_query": torch.ones(2, 3, 0, 8), "target_key": torch.ones(2, 3, 0, 8)},
            "^0 target tokens are not 3 frames of lines of 7$",
        ),
        ({"direction": "up"}, "^unknown direction 'up'; expected one of both, forward, backward$"),
        ({"radius": -1}, "^radius is -1; expected 0 or more tokens$"),
    ],
)
def test_matching_refuses(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConceptMapsValueError, match=message):
        matching(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text_key": torch.ones(2, 3, 6, 4)}, r"^text_key has shape .*; expected \(2, 3, 6, 8\)$"),
        ({"image_key": torch.ones(1, 3, 105, 8)}, r"^image_key has shape .*; expected \(2, 3, 105, 8\)$"),
        ({"tokens": torch.zeros(2, 4)}, r"^tokens are torch.float32 \(2, 4\); expected torch.int64 \[2, Q\]$"),
        ({"head_weights": torch.ones(3)}, r"^head_weights has shape \(3,\); expected \(2, 3\)$"),
        ({"text_mask": torch.ones(2, 5).bool()}, r"^text_mask has shape \(2, 5\); expected \(2, 6\)$"),
        (
            {"text_mask": torch.ones(2, 6)},
            r"^text_mask is torch.float32; expected torch.bool: pass text_mask.bool\(\)$",
        ),
        ({"frames": 0}, "^105 image keys are not 0 equal frames$"),
        ({"frames": 4}, "^105 image keys are not 4 equal frames$"),
        ({"image_key": torch.ones(2, 3, 0, 8)}, "^0 image keys are not 3 equal frames$"),
    ],
)
def test_segments_refuse(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConceptMapsValueError, match=message):
        segments(**changed)
