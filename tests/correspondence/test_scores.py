"""Scores of a layer, against every probability in float64, and the official code's populations and axes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusers_concept_maps import ConceptMapsValueError
from diffusers_concept_maps.correspondence.readout import TokenGrid, nearest_token
from diffusers_concept_maps.correspondence.scores import (
    SegmentScores,
    harmonic_mean,
    matching_accuracy,
    segment_scores,
)

GRID = TokenGrid(frames=3, height=3, width=5, stride=(8.0, 6.0))
POINTS = torch.tensor([[0.0, 3.0, 2.0], [1.0, 30.0, 13.0], [0.0, 20.0, 9.0], [2.0, 35.0, 1.0], [0.0, 11.0, 16.0]])
VISIBLE = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 0, 1]]).bool()
SEEN = torch.tensor([0, 1, 4])  # visible in the frame of the query and in another
TEXTS = 6


def layer(rows: int = 2, heads: int = 3, width: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = (rows, heads, GRID.frames * GRID.tokens, width)
    query, key = torch.randn(2, *image, generator=generator)
    return {"query": query, "key": key, "text_key": torch.randn(rows, heads, TEXTS, width, generator=generator)}


def scored(**changed: Any) -> SegmentScores:
    return segment_scores(**(layer() | {"points": POINTS, "visible": VISIBLE, "grid": GRID} | changed))


def attention(sides: dict[str, torch.Tensor], tokens: torch.Tensor, texts: int = TEXTS) -> torch.Tensor:
    """Mean over heads of the probabilities `[R, N, T + F * P]` of tokens of the clip, in float64."""
    keys = torch.cat([sides["text_key"][:, :, :texts], sides["key"]], 2).double()
    return (sides["query"][:, :, tokens].double() @ keys.mT / 8**0.5).softmax(-1).mean(1)


def segments(row: torch.Tensor, frame: int, seen: list[int], texts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Share and largest probability of text, own frame and other frames, of the probabilities of one point."""
    text, image = row[:texts], row[texts:].view(GRID.frames, -1)
    others = [other for other in range(GRID.frames) if other != frame]
    shares = torch.stack([text.sum(), image[frame].sum(), image[others].sum()])
    maxima = [float(image[other].max()) for other in others if other in seen]
    cross = torch.tensor(sum(maxima) / max(len(maxima), 1), dtype=torch.float64)
    first = text.max() if texts else torch.zeros((), dtype=torch.float64)
    return shares, torch.stack([first, image[frame].max(), cross])


def naive(
    sides: dict[str, torch.Tensor], places: torch.Tensor, texts: int = TEXTS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and confidence `[R, N, 3]` of every point by itself; `places` is its token in its frame."""
    frames = POINTS[:, 0].long()
    rows = attention(sides, frames * GRID.tokens + places, texts)
    every = [
        [segments(row, int(frames[n]), VISIBLE[n].nonzero()[:, 0].tolist(), texts) for n, row in enumerate(batch)]
        for batch in rows
    ]
    shares, maxima = (torch.stack([torch.stack([point[k] for point in batch]) for batch in every]) for k in (0, 1))
    return shares, maxima


def assert_scores(scores: SegmentScores, shares: torch.Tensor, maxima: torch.Tensor) -> None:
    for result, expected in ((scores.attention, shares), (scores.confidence, maxima)):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)


def test_scores_are_of_the_points_tokens_and_of_one_population() -> None:
    shares, maxima = naive(layer(), nearest_token(POINTS[:, 1:], GRID))
    scores = scored()
    assert scores.segments == ("text", "self", "cross")
    assert_scores(scores, shares[:, SEEN].mean(1), maxima[:, SEEN].mean(1))
    torch.testing.assert_close(scores.attention.sum(1), torch.ones(2))


def test_official_scores_swap_axes_and_populations() -> None:
    x, y = (POINTS[:, 1:] / torch.tensor(GRID.stride)).round().long().unbind(1)
    swapped = x.clamp(max=2) * 5 + y.clamp(max=4)
    shares, maxima = naive(layer(), swapped)
    at_start = VISIBLE.gather(1, POINTS[:, :1].long())[:, 0]
    assert at_start.tolist() == [True, True, False, True, True]
    official = scored(swap_axes=True, all_points=True)
    assert_scores(official, shares[:, at_start].mean(1), maxima.mean(1))
    # The default is without either defect, and each switch alone brings back its own.
    right, unswapped = naive(layer(), nearest_token(POINTS[:, 1:], GRID))
    assert_scores(scored(swap_axes=True), shares[:, SEEN].mean(1), maxima[:, SEEN].mean(1))
    assert_scores(scored(all_points=True), right[:, at_start].mean(1), unswapped.mean(1))
    assert not torch.allclose(scored().confidence, official.confidence, atol=1e-3)


def test_without_text_there_are_frames_alone() -> None:
    shares, maxima = naive(layer(), nearest_token(POINTS[:, 1:], GRID), texts=0)
    scores = scored(text_key=None)
    assert scores.segments == ("self", "cross")
    assert_scores(scores, shares[:, SEEN, 1:].mean(1), maxima[:, SEEN, 1:].mean(1))
    torch.testing.assert_close(scores.attention.sum(1), torch.ones(2))


def test_padding_takes_no_attention() -> None:
    mask = (torch.arange(TEXTS) < 4).expand(2, -1)
    shares, maxima = naive(layer(), nearest_token(POINTS[:, 1:], GRID), texts=4)
    assert_scores(scored(text_mask=mask), shares[:, SEEN].mean(1), maxima[:, SEEN].mean(1))


def test_scores_of_chosen_heads_and_scale() -> None:
    sides = layer()
    chosen = {name: side[:, 1:2] * (0.5 * 8**0.5 if name == "query" else 1) for name, side in sides.items()}
    shares, maxima = naive(chosen, nearest_token(POINTS[:, 1:], GRID))
    assert_scores(scored(heads=[1], scale=0.5), shares[:, SEEN].mean(1), maxima[:, SEEN].mean(1))


def test_accuracy_counts_what_is_visible() -> None:
    true = torch.zeros(2, 3, 2)
    predicted = torch.tensor([[[0, 0], [5, 6], [8, 0]], [[6, 6], [-7, 0], [99, 0]]]).float()
    visible = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    assert matching_accuracy(predicted, true, visible) == pytest.approx(60.0)  # 8 pixels are not nearer than 8
    assert matching_accuracy(predicted, true, visible, threshold=7.5) == pytest.approx(40.0)
    assert matching_accuracy(predicted, true, visible, threshold=1.0) == pytest.approx(20.0)


def test_harmonic_mean_over_layers_and_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [factor * torch.rand(4, 5, generator=generator) - 3 for factor in (100.0, 1.0, 0.01)]
    result = harmonic_mean(*scores)
    ranges = [
        (score.double() - score.double().min()) / (score.double().max() - score.double().min()) for score in scores
    ]
    for place in torch.cartesian_prod(torch.arange(4), torch.arange(5)).tolist():
        values = [float(score[tuple(place)]) for score in ranges]
        expected = 0.0 if min(values) == 0 else 3 / sum(1 / value for value in values)
        assert float(result[tuple(place)]) == pytest.approx(expected, abs=1e-12)
    assert torch.equal(harmonic_mean(scores[0], torch.ones(4, 5)), torch.zeros(4, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"visible": VISIBLE[:, :2]}, r"^visible has shape \(5, 2\); expected \(5, 3\)$"),
        ({"visible": VISIBLE.float()}, r"^visible is torch.float32; expected torch.bool: pass visible.bool\(\)$"),
        ({"visible": torch.zeros(5, 3).bool()}, "^no point is visible in the frame of its query and in another;"),
        ({"query": torch.ones(2, 3, 44, 8)}, r"^query has shape \(2, 3, 44, 8\); expected \[row, head, 45, width\]$"),
        (
            {"grid": TokenGrid(1, 9, 5, (8.0, 8.0)), "points": POINTS[:1], "visible": VISIBLE[:1, :1]},
            "^the clip has one",
        ),
    ],
)
def test_refusals(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConceptMapsValueError, match=message):
        scored(**changed)


def test_refusals_of_accuracy_and_mean() -> None:
    places, visible = torch.zeros(2, 3, 2), torch.zeros(2, 3).bool()
    with pytest.raises(ConceptMapsValueError, match="^no point is visible in any frame; expected one that is$"):
        matching_accuracy(places, places, visible)
    with pytest.raises(ConceptMapsValueError, match=r"^true has shape \(2, 2, 2\); expected \(2, 3, 2\)$"):
        matching_accuracy(places, places[:, :2], visible)
    with pytest.raises(ConceptMapsValueError, match=r"^visible has shape \(2, 2\); expected \(2, 3\)$"):
        matching_accuracy(places, places, visible[:, :2])
    with pytest.raises(ConceptMapsValueError, match=r"^there are no scores; expected at least one \[layer, step\]$"):
        harmonic_mean()
    with pytest.raises(ConceptMapsValueError, match=r"^a score has shape \(2, 2\); expected \(2, 3\)$"):
        harmonic_mean(torch.ones(2, 3), torch.ones(2, 2))
