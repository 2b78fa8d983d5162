"""Moving-shapes scenes: short clips whose every object has an exact mask in every frame.

A scene holds one or two objects on a shaded background. An object is a colour, a shape and a motion; about 40% of the
moving ones start late, so that "when" has a truth as well as "where". Objects never touch, so a mask is exact without
any rule for occlusion. Everything random comes from one `numpy.random.Generator`; drawing is PyTorch on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from diffusers_concept_maps.errors import ConceptMapsValueError

FRAMES, HEIGHT, WIDTH = 6, 32, 32
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.12, 0.12),
    "green": (0.12, 0.75, 0.18),
    "blue": (0.15, 0.30, 0.97),
    "yellow": (0.97, 0.87, 0.10),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "growing", "shrinking", "standing still")
BACKGROUNDS = ("dark", "light")
HELD_OUT = (("blue", "triangle"), ("yellow", "square"))
"""Colour-shape pairs that training never shows, to ask whether the parts of a name are bound one by one."""

STILL = MOTIONS.index("standing still")
_DIRECTION = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0), (0, 0), (0, 0)], dtype=float)
_GROWS = np.array([0, 0, 0, 0, 1, -1, 0], dtype=float)
# Radius of the circle around each shape, in units of the object's own radius: what "never touching" is measured with.
_REACH = np.array([1.0, 1.25, 1.37])
_SWELL = 0.22  # a growing object goes from (1 - 1.3 * _SWELL) to (1 + _SWELL) of its radius
_ATTEMPTS = 24  # placements tried per scene before the whole scene is drawn again


@dataclass(frozen=True)
class Scenes:
    """A batch of `n` scenes with two object slots each; slot 1 is empty where `count` is 1.

    Attributes:
        video: `[n, frame, 3, height, width]` float32 in [-1, 1], the layout CogVideoX takes.
        masks: `[n, 2, frame, height, width]` float32 in [0, 1], the anti-aliased coverage of each object.
        moves: `[n, 2, frame]` bool, True in the frames in which an object is under way (its start frame included).
        color, shape, motion: `[n, 2]` integers into `COLORS`, `SHAPES` and `MOTIONS`.
        start: `[n, 2]` integers, the frame in which the motion starts; 0 for objects that start at once or stand
            still.
        count: `[n]` integers, 1 or 2.
        background: `[n]` integers into `BACKGROUNDS`.
        center: `[n, 2, frame, 2]`, (x, y) of every object in pixels from the edge of the frame, 0.5 being the center
            of the first.
        radius: `[n, 2, frame]` in pixels; what is in an object moves with its center and scales with this.
    """

    video: torch.Tensor
    masks: torch.Tensor
    moves: torch.Tensor
    color: np.ndarray
    shape: np.ndarray
    motion: np.ndarray
    start: np.ndarray
    count: np.ndarray
    background: np.ndarray
    center: np.ndarray
    radius: np.ndarray

    def __len__(self) -> int:
        return len(self.count)

    def take(self, indices: np.ndarray) -> Scenes:
        """The scenes at these positions."""
        return Scenes(**{field.name: getattr(self, field.name)[indices] for field in fields(self)})

    @staticmethod
    def join(parts: Sequence[Scenes]) -> Scenes:
        """The scenes of all parts, one after another."""
        columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Scenes)}
        return Scenes(**{name: _joined(column) for name, column in columns.items()})


def _joined(column: list[Any]) -> Any:
    return torch.cat(column) if isinstance(column[0], torch.Tensor) else np.concatenate(column)


@dataclass(frozen=True)
class _Plan:
    """A scene before it is drawn; arrays as in `Scenes`."""

    color: np.ndarray
    shape: np.ndarray
    motion: np.ndarray
    start: np.ndarray
    count: np.ndarray
    background: np.ndarray
    center: np.ndarray
    radius: np.ndarray


def _draw_attributes(rng: np.random.Generator, n: int, held_out: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colours, shapes and motions `[n, 2]`; the two motions differ, and some pairs share colour, shape or both."""
    color = rng.integers(len(COLORS), size=(n, 2))
    shape = rng.integers(len(SHAPES), size=(n, 2))
    kind = rng.random(n)
    same_color, same_shape = kind < 0.40, (kind >= 0.25) & (kind < 0.60)
    other_color = (color[:, 0] + rng.integers(1, len(COLORS), size=n)) % len(COLORS)
    other_shape = (shape[:, 0] + rng.integers(1, len(SHAPES), size=n)) % len(SHAPES)
    color[:, 1] = np.where(same_color, color[:, 0], other_color)
    shape[:, 1] = np.where(same_shape, shape[:, 0], other_shape)
    motion = rng.integers(len(MOTIONS), size=(n, 2))
    motion[:, 1] = (motion[:, 0] + rng.integers(1, len(MOTIONS), size=n)) % len(MOTIONS)
    if not held_out:
        return color, shape, motion
    pairs = np.array([(list(COLORS).index(c), SHAPES.index(s)) for c, s in HELD_OUT])
    chosen = pairs[rng.integers(len(pairs), size=n)]
    color[:, 0], shape[:, 0] = chosen[:, 0], chosen[:, 1]
    return color, shape, motion


def _is_held_out(color: np.ndarray, shape: np.ndarray) -> np.ndarray:
    names = list(COLORS)
    hits = np.zeros(color.shape, dtype=bool)
    for held_color, held_shape in HELD_OUT:
        hits |= (color == names.index(held_color)) & (shape == SHAPES.index(held_shape))
    return hits


def _trajectories(
    rng: np.random.Generator, shape: np.ndarray, motion: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Centers `[n, attempts, 2, frame, 2]` in pixels and radii `[n, 2, frame]`, inside the frame at all times."""
    n = len(motion)
    steps = np.clip(np.arange(FRAMES) - start[..., None], 0, None).astype(float)
    span = FRAMES - 1 - start
    base = rng.uniform(4.9, 6.3, size=(n, 2))
    grow = _GROWS[motion][..., None]
    progress = steps / span[..., None]
    first = np.where(grow > 0, 1 - 1.3 * _SWELL, np.where(grow < 0, 1 + _SWELL, 1.0))
    last = np.where(grow > 0, 1 + _SWELL, np.where(grow < 0, 1 - 1.3 * _SWELL, 1.0))
    radius = base[..., None] * (first + (last - first) * progress)
    speed = np.where(start == 0, rng.uniform(2.2, 3.2, size=(n, 2)), rng.uniform(3.0, 4.0, size=(n, 2)))
    reach = (radius * _REACH[shape][..., None]).max(-1) + 0.3
    travel = np.minimum(speed * span, WIDTH - 2 * reach - 1)
    offset = _DIRECTION[motion][..., None, :] * (travel[..., None] * progress)[..., None]
    low = reach[..., None] - offset.min(2)
    high = WIDTH - reach[..., None] - offset.max(2)
    place = low[:, None] + (high - low)[:, None] * rng.random((n, _ATTEMPTS, 2, 2))
    return place[..., None, :] + offset[:, None], radius


def _draw_allowed(rng: np.random.Generator, n: int, held_out: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attributes as `_draw_attributes`, none of the `HELD_OUT` pairs among them unless asked for."""
    color, shape, motion = _draw_attributes(rng, n, held_out)
    while not held_out:
        bad = _is_held_out(color, shape).any(1)
        if not bad.any():
            break
        color[bad], shape[bad], motion[bad] = _draw_attributes(rng, int(bad.sum()), held_out)
    return color, shape, motion


def _plan(rng: np.random.Generator, n: int, objects: int | None, held_out: bool) -> _Plan:
    """Draw `n` scenes; where objects cannot be kept apart, sizes and places (never the words) are drawn again."""
    color, shape, motion = _draw_allowed(rng, n, held_out)
    count = np.full(n, objects) if objects else 1 + (rng.random(n) < 0.6)
    late = (rng.random((n, 2)) < 0.4) & (motion != STILL)
    start = np.where(late, rng.integers(2, 4, size=(n, 2)), 0)
    background = (rng.random(n) >= 0.6).astype(int)
    center, radius = np.zeros((n, 2, FRAMES, 2)), np.zeros((n, 2, FRAMES))
    todo = np.arange(n)
    while len(todo):
        places, radii = _trajectories(rng, shape[todo], motion[todo], start[todo])
        reach = (radii * _REACH[shape[todo]][..., None]).sum(1)
        gap = np.linalg.norm(places[:, :, 0] - places[:, :, 1], axis=-1) - reach[:, None]
        apart = (gap > 1.0).all(-1) | (count[todo] == 1)[:, None]
        placed = apart.any(1)
        center[todo[placed]] = places[placed, apart[placed].argmax(1)]
        radius[todo[placed]] = radii[placed]
        todo = todo[~placed]
    return _Plan(color, shape, motion, start, count, background, center, radius)


def coverage(shape: torch.Tensor, center: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Anti-aliased coverage of objects, from the signed distance to their outlines.

    Args:
        shape: indices into `SHAPES` `[..., object]`.
        center: x and y in pixels `[..., object, frame, 2]`.
        radius: in pixels `[..., object, frame]`.

    Returns:
        float `[..., object, frame, height, width]` in [0, 1].
    """
    rows = torch.arange(HEIGHT, device=center.device) + 0.5
    columns = torch.arange(WIDTH, device=center.device) + 0.5
    x = columns - center[..., 0, None, None]
    y = rows[:, None] - center[..., 1, None, None]
    r = radius[..., None, None]
    kind = shape[..., None, None, None]
    circle = (x.square() + y.square()).sqrt() - r
    square = torch.maximum(x.abs(), y.abs()) - 0.88 * r
    triangle = torch.maximum(y - 0.85 * r, 0.872 * x.abs() - 0.489 * (y + 1.05 * r))
    distance = torch.where(kind == 0, circle, torch.where(kind == 1, square, triangle))
    return (0.5 - distance).clamp(0, 1)


def _render(plan: _Plan, rng: np.random.Generator, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Video in [-1, 1] and masks, as `Scenes` holds them."""
    n = len(plan.count)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(device)

    angle, level = tensor(rng.uniform(0, 2 * np.pi, n)), rng.random(n)
    base = tensor(np.where(plan.background == 0, 0.04 + 0.12 * level, 0.80 + 0.12 * level))
    column = torch.arange(WIDTH, device=device) / WIDTH - 0.5
    row = torch.arange(HEIGHT, device=device)[:, None] / HEIGHT - 0.5
    slope = column * angle.cos()[:, None, None] + row * angle.sin()[:, None, None]
    ground = (base[:, None, None] + 0.06 * slope)[:, None, None].expand(n, FRAMES, 3, HEIGHT, WIDTH)
    present = tensor(np.arange(2) < plan.count[:, None])
    masks = coverage(tensor(plan.shape), tensor(plan.center), tensor(plan.radius)) * present[..., None, None, None]
    paint = tensor(np.array(list(COLORS.values()))[plan.color])
    colored = (masks[:, :, :, None] * paint[:, :, None, :, None, None]).sum(1)
    video = ground * (1 - masks.sum(1))[:, :, None] + colored
    return video * 2 - 1, masks


def sample_scenes(
    n: int,
    rng: np.random.Generator,
    *,
    objects: int | None = None,
    held_out: bool = False,
    device: torch.device | str = "cpu",
) -> Scenes:
    """Draw scenes.

    Args:
        n: number of scenes, at least 1.
        rng: source of everything random.
        objects: 1 or 2 objects in every scene; None mixes both (60% have two).
        held_out: give slot 0 one of the `HELD_OUT` colour-shape pairs; otherwise no object has one.
        device: where to draw.

    Returns:
        `Scenes` of `n` clips of `FRAMES` x `HEIGHT` x `WIDTH`.

    Raises:
        ConceptMapsValueError: `n` or `objects` out of range.
    """
    if n < 1:
        raise ConceptMapsValueError(f"n is {n}; expected at least one scene")
    if objects not in (None, 1, 2):
        raise ConceptMapsValueError(f"objects is {objects!r}; expected 1, 2 or None for a mix")
    plan = _plan(rng, n, objects, held_out)
    video, masks = _render(plan, rng, device)
    moves = (np.arange(FRAMES) >= plan.start[..., None]) & (plan.motion != STILL)[..., None]
    moves &= (np.arange(2) < plan.count[:, None])[..., None]
    return Scenes(
        video=video,
        masks=masks,
        moves=torch.from_numpy(moves).to(device),
        color=plan.color,
        shape=plan.shape,
        motion=plan.motion,
        start=plan.start,
        count=plan.count,
        background=plan.background,
        center=plan.center,
        radius=plan.radius,
    )
