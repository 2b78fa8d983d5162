"""The reference of matching between frames, against every probability computed at once in float64."""

from __future__ import annotations

import math

import naive_matching
import pytest
import torch
from naive_matching import Inputs
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_concept_maps import reference_matching
from diffusers_concept_maps.reference_matching import segment_attention, temporal_matching

DIRECTIONS = ["both", "forward", "backward"]


def assert_matches(results, expected, tolerance=2e-6):
    index, *scores = results
    assert index.dtype == torch.int64
    torch.testing.assert_close(index, expected[0], rtol=0, atol=0)
    for score, exact in zip(scores, expected[1:], strict=True):
        assert score.dtype == torch.float32
        torch.testing.assert_close(score.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("radius", [0, 1, 30])
def test_matching_equals_all_probabilities_at_once(direction, radius, monkeypatch):
    monkeypatch.setattr(reference_matching, "_CHUNK", 4)
    inputs = Inputs.random(rows=2, heads=3, source=30, frames=3, height=5, width=7, head_width=8, queries=11)
    results = temporal_matching(*inputs, 0.5, direction, radius)
    assert_matches(results, naive_matching.temporal_matching(inputs, 0.5, direction, radius))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    inputs = Inputs.random(2, 3, 35, 2, 5, 7, 8, 11, dtype)
    results = temporal_matching(*inputs, 0.5, "both", 2)
    assert_matches(results, naive_matching.temporal_matching(inputs, 0.5, "both", 2))


def frame_of(features, scale=1.0):
    """A static pair of frames: every token's query equals its key."""
    side = features[None, None] * scale
    return side, side, side, side


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_perfect_static_match_is_the_token_itself_exactly(direction):
    height, width = 5, 7
    features = torch.randn(height * width, 64, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(height * width)[None]
    index, value, entropy, position = temporal_matching(
        *frame_of(features, scale=2.0), tokens, torch.ones(1, 1), 1, width, 1.0, direction, 2
    )
    assert torch.equal(index[0, :, 0], tokens[0])
    assert torch.equal(position[0, :, 0, 0], (tokens[0] % width).float())
    assert torch.equal(position[0, :, 0, 1], (tokens[0] // width).float())
    torch.testing.assert_close(value, torch.ones_like(value))
    torch.testing.assert_close(entropy, torch.zeros_like(entropy), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("right", "down"), [(1, 0), (0, 2), (-3, -1)])
def test_whole_shifts_are_found_exactly(right, down):
    height, width = 6, 8
    generator = torch.Generator().manual_seed(0)
    first = 2 * torch.randn(height, width, 64, generator=generator)
    second = first.roll((down, right), (0, 1)).flatten(0, 1)[None, None]
    first = first.flatten(0, 1)[None, None]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    tokens = (y * width + x).flatten()[None]
    _, _, _, position = temporal_matching(first, first, second, second, tokens, torch.ones(1, 1), 1, 8, 1.0, "both", 2)
    expected = torch.stack([(x + right) % width, (y + down) % height], -1).flatten(0, 1)
    assert torch.equal(position[0, :, 0], expected.float())


def waves(y, x):
    """Features whose product falls off with the distance of two places, equally on all sides."""
    angles = torch.stack([y, x], -1) * (2 * math.pi / 64)
    return torch.cat([angles.cos(), angles.sin()], -1).flatten(0, 1)


@pytest.mark.parametrize("radius", [1, 2, 4])
def test_a_symmetric_peak_is_not_drawn_inward_at_the_border(radius):
    height, width = 7, 9
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    tokens = torch.arange(height * width)[None]
    sides = frame_of(waves(y, x), scale=6.0)
    *_, position = temporal_matching(*sides, tokens, torch.ones(1, 1), 1, width, 1.0, "forward", radius)
    torch.testing.assert_close(position[0, :, 0], torch.stack([x, y], -1).flatten(0, 1).float(), rtol=0, atol=1e-4)


def test_the_window_sees_motion_smaller_than_a_token():
    height, width = 9, 9
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    still, moved = waves(y, x)[None, None] * 12, waves(y - 0.25, x + 0.4)[None, None] * 12
    tokens = torch.tensor([[4 * width + 4]])
    *_, position = temporal_matching(moved, moved, still, still, tokens, torch.ones(1, 1), 1, width, 1.0, "forward", 3)
    torch.testing.assert_close(position[0, 0, 0], torch.tensor([4.4, 3.75]), rtol=0, atol=0.02)


def test_a_token_nothing_looks_at_has_no_match_and_no_nan():
    query = torch.ones(1, 1, 6, 4)
    key = torch.ones(1, 1, 6, 4)
    key[:, :, 4] = -100
    index, value, entropy, position = temporal_matching(
        query, key, query, key, torch.tensor([[4]]), torch.ones(1, 1), 1, 3, 1.0, "backward", 1
    )
    assert index.item() == 0
    assert value.item() == 0
    assert position.flatten().tolist() == [0, 0]
    torch.testing.assert_close(entropy.item(), math.log(6))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_head_of_weight_0_is_left_out_even_if_it_is_nan(direction):
    inputs = Inputs.random(rows=2, heads=3, source=30, frames=3, height=5, width=7, head_width=8, queries=11)
    weights = torch.tensor([[0.5, 0.0, 2.0], [1.0, 0.0, 0.25]])
    inputs = inputs._replace(head_weights=weights)
    broken = [side.clone() for side in inputs[:4]]
    for side in broken:
        side[:, 1] = math.nan
    results = temporal_matching(*broken, *inputs[4:], 0.5, direction, 2)
    assert_matches(results, naive_matching.temporal_matching(inputs, 0.5, direction, 2))
    clean = (inputs.source_query, inputs.tokens, inputs.source_key[:, :, :6], inputs.target_key, None, weights, 3, 0.5)
    nan = (broken[0], inputs.tokens, broken[1][:, :, :6], broken[3], None, weights, 3, 0.5)
    for result, exact in zip(segment_attention(*nan), naive_matching.segment_attention(*clean), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("text", [0, 1, 5])
def test_segments_equal_all_probabilities_at_once(text, masked, monkeypatch):
    monkeypatch.setattr(reference_matching, "_CHUNK", 4)
    inputs = Inputs.random(rows=2, heads=3, source=30, frames=3, height=5, width=7, head_width=8, queries=11)
    text_key = torch.randn(2, 3, text, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(text) < torch.tensor([[text], [text - 2]]) if masked else None
    arguments = (inputs.source_query, inputs.tokens, text_key, inputs.target_key, mask, inputs.head_weights, 3, 0.5)
    for result, exact in zip(segment_attention(*arguments), naive_matching.segment_attention(*arguments), strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=2e-6)


def test_segments_of_the_mean_over_heads_add_up_to_one():
    inputs = Inputs.random(rows=2, heads=3, source=35, frames=4, height=5, width=7, head_width=8, queries=11)
    weights = torch.full((2, 3), 1 / 3)
    sums, maxima = segment_attention(
        inputs.source_query, inputs.tokens, inputs.source_key[:, :, :6], inputs.target_key, None, weights, 4, 0.3
    )
    torch.testing.assert_close(sums.sum(-1), torch.ones(2, 11), rtol=0, atol=2e-6)
    assert (maxima <= sums).all()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_memory_is_linear_in_tokens(monkeypatch):
    monkeypatch.setattr(reference_matching, "_CHUNK", 8)

    def elements(height, width):
        tokens = torch.arange(height * width)[None]
        inputs = Inputs.random(1, 2, height * width, 2, height, width, 16, 1)._replace(tokens=tokens)
        with Largest() as largest:
            temporal_matching(*inputs, 0.5, "both", 2)
            text_key = inputs.source_key[:, :, :6]
            segment_attention(
                inputs.source_query, tokens, text_key, inputs.target_key, None, inputs.head_weights, 2, 0.5
            )
        return largest.elements

    assert elements(20, 20) <= 2 * elements(10, 20)
