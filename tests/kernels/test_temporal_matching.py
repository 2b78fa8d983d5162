"""Kernels of matching between frames and of attention by segment, against float64 and against their reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import naive_matching
import pytest
import torch
from naive_matching import Inputs

from concept_map_kernels import _common
from concept_map_kernels.segment_attention import segment_attention
from concept_map_kernels.segment_attention import supports as supports_segments
from concept_map_kernels.temporal_matching import launch_shape, supports, temporal_matching
from diffusers_concept_maps import reference_matching

pytestmark = pytest.mark.usefixtures("poisoned")


@dataclass(frozen=True)
class Case:
    """Sizes of one call, and what they exercise."""

    id: str
    rows: int
    heads: int
    source: int
    frames: int
    height: int
    width: int
    head_width: int
    queries: int
    dtype: torch.dtype = torch.float32
    direction: str = "both"
    radius: int = 2

    def inputs(self, device):
        sizes = (self.rows, self.heads, self.source, self.frames, self.height, self.width)
        return Inputs.random(*sizes, self.head_width, self.queries, self.dtype).to(device)


CASES = [
    Case("odd_sizes", 2, 3, 77, 3, 7, 11, 40, 5),
    Case("forward", 2, 2, 77, 2, 7, 11, 64, 5, direction="forward"),
    Case("backward", 2, 2, 77, 2, 7, 11, 64, 5, direction="backward"),
    Case("one_of_each", 1, 1, 1, 1, 1, 1, 32, 1),
    Case("one_line", 1, 2, 20, 2, 1, 19, 32, 3),
    Case("one_column", 1, 2, 20, 2, 19, 1, 32, 3),
    Case("blocks_of_queries", 1, 2, 150, 1, 10, 15, 32, 70, torch.float16),
    Case("exact_blocks", 1, 2, 128, 1, 8, 16, 32, 64, torch.float16),
    Case("no_window", 1, 2, 50, 2, 5, 10, 32, 7, torch.float16, radius=0),
    Case("whole_window", 1, 2, 50, 2, 9, 10, 32, 7, torch.float16, radius=50),
    *(Case(f"float16_{width}", 1, 2, 70, 2, 7, 10, width, 6, torch.float16) for width in (40, 64, 80, 96, 128, 256)),
    *(Case(f"bfloat16_{width}", 1, 2, 70, 2, 7, 10, width, 6, torch.bfloat16) for width in (32, 96, 256)),
]


def assert_as_close_as_reference(results, reference, exact):
    """At most twice as far from float64 as plain PyTorch on the same inputs, plus 1e-6."""
    for result, plain, truth in zip(results, reference, exact, strict=True):
        assert result.shape == truth.shape
        assert result.dtype == plain.dtype
        allowed = 2 * (plain.double() - truth).abs().max().item() + 1e-6
        torch.testing.assert_close(result.to(truth.dtype), truth, rtol=0, atol=allowed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matching(case, device):
    inputs = case.inputs(device)
    arguments = (case.head_width**-0.5, case.direction, case.radius)
    assert supports(*inputs, *arguments)
    results = temporal_matching(*inputs, *arguments)
    exact = naive_matching.temporal_matching(inputs, *arguments)
    assert torch.equal(results[0], exact[0])
    assert_as_close_as_reference(results, reference_matching.temporal_matching(*inputs, *arguments), exact)


def test_large_logits(device):
    inputs = Case("", 1, 2, 70, 2, 7, 10, 64, 6).inputs(device)
    arguments = (10.0, "forward", 2)  # in both directions, probabilities of 1 would tie
    results = temporal_matching(*inputs, *arguments)
    exact = naive_matching.temporal_matching(inputs, *arguments)
    assert torch.equal(results[0], exact[0])
    assert_as_close_as_reference(results, reference_matching.temporal_matching(*inputs, *arguments), exact)


def test_the_targets_of_a_frame_may_be_read_by_one_program_or_by_several(device, monkeypatch):
    inputs = Case("", 1, 2, 150, 1, 10, 15, 32, 5).inputs(device)
    split = temporal_matching(*inputs, 0.2, "both", 3)
    monkeypatch.setattr(_common, "PROGRAMS", 1)
    whole = temporal_matching(*inputs, 0.2, "both", 3)
    assert torch.equal(split[0], whole[0])
    assert torch.equal(split[1], whole[1])
    torch.testing.assert_close(split[2:], whole[2:], rtol=0, atol=2e-6)


def test_ties_go_to_the_lowest_index(device):
    inputs = Case("", 1, 2, 150, 1, 10, 15, 32, 3).inputs(device)
    ones = torch.ones(1, 2, 150, 32, device=device)  # whose products are exact, in whatever order they are added
    inputs = inputs._replace(source_query=ones, target_key=ones)
    index, value, entropy, position = temporal_matching(*inputs, 0.25, "forward", 2)
    assert (index == 0).all()
    assert (position == 0).all()
    torch.testing.assert_close(value, (inputs.head_weights.sum() / 150).expand_as(value))
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(150)))


def test_a_token_nothing_looks_at_has_no_match_and_no_nan(device):
    query = torch.ones(1, 1, 6, 32, device=device)
    key = torch.ones(1, 1, 6, 32, device=device)
    key[:, :, 4] = -100
    tokens, weights = torch.tensor([[4]], device=device), torch.ones(1, 1, device=device)
    index, value, entropy, position = temporal_matching(
        query, key, query, key, tokens, weights, 1, 3, 1.0, "backward", 1
    )
    assert (index.item(), value.item(), *position.flatten().tolist()) == (0, 0, 0, 0)
    torch.testing.assert_close(entropy.item(), math.log(6))


def test_heads_of_weight_zero_are_not_read(device):
    inputs = Case("", 2, 3, 30, 1, 5, 6, 32, 4).inputs(device)
    inputs.head_weights[0, 1] = 0
    inputs.head_weights[1, :2] = 0
    expected = temporal_matching(*inputs, 0.2, "both", 2)
    text = torch.randn(2, 3, 6, 32, device=device)
    segments = (inputs.source_query, inputs.tokens, text, inputs.target_key, None, inputs.head_weights, 1, 0.2)
    expected_segments = segment_attention(*segments)
    for side in (*inputs[:4], text):
        side[0, 1] = torch.nan
        side[1, :2] = torch.nan
    for results, clean in (
        (temporal_matching(*inputs, 0.2, "both", 2), expected),
        (segment_attention(*segments), expected_segments),
    ):
        assert all(torch.equal(result, other) for result, other in zip(results, clean, strict=True))


def test_every_tensor_has_strides_of_its_own(device):
    """Matching back: each target frame is a row, which looks for its own tokens in the one source frame."""
    frames, height, width = 3, 5, 7
    clip = torch.randn(2, frames * height * width, 2, 48, device=device)[..., :40]  # [2, N, H, D], as projections are
    query, key = clip.transpose(1, 2)
    targets = [side.unflatten(1, (frames, -1)).transpose(0, 1) for side in (query, key)]  # [F, H, P, D]
    source = [side[:, : height * width].expand(frames, -1, -1, -1) for side in (query, key)]
    tokens = torch.randint(height * width, (frames, 4), device=device)
    weights = torch.tensor([[0.5, 0.25]], device=device).expand(frames, -1)
    inputs = Inputs(*targets, *source, tokens.mT.contiguous().mT, weights, 1, width)
    results = temporal_matching(*inputs, 0.2, "both", 2)
    exact = naive_matching.temporal_matching(inputs, 0.2, "both", 2)
    assert torch.equal(results[0], exact[0])
    assert_as_close_as_reference(results, reference_matching.temporal_matching(*inputs, 0.2, "both", 2), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("text", "padding"), [(0, False), (1, False), (9, True), (70, True)])
def test_segments(text, padding, dtype, device):
    inputs = Case("", 2, 2, 80, 2, 6, 11, 40, 5, dtype).inputs(device)
    text_key = torch.randn(2, 2, text, 40, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    mask = (torch.arange(text) < torch.tensor([[text - 3], [0]])).to(device) if padding else None
    arguments = (inputs.source_query, inputs.tokens, text_key, inputs.target_key, mask, inputs.head_weights, 2, 0.2)
    assert supports_segments(*arguments)
    results = segment_attention(*arguments)
    exact = naive_matching.segment_attention(*arguments)
    assert_as_close_as_reference(results, reference_matching.segment_attention(*arguments), exact)


def test_results_repeat_bit_for_bit(device):
    inputs = Case("", 1, 2, 40, 1, 5, 8, 32, 9).inputs(device)
    first = temporal_matching(*inputs, 0.2, "both", 2)
    again = temporal_matching(*inputs, 0.2, "both", 2)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_query": torch.ones(1, 2, 12, 64)[..., ::2]}, "last axis of source_query has stride 2"),
        ({"source_key": torch.ones(1, 2, 11, 32)}, r"source_key is \(1, 2, 11, 32\); expected \(1, 2, 12, 32\)"),
        ({"target_query": torch.ones(1, 2, 23, 32)}, r"target_query is .*; expected \(1, 2, 24, 32\)"),
        ({"head_weights": torch.ones(1, 3)}, r"head_weights is \(1, 3\); expected \(1, 2\)"),
        ({"frames": 5}, "24 target tokens are not 5 frames of lines of 4"),
        ({"width": 5}, "24 target tokens are not 2 frames of lines of 5"),
    ],
)
def test_matching_refuses_what_it_would_misread(change, message, device):
    inputs = Case("", 1, 2, 12, 2, 3, 4, 32, 3).inputs(device)
    change = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        temporal_matching(*inputs._replace(**change), 0.2, "both", 2)


def test_matching_refuses_an_unknown_direction_and_a_negative_radius(device):
    inputs = Case("", 1, 2, 12, 2, 3, 4, 32, 3).inputs(device)
    with pytest.raises(ValueError, match="direction is 'up'; expected one of both, forward, backward"):
        temporal_matching(*inputs, 0.2, "up", 2)
    with pytest.raises(ValueError, match="radius is -1; expected 0 or more"):
        temporal_matching(*inputs, 0.2, "both", -1)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (2, torch.ones(1, 1, 6, 32), r"text_key is \(1, 1, 6, 32\); expected \(1, 2, 6, 32\)"),
        (3, torch.ones(1, 2, 24, 64), r"image_key is \(1, 2, 24, 64\); expected \(1, 2, 24, 32\)"),
        (3, torch.ones(1, 2, 24, 64)[..., ::2], "last axis of image_key has stride 2"),
        (4, torch.ones(1, 5, dtype=torch.bool), r"text_mask is \(1, 5\); expected \(1, 6\)"),
        (5, torch.ones(2, 2), r"head_weights is \(2, 2\); expected \(1, 2\)"),
        (6, 7, "24 image tokens are not 7 equal frames"),
    ],
)
def test_segments_refuse_what_they_would_misread(place, value, message, device):
    inputs = Case("", 1, 2, 12, 2, 3, 4, 32, 3).inputs(device)
    text_key = torch.ones(1, 2, 6, 32, device=device)
    arguments = [inputs.source_query, inputs.tokens, text_key, inputs.target_key, None, inputs.head_weights, 2, 0.2]
    arguments[place] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(ValueError, match=message):
        segment_attention(*arguments)


def test_what_is_not_enabled_is_refused(device):
    inputs = Case("", 1, 2, 12, 2, 3, 4, 128, 3).inputs(device)
    assert launch_shape(torch.float32, 128) is None
    assert launch_shape(torch.float16, 72) is None
    assert not supports(*inputs, 0.2, "both", 2)
    with pytest.raises(ValueError, match=r"matching is not enabled for torch.float32 and head width 128"):
        temporal_matching(*inputs, 0.2, "both", 2)
    text_key = inputs.source_key[:, :, :6]
    arguments = (inputs.source_query, inputs.tokens, text_key, inputs.target_key, None, inputs.head_weights, 2, 0.2)
    assert not supports_segments(*arguments)
    with pytest.raises(ValueError, match=r"matching is not enabled for torch.float32 and head width 128"):
        segment_attention(*arguments)


def test_a_tensor_on_another_device_is_not_supported(device):
    inputs = Case("", 1, 2, 12, 2, 3, 4, 32, 3).inputs(device)
    text_key, mask = inputs.source_key[:, :, :6], torch.ones(1, 6, dtype=torch.bool, device=device)
    segments = [inputs.source_query, inputs.tokens, text_key, inputs.target_key, mask, inputs.head_weights, 2, 0.2]
    assert supports_segments(*segments)
    for name in ("tokens", "head_weights"):
        assert not supports(*inputs._replace(**{name: getattr(inputs, name).to("meta")}), 0.2, "both", 2)
    for place in (1, 4, 5):
        assert not supports_segments(*segments[:place], segments[place].to("meta"), *segments[place + 1 :])


def test_a_tensor_with_gaps_is_not_supported(device):
    inputs = Case("", 1, 2, 12, 2, 3, 4, 32, 3).inputs(device)
    gaps = inputs._replace(target_key=inputs.target_key.repeat_interleave(2, -1)[..., ::2])
    assert not supports(*gaps, 0.2, "both", 2)
