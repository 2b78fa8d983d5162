"""Matches by several layers and steps: their weights are added, of the rows asked for, and no layer is kept.

Notation of the shape comments: R rows of the batch, H heads, n points of a route, K tokens around each, F frames of P
tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusers_concept_maps import reference_matching
from diffusers_concept_maps.correspondence.readout import TokenGrid
from diffusers_concept_maps.correspondence.routes import (
    Found,
    Matches,
    MatchOptions,
    Return,
    Route,
    Sides,
    Way,
    assemble,
    expect_sides,
    measure_agreement,
    spread_heads,
)
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.ops import expect_shape

__all__ = ["AgreementAccumulator", "MatchAccumulator"]

_CHUNK = 512  # rows of weights that are made, or read, at a time


class _Rows:
    """Weights of the rows of some routes, float32 `[rows, n * K, F, P]` each, summed over layers and steps."""

    def __init__(self, routes: Sequence[Route], way: Way) -> None:
        self._routes, self._way = routes, way
        self._sums: dict[int, torch.Tensor] = {}  # by the frame of the route's queries
        self._total = 0.0

    def add(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        heads: Sequence[int] | torch.Tensor | None = None,
        scale: float | None = None,
        weight: float = 1.0,
    ) -> None:
        """Add the weights of a layer in a step; nothing of it is kept.

        Args:
            query: `[R, H, F * P, D]`, as for `match_points`; H and D may be other than the last layer's.
            key: `[R, H, F * P, D]`.
            heads: as for `match_points`.
            scale: as for `match_points`.
            weight: of the layer in the mean of all.

        Raises:
            ConceptMapsValueError: as for `match_points`, or the weight is not positive.
        """
        if not weight > 0:
            raise ConceptMapsValueError(f"weight is {weight}; expected a positive number")
        expect_sides(query, key, self._way.grid)
        scale = query.shape[3] ** -0.5 if scale is None else scale
        weights = spread_heads(heads, query) * weight
        for route in self._routes:
            sides = route.sides(query, key, self._way)
            every = weights.repeat_interleave(len(sides[0]) // len(query), dim=0)
            self._add(route, sides, every, scale)
        self._total += weight

    def _add(self, route: Route, sides: Sides, weights: torch.Tensor, scale: float) -> None:
        """Add what a layer has for one route."""
        tokens, direction, size = route.tokens(sides[0]), self._way.options.direction, self._way.grid.tokens
        shape = (*tokens.shape, sides[2].shape[2] // size, size)
        if route.frame not in self._sums:
            self._sums[route.frame] = tokens.new_zeros(shape, dtype=torch.float32)
        sums = self._sums[route.frame]
        expect_shape("the sum of earlier layers", sums, shape)
        for row, (total, heads) in enumerate(zip(sums, weights, strict=True)):
            own = (sides[0][row], sides[1][row], sides[2][row], sides[3][row])
            norms = None if direction == "forward" else reference_matching.log_sums(own[2], own[1], scale)
            for frame in range(shape[2]):
                place = slice(frame * size, (frame + 1) * size)
                for chunk, part in zip(tokens[row].split(_CHUNK), total[:, frame].split(_CHUNK), strict=True):
                    part += reference_matching.frame_weights(own, chunk, place, heads, scale, direction, norms)

    def _find(self, route: Route) -> Found:
        """Read the mean of what was added, as `temporal_matching` reads a layer."""
        sums = self._sums[route.frame]
        chunks = sums.flatten(0, 2).split(_CHUNK)
        width, window = self._way.grid.width, self._way.options.window
        found = [reference_matching.read_out(chunk / self._total, width, window) for chunk in chunks]
        index, value, entropy, position = (
            torch.cat(parts).unflatten(0, sums.shape[:3]) for parts in zip(*found, strict=True)
        )
        return index, value, entropy, position

    def _expect_layers(self) -> None:
        if not self._total:
            raise ConceptMapsValueError("no layer was added; call add() with the query and key of one")


class MatchAccumulator(_Rows):
    """Matches by the mean of several layers and steps, whose weights are added and not kept.

    `add` every layer, then read `matches`. For their agreement, `add` the layers once more to `way_back`.

    Args:
        points: float `[N, 3]`, (frame, x, y): a frame of tokens, and pixel-center coordinates.
        grid: of the clip.
        options: how weights are made and read; None is `MatchOptions()`.
        frames: the frames of tokens to match with, in the order of the results; None for all.

    Raises:
        ConceptMapsValueError: there is no such frame, or points of another shape.
    """

    def __init__(
        self,
        points: torch.Tensor,
        grid: TokenGrid,
        options: MatchOptions | None = None,
        *,
        frames: Sequence[int] | None = None,
    ) -> None:
        way = Way.through(grid, frames, options)
        super().__init__(way.depart(points), way)

    def matches(self) -> Matches:
        """Matches by what was added so far, without agreement.

        Raises:
            ConceptMapsValueError: nothing was.
        """
        self._expect_layers()
        return assemble(self._routes, self._find, self._way)

    def way_back(self) -> AgreementAccumulator:
        """What takes the same layers again, to match the matches back into the frames of the queries.

        Raises:
            ConceptMapsValueError: nothing was added.
        """
        matches = self.matches()
        return AgreementAccumulator(self._way.turn(self._routes, matches), self._way, matches)


class AgreementAccumulator(_Rows):
    """Agreement of the matches of a `MatchAccumulator`, which makes it: `add` the layers, then read `matches`."""

    def __init__(self, ways_back: list[Return], way: Way, matches: Matches) -> None:
        super().__init__(ways_back, way)
        self._ways_back, self._matches = ways_back, matches

    def matches(self) -> Matches:
        """The matches, with their agreement by what was added so far.

        Raises:
            ConceptMapsValueError: nothing was.
        """
        self._expect_layers()
        return measure_agreement(self._ways_back, self._find, self._way, self._matches)
