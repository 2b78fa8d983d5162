"""Head selection against scikit-learn and by hand."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import calinski_harabasz_score

from diffusers_concept_maps import HeadSelection, ops
from diffusers_concept_maps.heads import head_mask
from diffusers_concept_maps.methods import LayerTaps

ROWS, HEADS, FRAMES, PLACES, WIDTH = 2, 7, 3, 15, 8
TOKENS = FRAMES * PLACES


def outputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Attention outputs `[R, H, N, D]`, a slice of a joint buffer; every head drifts by its own amount."""
    generator = torch.Generator().manual_seed(5)
    joint = torch.randn(ROWS, 4 + TOKENS, HEADS * WIDTH, generator=generator)
    output = joint.view(ROWS, -1, HEADS, WIDTH).transpose(1, 2)[:, :, 4:]
    drift = (
        torch.rand(ROWS, HEADS, FRAMES, 1, 1, generator=generator) + 10
    )  # far from zero: sums of squares would cancel
    output.unflatten(2, (FRAMES, PLACES)).add_(drift)
    return output.to(dtype)


def scores(output: torch.Tensor) -> torch.Tensor:
    labels = [token // PLACES for token in range(TOKENS)]
    table = [[calinski_harabasz_score(head.double(), labels) for head in row] for row in output]
    return torch.tensor(table)


def fisher_ratios(output: torch.Tensor) -> torch.Tensor:
    """Spread of the frame means over the spread within frames, both summed over all tokens."""
    frames: torch.Tensor = output.double().unflatten(2, (FRAMES, PLACES))
    centers = frames.mean(3, keepdim=True)
    between = PLACES * (centers - frames.mean((2, 3), keepdim=True)).square().sum((2, 3, 4))
    return between / (frames - centers).square().sum((2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_separability_is_the_calinski_harabasz_index(dtype: torch.dtype) -> None:
    output = outputs(dtype)
    torch.testing.assert_close(ops.frame_separability(output, FRAMES), scores(output).float(), rtol=1e-5, atol=0)


def test_separability_of_equal_features_is_one() -> None:
    output = outputs()
    output[0, 1] = 0.0
    output[1, 2] = 4.0
    score = ops.frame_separability(output, FRAMES)
    assert score[0, 1] == score[1, 2] == 1.0
    torch.testing.assert_close(score, scores(output).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("score", ["calinski_harabasz", "fisher"])
@pytest.mark.parametrize("top_k", [1, 3, 5, HEADS])
def test_the_best_heads_of_every_row(score: str, top_k: int) -> None:
    output = outputs()
    chosen = HeadSelection(score=score, top_k=top_k).choose(output, FRAMES)
    expected = torch.zeros(ROWS, HEADS)
    for row, ranked in enumerate(scores(output).argsort(dim=1, descending=True)):
        expected[row, ranked[:top_k]] = 1.0
    assert torch.equal(chosen, expected)


def test_rows_choose_differently() -> None:
    first, second = HeadSelection(top_k=3).choose(outputs(), FRAMES)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("score", ["calinski_harabasz", "fisher"])
def test_heads_above_a_threshold(score: str) -> None:
    output = outputs()
    table = fisher_ratios(output) if score == "fisher" else scores(output)
    middle = ROWS * HEADS // 2
    threshold = float(table.flatten().sort().values[middle : middle + 2].mean())
    chosen = HeadSelection(score=score, threshold=threshold, top_k=1).choose(output, FRAMES)
    assert torch.equal(chosen, (table > threshold).float())


def test_the_best_head_where_none_is_above_the_threshold() -> None:
    output = outputs()
    chosen = HeadSelection(threshold=1e9).choose(output, FRAMES)
    assert torch.equal(chosen, torch.nn.functional.one_hot(scores(output).argmax(1), HEADS).float())


def test_one_frame_has_nothing_to_separate() -> None:
    for selection in (HeadSelection(top_k=2), HeadSelection(threshold=1e9)):
        assert torch.equal(selection.choose(outputs(), 1), torch.ones(ROWS, HEADS))


def taps(frames: int, selects_heads: bool) -> LayerTaps:
    text = torch.randn(ROWS, HEADS, 4, WIDTH, generator=torch.Generator().manual_seed(6))
    return LayerTaps(*[outputs()] * 4, *[text] * 4, frames=frames, selects_heads=selects_heads)


@pytest.mark.parametrize("selects_heads", [False, True])
@pytest.mark.parametrize("statistics_first", [False, True])
@pytest.mark.parametrize("frames", [1, FRAMES])
def test_statistics_and_similarity_of_a_layer_are_the_same_in_any_order(
    frames: int, statistics_first: bool, selects_heads: bool
) -> None:
    layer = taps(frames, selects_heads)
    weights = torch.rand(ROWS, HEADS, generator=torch.Generator().manual_seed(7))
    if statistics_first:
        assert (layer.statistics is None) == (frames == 1)
    similarity = layer.output_similarity(weights)
    expected = torch.einsum(
        "rhcd,rhnd,rh->rcn", *(side.double() for side in (layer.text_output, layer.image_output, weights))
    )
    torch.testing.assert_close(similarity.double(), expected, rtol=1e-5, atol=1e-5)
    if layer.statistics is None:
        assert frames == 1
    else:
        plain = ops.frame_statistics(layer.image_output, frames)
        assert torch.equal(layer.statistics.mean, plain.mean)
        assert torch.equal(layer.statistics.within, plain.within)
        assert layer.statistics is layer.statistics


@pytest.mark.parametrize("frames", [1, FRAMES])
def test_the_heads_of_a_layer(frames: int) -> None:
    layer, selection = taps(frames, True), HeadSelection("fisher", 2)
    assert torch.equal(head_mask(selection, layer), selection.choose(layer.image_output, frames))
    assert torch.equal(head_mask(None, layer), torch.ones(ROWS, HEADS))
    assert torch.equal(head_mask((1, 3), layer), torch.tensor([[0.0, 1, 0, 1, 0, 0, 0]] * ROWS))
