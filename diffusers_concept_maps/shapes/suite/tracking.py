"""Points followed through scenes by the embedded model, beside no motion and the nearest color.

`concept-maps evaluate --suite tracking` prints it. Half of the points are on objects, whose places and sizes are known
in every frame, the other half on the ground, which objects hide from time to time; half are asked for in the first
frame, half in another. Layer, noise level and what counts as visible are chosen on scenes of the development seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from diffusers import CogVideoXPipeline

from diffusers_concept_maps.correspondence.tracking import track
from diffusers_concept_maps.evaluation.tracking import TrackScores, mean_scores, score_tracks
from diffusers_concept_maps.shapes.model import LAYERS
from diffusers_concept_maps.shapes.scenes import FRAMES, HEIGHT, STILL, WIDTH, Scenes, sample_scenes
from diffusers_concept_maps.shapes.suite import frozen
from diffusers_concept_maps.shapes.suite.result import Result

KINDS = ("moving", "still", "ground")
"""What a point is on: an object that moves or changes its size, one that stands still, or the ground."""

_PER_OBJECT, _ON_GROUND = 2, 4  # points for each of the two query frames
_INSIDE = 0.99  # share of a pixel that an object covers

Tracks = tuple[torch.Tensor, torch.Tensor]
"""Places `[point, frame, 2]` in pixels, (x, y), and visibility `[point, frame]`."""
Tracker = Callable[["TrackedClip"], Tracks]


@dataclass(frozen=True)
class TrackedClip:
    """A scene, points in it and where they go.

    Attributes:
        frames: uint8 `[frame, 3, height, width]`.
        points: float32 `[point, 3]`: frame, x and y in pixel-center coordinates.
        tracks: float32 `[point, frame, 2]`.
        visibility: bool `[point, frame]`; objects never touch, so that the ground alone is ever hidden.
        kinds: of every point, one of `KINDS`.
    """

    frames: torch.Tensor
    points: torch.Tensor
    tracks: torch.Tensor
    visibility: torch.Tensor
    kinds: tuple[str, ...]


class Choice(NamedTuple):
    """How the model follows points.

    Attributes:
        layer: 0-based.
        noise_level: that the model is told.
        add_noise: whether the latents have that much noise.
        visibility_tokens: as for `track`.
    """

    layer: int
    noise_level: float
    add_noise: bool
    visibility_tokens: float = 1.0

    def __str__(self) -> str:
        noise = "with noise" if self.add_noise else "without noise"
        return f"layer {self.layer}, noise level {self.noise_level} {noise}, visible within {self.visibility_tokens}"


def tracked_clips(n: int, seed: int) -> list[TrackedClip]:
    """Scenes of two objects with points in them.

    Args:
        n: number of scenes.
        seed: such as `frozen.DEVELOPMENT_SEED`.
    """
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(n, rng, objects=2)
    return [_with_points(scenes, index, rng) for index in range(n)]


def _with_points(scenes: Scenes, index: int, rng: np.random.Generator) -> TrackedClip:
    masks = scenes.masks[index].numpy()  # [2, frame, height, width]
    points, tracks, visible, kinds = [], [], [], list[str]()
    for frame in (0, int(rng.integers(1, FRAMES))):
        for slot in range(2):
            scale = scenes.radius[index, slot] / scenes.radius[index, slot, frame]
            for place in _draw(rng, masks[slot, frame] > _INSIDE, _PER_OBJECT):
                center = scenes.center[index, slot] - 0.5
                points.append([frame, *place])
                tracks.append(center + (place - center[frame]) * scale[:, None])
                visible.append(np.ones(FRAMES, bool))
                kinds.append(KINDS[int(scenes.motion[index, slot] == STILL)])
        for place in _draw(rng, masks[:, frame].sum(0) == 0, _ON_GROUND):
            points.append([frame, *place])
            tracks.append(np.tile(place, (FRAMES, 1)))
            visible.append(masks[:, :, place[1], place[0]].sum(0) < 0.5)
            kinds.append("ground")
    frames = ((scenes.video[index] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return TrackedClip(
        frames=frames,
        points=torch.tensor(points, dtype=torch.float32),
        tracks=torch.from_numpy(np.stack(tracks).astype(np.float32)),
        visibility=torch.from_numpy(np.stack(visible)),
        kinds=tuple(kinds),
    )


def _draw(rng: np.random.Generator, allowed: np.ndarray, count: int) -> np.ndarray:
    """Places `[count, 2]`, (x, y), of pixels that are allowed."""
    places = np.argwhere(allowed)[:, ::-1]
    return places[rng.choice(len(places), count, replace=False)]


def no_motion(clip: TrackedClip) -> Tracks:
    """Every point stays where it was asked for, in sight."""
    return clip.points[:, None, 1:].expand(-1, FRAMES, -1), torch.ones(len(clip.points), FRAMES, dtype=torch.bool)


def nearest_color(clip: TrackedClip) -> Tracks:
    """In every frame the pixel whose color is nearest to that of the point, in sight; of equal ones the nearest."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    cells = torch.stack([columns, rows], dim=-1).view(-1, 2)  # (x, y)
    pixels = clip.frames.long().flatten(2).mT  # [frame, pixel, 3]
    frame, x, y = clip.points.long().unbind(1)
    own = pixels[frame, y * WIDTH + x]  # [point, 3]
    color = (pixels - own[:, None, None]).square().sum(-1)  # [point, frame, pixel]
    away = (cells - clip.points[:, None, 1:].long()).square().sum(-1)
    order = color * (HEIGHT**2 + WIDTH**2) + away[:, None]
    return cells[order.argmin(-1)].float(), torch.ones(len(own), FRAMES, dtype=torch.bool)


def by_model(pipe: CogVideoXPipeline, choice: Choice, **options: str) -> Tracker:
    """The embedded model, or one like it, with further options of `track`."""

    def follow(clip: TrackedClip) -> Tracks:
        out = track(
            pipe,
            clip.frames,
            clip.points,
            layers=choice.layer,
            noise_level=choice.noise_level,
            add_noise=choice.add_noise,
            visibility_tokens=choice.visibility_tokens,
            **options,  # type: ignore[arg-type]
        )
        return out.tracks, out.visibility

    return follow


class Score(NamedTuple):
    """The mean score of the clips, and the median error of all places in sight, in pixels."""

    scores: TrackScores
    median: float


def score_tracker(tracker: Tracker, clips: Sequence[TrackedClip]) -> dict[str, Score]:
    """Scores by kind of point, and of "all"; clips without points of a kind do not count for it.

    A kind that no clip has is left out.

    Args:
        tracker: what to score.
        clips: with true tracks.
    """
    found = [tracker(clip) for clip in clips]
    scores = {}
    for kind in ("all", *KINDS):
        parts, errors = [], []
        for clip, (tracks, visibility) in zip(clips, found, strict=True):
            own = torch.tensor([kind in ("all", name) for name in clip.kinds])
            counted = clip.visibility[own] & (torch.arange(FRAMES) != clip.points[own, :1])
            if not counted.any():
                continue
            true, frames = (clip.tracks[own], clip.visibility[own]), clip.points[own, 0].long()
            parts.append(score_tracks(tracks[own], visibility[own], *true, frames, "strided", size=(HEIGHT, WIDTH)))
            errors.append((tracks[own] - true[0]).norm(dim=-1)[counted])
        if parts:
            scores[kind] = Score(mean_scores(parts), float(torch.cat(errors).median()))
    return scores


def choose(pipe: CogVideoXPipeline, clips: Sequence[TrackedClip]) -> Choice:
    """Layer and noise by the mean share of places within the thresholds, then what counts as visible by the Jaccard.

    Args:
        pipe: the embedded model or one like it.
        clips: of the development seed.
    """
    noises = [(level, noised) for level, noised in product(frozen.TRACKING_NOISE_LEVELS, (False, True))]
    ways = [Choice(layer, *noise) for layer, noise in product(range(LAYERS), noises)]
    way = max(ways, key=lambda way: score_tracker(by_model(pipe, way), clips)["all"].scores.average_within)
    sights = [way._replace(visibility_tokens=tokens) for tokens in frozen.TRACKING_VISIBILITY]
    return max(sights, key=lambda way: score_tracker(by_model(pipe, way), clips)["all"].scores.average_jaccard)


def tracking_results(pipe: CogVideoXPipeline) -> Iterator[Result]:
    """What is measured on scenes of the evaluation seed, one result as soon as it is known.

    The gate is that points on moving objects are followed better than without motion or by the nearest color.

    Args:
        pipe: the embedded model or one like it.
    """
    choice = choose(pipe, tracked_clips(frozen.TRACKING_DEVELOPMENT_CLIPS, frozen.DEVELOPMENT_SEED))
    yield Result("layer", choice.layer, note=str(choice))
    clips = tracked_clips(frozen.TRACKING_EVALUATION_CLIPS, frozen.EVALUATION_SEED)
    best = 0.0
    for name, tracker in (("no motion", no_motion), ("nearest color", nearest_color)):
        scores = score_tracker(tracker, clips)
        best = max(best, scores["moving"].scores.average_within)
        yield from _lines(name, scores)
    yield from _lines("model", score_tracker(by_model(pipe, choice), clips), best)
    yield from _lines("model, tokens", score_tracker(by_model(pipe, choice, readout="displacement"), clips))
    yield from _lines("model, official", score_tracker(by_model(pipe, choice, parity="difftrack"), clips))


def _lines(name: str, scores: dict[str, Score], best: float | None = None) -> Iterator[Result]:
    """One line for each kind of point; that of moving ones is a gate where there is something to be better than."""
    for kind, (score, median) in scores.items():
        note = f"AJ {score.average_jaccard:.3f}, OA {score.occlusion_accuracy:.3f}, median {median:.2f} px"
        within, named = score.average_within, f"{name}: {kind} points within thresholds"
        if best is None or kind != "moving":
            yield Result(named, within, note=note)
        else:
            yield Result(named, within, within > best, f"> {best:.3f}", note)
