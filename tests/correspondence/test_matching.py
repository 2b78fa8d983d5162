"""Matches of points: still and shifted clips exactly, any clip against every probability in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clips import Layer, assert_naive, distinct, fused, random_layer, scattered, still
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_concept_maps import ConceptMapsValueError, dispatch, reference_matching
from diffusers_concept_maps.correspondence.fusing import MatchAccumulator
from diffusers_concept_maps.correspondence.matching import (
    Matches,
    MatchOptions,
    concatenate_layers,
    difftrack_scale,
    each_head,
    match_points,
)
from diffusers_concept_maps.correspondence.readout import (
    READOUTS,
    TokenGrid,
    interpolate_matches,
    nearest_token,
    neighbors,
)
from diffusers_concept_maps.ops_matching import DIRECTIONS

GRID = TokenGrid(frames=4, height=6, width=9, stride=(16.0, 10.5))
SMALL = TokenGrid(frames=3, height=4, width=5, stride=(8.0, 6.0))

either_way = pytest.mark.parametrize("way", ["op", "fused"])


def matched(
    way: str, layer: Layer, points: torch.Tensor, grid: TokenGrid, options: MatchOptions | None = None, **named: Any
) -> Matches:
    """The matches of a layer by the op, or by an accumulator of that layer alone."""
    if way == "op":
        return match_points(*layer, points, grid, options, **named)
    return fused(MatchAccumulator(points, grid, options, frames=named.pop("frames", None)), [layer], **named)


def borders(grid: TokenGrid) -> torch.Tensor:
    """Places along the borders and within, in every frame."""
    x = torch.linspace(-0.5, grid.width * grid.stride[0] - 0.5, 11)
    y = torch.linspace(-0.5, grid.height * grid.stride[1] - 0.5, 6)
    places = torch.cat([torch.cartesian_prod(x, y), torch.tensor([[0.0, 0.0], [31.25, 20.75], [143.0, 62.0]])])
    frames = torch.arange(float(grid.frames)).repeat_interleave(len(places))
    return torch.cat([frames[:, None], places.repeat(grid.frames, 1)], dim=1)


@either_way
@pytest.mark.parametrize("readout", ["refined", "displacement"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_still_clip_returns_the_points(way: str, readout: str, direction: str) -> None:
    points = borders(GRID)
    matches = matched(way, still(GRID), points, GRID, MatchOptions(direction, readout, radius=2))
    shape = (1, len(points), GRID.frames)
    torch.testing.assert_close(matches.positions, points[:, None, 1:].expand(*shape, 2), rtol=0, atol=1e-4)
    torch.testing.assert_close(matches.agreement, torch.zeros(shape), rtol=0, atol=1e-4)
    torch.testing.assert_close(matches.confidence, torch.ones(shape))
    torch.testing.assert_close(matches.entropy, torch.zeros(shape), rtol=0, atol=1e-4)
    assert torch.equal(matches.tokens, nearest_token(points[:, 1:], GRID)[:, None].expand(shape))


def between_centers(places: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """Whether a place is between the centers of the tokens of two opposite corners, but for rounding."""
    stride, size = torch.tensor(grid.stride), torch.tensor([grid.width, grid.height])
    first, last = 0.5 * stride - 0.5, (size - 0.5) * stride - 0.5
    return ((places > first - 1e-3) & (places < last + 1e-3)).all(-1)


@either_way
def test_a_shift_by_tokens_is_returned(way: str) -> None:
    moves = torch.tensor([[0, 0], [1, 0], [-2, 1], [3, -3]])  # (x, y) of what is seen, in tokens, by frame
    picture = distinct(GRID.tokens).view(GRID.height, GRID.width, -1)
    side = torch.cat([picture.roll((y, x), (0, 1)).flatten(0, 1) for x, y in moves.tolist()])[None, None]
    points = borders(GRID)
    places = points[:, None, 1:]
    matches = matched(way, (side, side), points, GRID)
    expected = places + (moves - moves[points[:, 0].long()][:, None]) * torch.tensor(GRID.stride)  # [N, F, 2]
    # What leaves the picture comes in again at the opposite border; none of the tokens around these points does.
    stride, size = torch.tensor(GRID.stride), torch.tensor([GRID.width, GRID.height])
    inner = places.clamp(0.5 * stride - 0.5, (size - 0.5) * stride - 0.5)
    stays = between_centers(inner + expected - places, GRID)
    assert 200 < stays.sum() < stays.numel() - 200
    torch.testing.assert_close(matches.positions[0][stays], expected[stays], rtol=0, atol=1e-4)
    returns = between_centers(places, GRID) & between_centers(expected, GRID)
    assert returns.sum() > 200
    assert matches.agreement is not None
    assert matches.agreement[0][returns].max() < 1e-4


@either_way
@pytest.mark.parametrize("readout", READOUTS)
def test_every_readout_against_all_weights(way: str, readout: str) -> None:
    layer, points, options = random_layer(SMALL), scattered(SMALL, 5), MatchOptions(readout=readout)
    matches = matched(way, layer, points, SMALL, options)
    assert_naive(matches, [layer], torch.full((3,), 1 / 3), points, SMALL, options, 8**-0.5, range(3))


@either_way
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_direction_against_all_weights(way: str, direction: str) -> None:
    layer, points, options = (
        random_layer(SMALL, seed=1),
        scattered(SMALL, 5, seed=1),
        MatchOptions(direction, radius=2),
    )
    matches = matched(way, layer, points, SMALL, options, frames=[2, 0], heads=[2, 0], scale=0.7)
    assert_naive(matches, [layer], torch.tensor([0.5, 0, 0.5]), points, SMALL, options, 0.7, [2, 0])


@either_way
def test_heads_by_weight(way: str) -> None:
    layer, points = random_layer(SMALL, seed=2), scattered(SMALL, 3, seed=2)
    matches = matched(way, layer, points, SMALL, heads=torch.tensor([1.0, 3.0, 0.0]))
    assert_naive(matches, [layer], torch.tensor([0.25, 0.75, 0]), points, SMALL, MatchOptions(), 8**-0.5, range(3))


def test_each_head_by_itself() -> None:
    query, key = random_layer(SMALL)
    points = scattered(SMALL, 4)
    every = match_points(each_head(query), each_head(key), points, SMALL)
    for head in range(3):
        alone = match_points(query, key, points, SMALL, heads=[head])
        for name in ("positions", "tokens", "confidence", "entropy", "agreement"):
            torch.testing.assert_close(getattr(every, name).unflatten(0, (2, 3))[:, head], getattr(alone, name))


def test_official_fusion_adds_logits() -> None:
    layers, points = [random_layer(SMALL, seed=seed) for seed in (6, 7)], scattered(SMALL, 4)
    query, key = concatenate_layers(layers)
    scale = difftrack_scale(query)
    matches = match_points(query, key, points, SMALL, MatchOptions("forward", "argmax"), scale=scale)
    assert scale == 3**-0.5  # of 3 heads
    for number, (frame, *pixel) in enumerate(points.tolist()):
        token = int(frame) * SMALL.tokens + int(nearest_token(torch.tensor(pixel), SMALL))
        logits = sum(layer[0].double()[:, :, token, None] @ layer[1].double().mT for layer in layers)
        weights = (logits * scale).unflatten(-1, (3, -1)).softmax(-1).mean(1)[:, 0]  # [R, F, P]
        torch.testing.assert_close(matches.confidence[:, number].double(), weights.amax(-1), rtol=0, atol=1e-5)
        assert torch.equal(matches.tokens[:, number], weights.argmax(-1))


def tracking_deltas(readout: str, points: int = 20_000) -> list[float]:
    """Percentage of points within 1 to 16 pixels of 256 in a still clip of the official size."""
    grid = TokenGrid(1, 30, 45, (16.0, 16.0))
    factor = torch.tensor([720 / 256, 480 / 256])
    true = torch.rand(points, 2, generator=torch.Generator().manual_seed(0)) * 256
    around = neighbors(true * factor, grid, readout)
    same = torch.stack([around.tokens % 45, around.tokens // 45], -1).float()[..., None, :]
    found = interpolate_matches(true * factor, around, same, grid, readout)[:, 0] / factor
    error = (found - true).norm(dim=1)
    return [100 * (error < threshold).double().mean().item() for threshold in (1, 2, 4, 8, 16)]


def test_official_readout_of_a_still_clip_scores_74_and_the_default_100() -> None:
    official = tracking_deltas("difftrack")
    assert sum(official) / 5 == pytest.approx(74.4, abs=0.3)
    assert official[:2] == [pytest.approx(17.7, abs=1.0), pytest.approx(65.5, abs=1.0)]
    assert tracking_deltas(MatchOptions().readout) == [100.0] * 5


def test_motion_by_half_a_token_is_seen() -> None:
    """The largest weight alone is a whole token off or none: here a token moves to the middle between two."""
    grid = TokenGrid(2, 1, 5, (16.0, 16.0))
    features = distinct(6)
    between = (features[:-1] + features[1:])[[0, 1, 2, 3, 4]] / 2
    side = torch.cat([features[:5], between])[None, None]  # what is at x in frame 1 was half at x, half at x + 1
    points = torch.tensor([[0.0, 39.5, 7.5]])
    places = {}
    for readout in ("refined", "displacement"):
        options = MatchOptions("forward", readout)
        places[readout] = match_points(side, side, points, grid, options).positions[0, 0, 1, 0].item()
    assert places["refined"] == pytest.approx(39.5 - 8, abs=1.5)
    assert abs(places["displacement"] - 31.5) == pytest.approx(8)


def test_default_temperature_is_by_the_head_width() -> None:
    query, key = random_layer(SMALL, heads=5)
    points = scattered(SMALL, 4)
    default = match_points(query, key, points, SMALL, agreement=False)
    right = match_points(query, key, points, SMALL, scale=8**-0.5, agreement=False)
    official = match_points(query, key, points, SMALL, scale=difftrack_scale(query), agreement=False)
    assert default.agreement is None
    assert torch.equal(default.confidence, right.confidence)
    assert not torch.allclose(default.confidence, official.confidence)


@either_way
def test_half_precision_is_weighed_in_full(way: str) -> None:
    query, key = (side.bfloat16() for side in random_layer(SMALL, heads=4))
    points = scattered(SMALL, 4)
    matches = matched(way, (query, key), points, SMALL)
    heads = torch.full((4,), 0.25)
    assert_naive(matches, [(query, key)], heads, points, SMALL, MatchOptions(), 8**-0.5, range(3))


class Largest(TorchDispatchMode):
    """The number of elements of the largest new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple | list) else [result]
        for tensor in filter(torch.is_tensor, tensors):
            self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@either_way
def test_memory_is_linear_in_tokens(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "temporal_matching", reference_matching.temporal_matching)  # to look into the op
    grid = TokenGrid(2, 50, 60, (8.0, 8.0))
    layer = random_layer(grid, rows=1, heads=1, width=4)
    with Largest() as largest:
        matched(way, layer, scattered(grid, 3), grid)
    assert grid.tokens < largest.size <= 512 * grid.tokens < grid.tokens**2


@either_way
@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"frames": [0, 3]}, r"^frames are \[0, 3\]; expected some of 0 to 2, each once$"),
        ({"frames": [1, 1]}, r"^frames are \[1, 1\]; expected some of 0 to 2, each once$"),
        ({"frames": []}, r"^frames are \[\]; expected some of 0 to 2, each once$"),
        ({"heads": [3]}, r"^heads are \[3\]; expected some of 0 to 2, each once$"),
        ({"heads": []}, r"^heads are \[\]; expected some of 0 to 2, each once$"),
        ({"heads": torch.ones(3).bool()}, r"^heads are \[1, 1, 1\]; expected some of 0 to 2, each once$"),
        ({"heads": torch.zeros(3)}, r"^heads have weights \[0.0, 0.0, 0.0\]; expected positive ones and zeros$"),
        ({"heads": torch.tensor([1.0, -1, 2])}, r"^heads have weights \[1.0, -1.0, 2.0\]; expected positive ones and"),
        ({"heads": torch.ones(2)}, r"^heads has shape \(2,\); expected \(3,\)$"),
        ({"points": torch.zeros(3)}, r"^points have shape \(3,\); expected \[point, 3\]: \(frame, x, y\)$"),
        ({"points": torch.zeros(0, 3)}, r"^points have shape \(0, 3\); expected \[point, 3\]: \(frame, x, y\)$"),
        ({"points": torch.tensor([[0.5, 1, 1]])}, "^points have a frame or a place that is no number; expected a"),
        ({"points": torch.tensor([[0.0, torch.nan, 1]])}, "^points have a frame or a place that is no number"),
        ({"points": torch.tensor([[3.0, 1, 1]])}, "^a point is in frame 3; expected 0 to 2$"),
        ({"layer": 2 * (torch.ones(1, 3, 59, 8),)}, r"^query has shape \(1, 3, 59, 8\); expected \[row, head, 60, "),
        ({"layer": (torch.ones(1, 3, 60, 8), torch.ones(1, 3, 60, 4))}, r"^key has shape .*; expected \(1, 3, 60, 8"),
    ],
)
def test_refusals(way: str, named: dict[str, Any], message: str) -> None:
    arguments = {"layer": random_layer(SMALL), "points": scattered(SMALL, 2), "grid": SMALL} | named
    with pytest.raises(ConceptMapsValueError, match=message):
        matched(way, **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "up"}, "^unknown direction 'up'; expected one of both, forward, backward$"),
        ({"readout": "best"}, "^unknown readout 'best'; expected one of refined, displacement, soft, argmax, difft"),
        ({"radius": -1}, "^radius is -1; expected 0 or more tokens$"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConceptMapsValueError, match=message):
        MatchOptions(**options)
