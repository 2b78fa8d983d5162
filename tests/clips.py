"""Clips of queries and keys, points in them, and their matches by every weight of all tokens in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import naive_matching
import torch

from diffusers_concept_maps.correspondence.fusing import MatchAccumulator
from diffusers_concept_maps.correspondence.matching import Matches, MatchOptions
from diffusers_concept_maps.correspondence.readout import TokenGrid, interpolate_matches, neighbors

Layer = tuple[torch.Tensor, torch.Tensor]


def distinct(tokens: int) -> torch.Tensor:
    """Features `[tokens, D]` of which each is like none but itself, so that every weight is 0 or 1."""
    return 60 * torch.eye(tokens)


def still(grid: TokenGrid) -> Layer:
    side = distinct(grid.tokens).repeat(grid.frames, 1)[None, None]
    return side, side


def random_layer(grid: TokenGrid, rows: int = 2, heads: int = 3, width: int = 8, seed: int = 0) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, rows, heads, grid.frames * grid.tokens, width)
    query, key = torch.randn(shape, generator=generator)
    return query, key


def scattered(grid: TokenGrid, count: int, seed: int = 0) -> torch.Tensor:
    """Points anywhere in any frame."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(grid.frames, (count, 1), generator=generator)
    size = torch.tensor([grid.width * grid.stride[0], grid.height * grid.stride[1]])
    return torch.cat([frames, torch.rand(count, 2, generator=generator) * size - 0.5], dim=1)


def fused(accumulator: MatchAccumulator, layers: Sequence[Layer], **named: Any) -> Matches:
    for layer in layers:
        accumulator.add(*layer, **named)
    back = accumulator.way_back()
    for layer in layers:
        back.add(*layer, **named)
    return back.matches()


def naive_weights(
    layers: Sequence[Layer],
    heads: torch.Tensor,
    source: int,
    targets: list[int],
    tokens: torch.Tensor,
    grid: TokenGrid,
    scale: float,
    direction: str,
) -> torch.Tensor:
    """`[R, Q, F, P]`, the mean of several layers in float64."""
    every = []
    for query, key in layers:
        sides = [side.unflatten(2, (grid.frames, grid.tokens)) for side in (query, key)]
        near = [side[:, :, source] for side in sides]
        far = [side[:, :, targets].flatten(2, 3) for side in sides]
        inputs = naive_matching.Inputs(*near, *far, tokens, heads.expand(len(query), -1), len(targets), grid.width)
        every.append(naive_matching.matching_weights(inputs, scale, direction))
    return torch.stack(every).mean(0)


def naive_window(frame: torch.Tensor, token: int, grid: TokenGrid, radius: int) -> torch.Tensor:
    """The mean (x, y) of the tokens around one, by the weights `[P]` of a frame."""
    y, x = divmod(token, grid.width)
    left, up = min(radius, x, grid.width - 1 - x), min(radius, y, grid.height - 1 - y)
    window = frame.view(grid.height, grid.width)[y - up : y + up + 1, x - left : x + left + 1]
    lines, columns = torch.arange(y - up, y + up + 1), torch.arange(x - left, x + left + 1)
    return torch.stack([(window * columns).sum(), (window * lines[:, None]).sum()]) / window.sum()


def naive_place(weights: torch.Tensor, pixel: torch.Tensor, grid: TokenGrid, options: MatchOptions) -> torch.Tensor:
    """Where a pixel is by the weights `[P, P']` of all tokens of its frame for one other."""
    around = neighbors(pixel[None], grid, options.readout)
    radius = options.radius if options.readout in ("refined", "soft") else 0
    found = [naive_window(weights[token], int(weights[token].argmax()), grid, radius) for token in around.tokens[0]]
    matches = torch.stack(found)[None, :, None]
    return interpolate_matches(pixel[None], around, matches, grid, options.readout)[0, 0]


def naive_match(
    layers: Sequence[Layer],
    heads: torch.Tensor,
    row: int,
    point: torch.Tensor,
    frame: int,
    grid: TokenGrid,
    options: MatchOptions,
    scale: float,
) -> dict[str, Any]:
    """One point in one frame, and back, by all weights of all tokens of both frames."""
    tokens = torch.arange(grid.tokens).expand(len(layers[0][0]), -1)
    source = int(point[0])
    there, back = (
        naive_weights(layers, heads, a, [b], tokens, grid, scale, options.direction)[row, :, 0]
        for a, b in ((source, frame), (frame, source))
    )
    nearest = neighbors(point[None, 1:], grid, options.readout)
    own = there[nearest.tokens[0, nearest.shares.argmax()]]
    place = naive_place(there, point[1:].double(), grid, options)
    end = naive_place(back, place, grid, options)
    share = own / own.sum()
    known = {"tokens": own.argmax(), "confidence": own.max(), "entropy": torch.special.entr(share).sum()}
    if source == frame:
        return known | {"positions": point[1:].double(), "agreement": torch.zeros((), dtype=torch.float64)}
    return known | {"positions": place, "agreement": (end - point[1:]).norm()}


def assert_naive(
    matches: Matches,
    layers: Sequence[Layer],
    heads: torch.Tensor,
    points: torch.Tensor,
    grid: TokenGrid,
    options: MatchOptions,
    scale: float,
    frames: Sequence[int],
    atol: float = 1e-4,
) -> None:
    for row in range(len(layers[0][0])):
        for number, point in enumerate(points):
            for column, frame in enumerate(frames):
                expected = naive_match(layers, heads, row, point, frame, grid, options, scale)
                for name, value in expected.items():
                    result = getattr(matches, name)[row, number, column]
                    assert result.dtype == (torch.int64 if name == "tokens" else torch.float32)
                    torch.testing.assert_close(result.to(value.dtype), value, rtol=0, atol=atol)
