"""The ways of points through a clip: what is matched with what, and how what was found becomes matches.

Notation of the shape comments: R rows of the batch, H heads, N points, K tokens around each, F frames of P tokens, D
head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from diffusers_concept_maps import ops_matching
from diffusers_concept_maps.correspondence.readout import (
    READOUTS,
    Neighbors,
    TokenGrid,
    interpolate_matches,
    neighbors,
)
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.ops import expect_shape

__all__ = [
    "Found",
    "MatchOptions",
    "Matches",
    "Return",
    "Route",
    "Sides",
    "Way",
    "assemble",
    "expect_points",
    "expect_sides",
    "measure_agreement",
    "spread_heads",
]

Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""What `ops_matching.temporal_matching` gives: index, weight, entropy `[rows, n * K, frames]`, position `[.., 2]`."""
Sides = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Query and key of the source, query and key of the targets."""


@dataclass(frozen=True)
class MatchOptions:
    """How weights are made and read.

    Attributes:
        direction: as for `ops_matching.temporal_matching`; "both" is the official code's.
        readout: one of `readout.READOUTS`: "argmax", the token of the largest weight; "soft", the mean by weight of a
            window around it; "displacement", what the tokens around the point moved by the first; "refined", by the
            second, without those that moved otherwise than the nearest; or "difftrack", the official read-out, which
            is off even for a still video.
        radius: of the window, in tokens.

    Raises:
        ConceptMapsValueError: an unknown direction or read-out, or a negative radius.
    """

    direction: str = "both"
    readout: str = "refined"
    radius: int = 1

    def __post_init__(self) -> None:
        for name, value, known in (
            ("direction", self.direction, ops_matching.DIRECTIONS),
            ("readout", self.readout, READOUTS),
        ):
            if value not in known:
                raise ConceptMapsValueError(f"unknown {name} {value!r}; expected one of {', '.join(known)}")
        if self.radius < 0:
            raise ConceptMapsValueError(f"radius is {self.radius}; expected 0 or more tokens")

    @property
    def window(self) -> int:
        """The radius where the read-out has a window, otherwise 0."""
        return self.radius if self.readout in ("refined", "soft") else 0


@dataclass(frozen=True)
class Matches:
    """Matches of N points in F frames of tokens, for R rows of a batch.

    In the frame of its query a point is where it was asked for.

    Attributes:
        positions: float32 `[R, N, F, 2]`, (x, y) in pixel-center coordinates.
        tokens: int64 `[R, N, F]`, the token of the largest weight in its frame, for the token nearest to the point.
        confidence: float32 `[R, N, F]`, that weight.
        entropy: float32 `[R, N, F]`, in nats, of the weights of the frame relative to their sum.
        agreement: float32 `[R, N, F]`, pixels between the point and where its match is matched in the frame of the
            query; None where this was not computed.
    """

    positions: torch.Tensor
    tokens: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor
    agreement: torch.Tensor | None = None


@dataclass(frozen=True)
class Way:
    """Where points are looked for, and how.

    Attributes:
        grid: of the clip.
        frames: the frames of tokens to match with, F of them.
        options: how weights are made and read.
    """

    grid: TokenGrid
    frames: tuple[int, ...]
    options: MatchOptions

    @classmethod
    def through(cls, grid: TokenGrid, frames: Sequence[int] | None, options: MatchOptions | None) -> Way:
        """Check frames, of which None is all, and options, of which None is `MatchOptions()`.

        Raises:
            ConceptMapsValueError: no frame, no such frame, or one twice.
        """
        chosen = range(grid.frames) if frames is None else [int(frame) for frame in frames]
        if not chosen or not set(chosen) <= set(range(grid.frames)) or len(set(chosen)) < len(chosen):
            raise ConceptMapsValueError(
                f"frames are {list(chosen)}; expected some of 0 to {grid.frames - 1}, each once"
            )
        return cls(grid, tuple(chosen), options or MatchOptions())

    def depart(self, points: torch.Tensor) -> list[Route]:
        """One route for every frame that points are in; they are checked by `expect_points`."""
        frames, pixels = expect_points(points, self.grid)
        routes = []
        for frame in frames.unique().tolist():
            members = (frames == frame).nonzero()[:, 0]
            start = pixels[members][None]
            routes.append(Route(frame, members, start, neighbors(start, self.grid, self.options.readout)))
        return routes

    def turn(self, routes: Sequence[Route], matches: Matches) -> list[Return]:
        """The routes from the matches back to the frames of the queries."""
        back = []
        for route in routes:
            members = route.members.to(matches.positions.device)
            start = matches.positions[:, members].transpose(1, 2).flatten(0, 1)  # [R * F, n, 2]
            around = neighbors(start, self.grid, self.options.readout)
            back.append(Return(route.frame, route.members, start, around, route.pixels))
        return back


@dataclass(frozen=True)
class Route:
    """Points of one frame, on their way to the frames of `Way`."""

    frame: int  # of the queries
    members: torch.Tensor  # int64 [n], which of the N points
    pixels: torch.Tensor  # [rows or 1, n, 2], where the way begins
    around: Neighbors  # [rows or 1, n, K]

    def sides(self, query: torch.Tensor, key: torch.Tensor, way: Way) -> Sides:
        """Queries and keys of the source and of the targets, `[rows, H, tokens, D]`, of those of the clip."""
        place = slice(self.frame * way.grid.tokens, (self.frame + 1) * way.grid.tokens)
        return query[:, :, place], key[:, :, place], _choose(query, way), _choose(key, way)

    def tokens(self, like: torch.Tensor) -> torch.Tensor:
        """Int64 `[rows, n * K]`, on the device and with the rows of a tensor."""
        return self.around.tokens.to(like.device).flatten(1).expand(like.shape[0], -1)

    def locate(self, found: Found, way: Way) -> torch.Tensor:
        """Positions `[rows, n, frames, 2]` in pixels of what was found."""
        position = found[3].unflatten(1, self.around.tokens.shape[1:])
        around = Neighbors(*(side.to(position.device) for side in self.around))
        pixels = self.pixels.to(position.device)
        return interpolate_matches(pixels, around, position, way.grid, way.options.readout)

    def nearest(self, found: torch.Tensor) -> torch.Tensor:
        """Of `[rows, n * K, frames]`, what belongs to the token nearest to each point, `[rows, n, frames]`."""
        found = found.unflatten(1, self.around.tokens.shape[1:])
        choice = self.around.shares.argmax(-1).to(found.device)[..., None, None]
        return found.gather(2, choice.expand(len(found), -1, 1, found.shape[3])).squeeze(2)


@dataclass(frozen=True)
class Return(Route):
    """The way back: every frame is a source of its own, hence a row, and that of the queries the one target."""

    goal: torch.Tensor  # [1, n, 2], where the way there began

    def sides(self, query: torch.Tensor, key: torch.Tensor, way: Way) -> Sides:
        """As those of the way there, `[R * F, H, tokens, D]`."""
        near_query, near_key, far_query, far_key = super().sides(query, key, way)
        count = len(way.frames)
        source_query, source_key = (
            side.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1) for side in (far_query, far_key)
        )
        target_query, target_key = (
            side[:, None].expand(-1, count, -1, -1, -1).flatten(0, 1) for side in (near_query, near_key)
        )
        return source_query, source_key, target_query, target_key


def assemble(routes: Sequence[Route], find: Callable[[Route], Found], way: Way) -> Matches:
    """Walk the routes and sort what is found by the points' numbers.

    Args:
        routes: `Way.depart`.
        find: gives what is at the end of a route.
        way: of the routes.

    Returns:
        The matches, without agreement.
    """
    parts = []
    for route in routes:
        found = find(route)
        positions = route.locate(found, way)
        if route.frame in way.frames:
            positions[:, :, way.frames.index(route.frame)] = route.pixels.to(positions.device)
        parts.append((positions, *(route.nearest(side) for side in found[:3])))
    return Matches(*(_sort(routes, list(sides)) for sides in zip(*parts, strict=True)))


def measure_agreement(routes: list[Return], find: Callable[[Route], Found], way: Way, matches: Matches) -> Matches:
    """Walk the routes back and measure by how much they miss their beginning.

    Args:
        routes: `Way.turn`.
        find: as for `assemble`.
        way: of the routes.
        matches: the routes were made of.

    Returns:
        The matches with their agreement.
    """
    errors = []
    for route in routes:
        ends = route.locate(find(route), way).squeeze(2)  # [R * F, n, 2]
        error = (ends - route.goal.to(ends.device)).norm(dim=-1)
        error = error.unflatten(0, (-1, len(way.frames))).transpose(1, 2)  # [R, n, F]
        if route.frame in way.frames:
            error[:, :, way.frames.index(route.frame)] = 0.0
        errors.append(error)
    return replace(matches, agreement=_sort(routes, errors))


def _sort(routes: Sequence[Route], parts: list[torch.Tensor]) -> torch.Tensor:
    """Tensors `[R, n, ..]` of all routes as one `[R, N, ..]`."""
    order = torch.cat([route.members for route in routes]).argsort().to(parts[0].device)
    return torch.cat(parts, dim=1)[:, order]


def _choose(side: torch.Tensor, way: Way) -> torch.Tensor:
    """`[R, H, frames * P, D]` of the frames of the way, without a copy where these are all."""
    if way.frames == tuple(range(way.grid.frames)):
        return side
    frames = side.unflatten(2, (way.grid.frames, way.grid.tokens))
    return torch.cat([frames[:, :, frame] for frame in way.frames], dim=2)


def spread_heads(heads: Sequence[int] | torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    """The factor of every head in a mean over heads.

    Args:
        heads: indices for the mean of some heads, float `[H]` for their mean by weight, None for that of all.
        query: `[R, H, N, D]`.

    Returns:
        Float32 `[R, H]`, of sum 1.

    Raises:
        ConceptMapsValueError: no head, no such head or one twice, or weights that are not `[H]`, negative or all 0.
    """
    count = query.shape[1]
    if isinstance(heads, torch.Tensor) and heads.is_floating_point():
        expect_shape("heads", heads, (count,))
        weights = heads.float()
        if bool((weights < 0).any()) or not bool(weights.sum() > 0):
            raise ConceptMapsValueError(f"heads have weights {weights.tolist()}; expected positive ones and zeros")
    else:
        indices = list(range(count)) if heads is None else [int(head) for head in heads]
        if not indices or not set(indices) <= set(range(count)) or len(set(indices)) < len(indices):
            raise ConceptMapsValueError(f"heads are {indices}; expected some of 0 to {count - 1}, each once")
        weights = torch.zeros(count)
        weights[indices] = 1.0
    weights = weights / weights.sum()
    return weights.to(query.device).expand(len(query), -1)


def expect_points(points: torch.Tensor, grid: TokenGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Check points and split them.

    Args:
        points: float `[N, 3]`, (frame, x, y): a frame of tokens, and pixel-center coordinates.
        grid: of the clip.

    Returns:
        Int64 frames `[N]` and float32 pixels `[N, 2]`, on the CPU.

    Raises:
        ConceptMapsValueError: points are none, not finite, of another shape or in no frame.
    """
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise ConceptMapsValueError(f"points have shape {tuple(points.shape)}; expected [point, 3]: (frame, x, y)")
    points = points.detach().float().cpu()
    frames = points[:, 0]
    if not bool(points.isfinite().all()) or not bool(((frames == frames.round()) & (frames >= 0)).all()):
        raise ConceptMapsValueError("points have a frame or a place that is no number; expected a frame of tokens")
    if int(frames.max()) >= grid.frames:
        raise ConceptMapsValueError(f"a point is in frame {int(frames.max())}; expected 0 to {grid.frames - 1}")
    return frames.long(), points[:, 1:]


def expect_sides(query: torch.Tensor, key: torch.Tensor, grid: TokenGrid) -> None:
    """Refuse queries and keys that are not `[R, H, F * P, D]` of the grid.

    Args:
        query: of a layer.
        key: of the layer.
        grid: of the clip.

    Raises:
        ConceptMapsValueError: naming the tensor.
    """
    tokens = grid.frames * grid.tokens
    if query.ndim != 4 or query.shape[2] != tokens:
        raise ConceptMapsValueError(f"query has shape {tuple(query.shape)}; expected [row, head, {tokens}, width]")
    expect_shape("key", key, query.shape)
