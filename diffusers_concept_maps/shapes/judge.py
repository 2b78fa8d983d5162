"""Does a clip show what its prompt says? Plain pixel tests for clips of one object on a grey background.

Pixels are segmented by the palette of the scenes; every test then looks at the segmented object's area, centroid,
spread and outline. The tests know nothing of the model, and score at least 98% on real clips.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.shapes.scenes import COLORS, HEIGHT, MOTIONS, SHAPES, WIDTH, coverage

# A pixel has a palette color that it is close to, unless it is close to grey. Below 0.33 no mix of yellow with a dark
# ground, as at an edge, counts as red or green.
_COLOR_DISTANCE, _CHROMA = 0.33, 0.3
_AREA = (6, 260)  # pixels; real objects have 10 (a small triangle) to 180 (a grown circle)
_MISSED_FRAMES = 1
_SPREAD = 1.5  # variance over that of a disc of equal area: a disc has 1.00, a square 1.05, a triangle 1.21
_STRAY = 6  # pixels of other colors in a frame
_DISPLACEMENT, _AREA_RATIO = 3.5, 2.0  # real objects travel 6 pixels or more, and grow or shrink 6-fold
_STEP_BACK, _LEAST_STEP = 1.5, 0.8  # pixels that a path may step back, area ratio of the least step of growth
_DIRECTION = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
# Area and centroid of each shape of unit radius, to put a template where the segmented object is.
_UNIT_AREA = torch.tensor([np.pi, 1.76**2, 0.489 / 0.872 * 1.9**2])
_UNIT_DROP = torch.tensor([0.0, 0.0, -1.05 + 1.9 * 2 / 3])


@dataclass(frozen=True)
class Verdict:
    """What a batch of clips shows of what was asked for; every attribute is a bool tensor `[n]`.

    Attributes:
        present: pixels of the color, neither too few nor too many, in all frames but one.
        coherent: they form one blob in the median frame.
        color: present, and no other palette color in more than a few pixels.
        shape: the outline fits the shape better than it fits the other two.
        motion: the object moves, grows, shrinks or stands still as asked.
    """

    present: torch.Tensor
    coherent: torch.Tensor
    color: torch.Tensor
    shape: torch.Tensor
    motion: torch.Tensor

    def rates(self) -> dict[str, float]:
        """Share of clips that pass, by the name of the test."""
        return {field.name: float(getattr(self, field.name).float().mean()) for field in fields(self)}


def judge(clips: torch.Tensor, colors: Sequence[str], shapes: Sequence[str], motions: Sequence[str]) -> Verdict:
    """Compare clips of one object with the words of their prompts.

    Args:
        clips: `[n, frame, 3, height, width]` in [0, 1], as the pipeline returns for `output_type="pt"`.
        colors: the `n` expected colors, words of `COLORS`.
        shapes: the `n` expected shapes, words of `SHAPES`.
        motions: the `n` expected motions, of `MOTIONS`.

    Returns:
        A `Verdict` on every clip.

    Raises:
        ConceptMapsValueError: clips of another shape, an unknown word, or not one word per clip.
    """
    labels = segment(clips)
    mask = labels == _indices(colors, COLORS, clips)[:, None, None, None]
    stray = ((labels >= 0) & ~mask).sum((2, 3)) > _STRAY
    area, centroid, spread = _moments(mask)
    present = _present(area)
    coherent = present & (spread.nanmedian(1).values < _SPREAD)
    color = present & (stray.sum(1) <= _MISSED_FRAMES)
    best = _best_shape(mask, area, centroid)
    shape = coherent & (best == _indices(shapes, SHAPES, clips))
    seen = [_motion(*path) for path in zip(area.tolist(), centroid.tolist(), strict=True)]
    motion = coherent & (torch.tensor(seen, device=clips.device) == _indices(motions, MOTIONS, clips))
    return Verdict(present=present, coherent=coherent, color=color, shape=shape, motion=motion)


def both_colors(clips: torch.Tensor, first: Sequence[str], second: Sequence[str]) -> torch.Tensor:
    """Whether clips show objects of both colors, for prompts with two objects of different colors.

    Args:
        clips: `[n, frame, 3, height, width]` in [0, 1].
        first: the `n` expected colors of one object, words of `COLORS`.
        second: those of the other object.

    Returns:
        Bool tensor `[n]`.

    Raises:
        ConceptMapsValueError: clips of another shape, an unknown word, or not one word per clip.
    """
    labels = segment(clips)
    shown = torch.ones(len(clips), dtype=torch.bool, device=clips.device)
    for colors in (first, second):
        mask = labels == _indices(colors, COLORS, clips)[:, None, None, None]
        shown &= _present(mask.sum((2, 3)))
    return shown


def segment(clips: torch.Tensor) -> torch.Tensor:
    """The palette color of every pixel.

    Args:
        clips: `[n, frame, 3, height, width]` in [0, 1].

    Returns:
        Integer tensor `[n, frame, height, width]`: index into `COLORS`, or -1 where a pixel has none of them.

    Raises:
        ConceptMapsValueError: clips of another shape.
    """
    if clips.ndim != 5 or clips.shape[2:] != (3, HEIGHT, WIDTH):
        raise ConceptMapsValueError(
            f"clips have shape {tuple(clips.shape)}; expected [n, frame, 3, {HEIGHT}, {WIDTH}] with values in [0, 1]"
        )
    clips = clips.float()
    palette = torch.tensor(list(COLORS.values()), device=clips.device)
    distance, nearest = (clips[:, :, None] - palette[:, :, None, None]).abs().amax(3).min(2)
    chroma = clips.amax(2) - clips.amin(2)
    return torch.where((distance < _COLOR_DISTANCE) & (chroma > _CHROMA), nearest, -1)


def _indices(words: Sequence[str], known: Iterable[str], clips: torch.Tensor) -> torch.Tensor:
    """Positions `[n]` of words among the known ones, on the device of the clips.

    Raises:
        ConceptMapsValueError: an unknown word, or not one word per clip.
    """
    names = list(known)
    if len(words) != len(clips):
        raise ConceptMapsValueError(f"{len(words)} words for {len(clips)} clips; expected one for each: {list(words)}")
    for word in words:
        if word not in names:
            raise ConceptMapsValueError(f"unknown word {word!r}; expected one of {', '.join(names)}")
    return torch.tensor([names.index(word) for word in words], device=clips.device)


def _present(area: torch.Tensor) -> torch.Tensor:
    """Whether areas `[n, frame]` are those of an object in all frames but one."""
    outside = (area < _AREA[0]) | (area > _AREA[1])
    return outside.sum(1) <= _MISSED_FRAMES


def _moments(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Area `[n, frame]`, centroid `[n, frame, 2]` and spread `[n, frame]`; the last two are NaN in empty frames."""
    weight = mask.float()
    x, y = torch.arange(WIDTH, device=mask.device) + 0.5, torch.arange(HEIGHT, device=mask.device)[:, None] + 0.5
    area = weight.sum((2, 3))
    centroid = torch.stack([(weight * x).sum((2, 3)), (weight * y).sum((2, 3))], -1) / area[..., None]
    square_distance = (x - centroid[..., 0, None, None]).square() + (y - centroid[..., 1, None, None]).square()
    variance = torch.where(mask, square_distance, 0.0).sum((2, 3)) / area
    return area, centroid, variance / (area / (2 * np.pi))


def _best_shape(mask: torch.Tensor, area: torch.Tensor, centroid: torch.Tensor) -> torch.Tensor:
    """Index `[n]` of the shape whose template, of the mask's own area and centroid, overlaps most with the mask."""
    radius = (area[:, None] / _UNIT_AREA.to(area.device)[:, None]).sqrt()
    center = centroid[:, None].nan_to_num().repeat(1, len(SHAPES), 1, 1)
    center[..., 1] -= _UNIT_DROP.to(area.device)[:, None] * radius
    templates = coverage(torch.arange(len(SHAPES), device=area.device)[None], center, radius)
    both = torch.minimum(templates, mask[:, None].float()).sum((3, 4))
    either = torch.maximum(templates, mask[:, None].float()).sum((3, 4))
    return (both / either.clamp(min=1)).sum(2).argmax(1)


def _motion(area: list[float], centroid: list[list[float]]) -> int:
    """Index into `MOTIONS` of the path that one clip's object takes; -1 if it is none of them.

    All frames that show the object count: a path may neither turn back nor leave its line, and a size may not swing.
    """
    shown = [frame for frame, pixels in enumerate(area) if pixels]
    if len(shown) < 2:
        return -1
    path = np.array(centroid)[shown] - centroid[shown[0]]
    growth = np.log(np.array(area)[shown] / area[shown[0]])
    same_size = np.ptp(growth) < np.log(_AREA_RATIO)
    if np.abs(path).max() < _DISPLACEMENT:
        if same_size:
            return MOTIONS.index("standing still")
        steady = (np.diff(growth) * np.sign(growth[-1])).min() > np.log(_LEAST_STEP)
        changed = abs(growth[-1]) > np.log(_AREA_RATIO)
        return MOTIONS.index("growing" if growth[-1] > 0 else "shrinking") if steady and changed else -1
    for motion, direction in _DIRECTION.items():
        along, across = path @ np.array(direction), np.abs(path @ np.array(direction[::-1]))
        if same_size and along[-1] >= _DISPLACEMENT > across.max() and np.diff(along).min() > -_STEP_BACK:
            return MOTIONS.index(motion)
    return -1
