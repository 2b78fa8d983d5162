"""Where points of a clip are in its other frames, by queries and keys of one layer (DiffTrack, arXiv 2506.17220).

An op does the work, for the tokens asked for alone; `fusing` does that of several layers and steps.

Notation of the shape comments: R rows of the batch, H heads, N points, K tokens around each, F frames of P tokens, D
head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusers_concept_maps import ops_matching
from diffusers_concept_maps.correspondence.readout import TokenGrid
from diffusers_concept_maps.correspondence.routes import (
    Found,
    Matches,
    MatchOptions,
    Route,
    Way,
    assemble,
    expect_sides,
    measure_agreement,
    spread_heads,
)

__all__ = [
    "MatchOptions",
    "Matches",
    "concatenate_layers",
    "difftrack_scale",
    "each_head",
    "match_points",
]


def match_points(
    query: torch.Tensor,
    key: torch.Tensor,
    points: torch.Tensor,
    grid: TokenGrid,
    options: MatchOptions | None = None,
    *,
    frames: Sequence[int] | None = None,
    heads: Sequence[int] | torch.Tensor | None = None,
    scale: float | None = None,
    agreement: bool = True,
) -> Matches:
    """Match points of a clip with its frames, by one layer (DiffTrack, arXiv 2506.17220).

    Args:
        query: `[R, H, F * P, D]`, of the image tokens, as attention takes it: normed and rotated.
        key: `[R, H, F * P, D]`.
        points: float `[N, 3]`, (frame, x, y): a frame of tokens, and pixel-center coordinates.
        grid: of the clip.
        options: how weights are made and read; None is `MatchOptions()`.
        frames: the frames of tokens to match with, in the order of the results; None for all.
        heads: indices for the mean of some heads, float `[H]` for their mean by weight, None for that of all.
        scale: factor of the logits; None is `1 / sqrt(D)`, as in attention. `difftrack_scale` is the official one.
        agreement: match the matches back into the frame of the query; it doubles the work.

    Returns:
        The matches in `frames`.

    Raises:
        ConceptMapsValueError: shapes do not fit the grid, or there is no such frame or head.
    """
    way = Way.through(grid, frames, options)
    expect_sides(query, key, grid)
    weights = spread_heads(heads, query)

    def find(route: Route) -> Found:
        sides = route.sides(query, key, way)
        return ops_matching.temporal_matching(
            *sides,
            route.tokens(sides[0]),
            weights.repeat_interleave(len(sides[0]) // len(query), dim=0),
            sides[2].shape[2] // grid.tokens,
            grid.width,
            scale=scale,
            direction=way.options.direction,
            radius=way.options.window,
        )

    routes = way.depart(points)
    matches = assemble(routes, find, way)
    return measure_agreement(way.turn(routes, matches), find, way, matches) if agreement else matches


def difftrack_scale(query: torch.Tensor) -> float:
    """The factor of the logits in the official tracking: by the number of heads, taken there for the head width.

    Args:
        query: `[R, H, N, D]`.
    """
    return float(query.shape[1] ** -0.5)


def concatenate_layers(layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Fuse layers like the official code, which adds the logits of equal heads before the softmax.

    Heads of one number in several layers have nothing in common: `fusing.MatchAccumulator` adds probabilities instead,
    and keeps no layer.

    Args:
        layers: query and key `[R, H, N, D]` of every layer or step.

    Returns:
        One query and key `[R, H, N, layer * D]`; pass a scale with them, for that of their width is another.
    """
    queries, keys = zip(*layers, strict=True)
    return torch.cat(queries, dim=-1), torch.cat(keys, dim=-1)


def each_head(side: torch.Tensor) -> torch.Tensor:
    """Make rows of heads, so that each is matched by itself.

    Args:
        side: query or key `[R, H, N, D]`.

    Returns:
        `[R * H, 1, N, D]`; `unflatten(0, (R, H))` sorts the results.
    """
    return side.flatten(0, 1)[:, None]
