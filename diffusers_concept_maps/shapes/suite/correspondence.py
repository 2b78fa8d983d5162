"""Does the embedded model know where points go? Matches of every layer on scenes whose objects are known.

Real clips have exact tracks. A generated clip has none of its own: its points are taken from the pixels that the judge
gives to the object, and only clips that show what was asked for, of an object that keeps its size, are used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import CogVideoXPipeline

from diffusers_concept_maps.correspondence.tracing import Correspondence, encode_correspondence, trace_correspondence
from diffusers_concept_maps.evaluation.correspondence import Summary, TrackedClip, summarize
from diffusers_concept_maps.evaluation.correspondence_runs import LEVELS
from diffusers_concept_maps.shapes.captions import TEXT_LENGTH, full_captions
from diffusers_concept_maps.shapes.judge import judge, segment
from diffusers_concept_maps.shapes.scenes import COLORS, FRAMES, HEIGHT, WIDTH, sample_scenes
from diffusers_concept_maps.shapes.suite.frozen import Prompt, generation_prompts
from diffusers_concept_maps.shapes.suite.probe import generate

__all__ = ["object_tracks", "score_generated", "score_real"]

_SPACING = 2.0  # pixels between the points of an object
_RIGID = ("moving left", "moving right", "moving up", "moving down", "standing still")


def object_tracks(mask: torch.Tensor) -> torch.Tensor:
    """Points of an object that moves, grows or shrinks, but does not turn.

    Args:
        mask: coverage `[frame, height, width]` in 0..1, of which no frame is empty.

    Returns:
        Float32 `[point, frame, 2]`, (x, y) in pixel-center coordinates: a lattice around the centroid, of the places
        that the object covers in the first frame. Points go with the centroid, and grow with the root of the area.
    """
    weight = mask.double()
    area = weight.sum((1, 2))
    x = (weight.sum(1) * torch.arange(mask.shape[2])).sum(1) / area
    y = (weight.sum(2) * torch.arange(mask.shape[1])).sum(1) / area
    center = torch.stack([x, y], dim=1)  # [frame, 2]
    reach = torch.arange(-4, 5) * _SPACING
    offsets = torch.cartesian_prod(reach, reach).double()
    columns, rows = (center[0] + offsets).round().long().unbind(1)
    within = (columns >= 0) & (columns < mask.shape[2]) & (rows >= 0) & (rows < mask.shape[1])
    inside = offsets[within][mask[0, rows[within], columns[within]] > 0.5]
    growth = (area / area[0]).sqrt()
    return (center + inside[:, None] * growth[:, None]).float()


def score_real(
    pipe: CogVideoXPipeline, count: int, seed: int, *, levels: Sequence[float] = LEVELS, threshold: float | None = None
) -> Summary:
    """Scenes that are noised, with exact tracks.

    Args:
        pipe: the embedded model or one like it.
        count: number of scenes.
        seed: of scenes and noise, such as `frozen.EVALUATION_SEED`.
        levels: of noise, fractions of the training schedule.
        threshold: as for `summarize`.
    """
    scenes = sample_scenes(count, np.random.default_rng(seed))
    captions = full_captions(scenes)
    clips = [
        _clip(f"scene {i}", [object_tracks(scenes.masks[i, slot]) for slot in range(scenes.count[i])])
        for i in range(count)
    ]

    def match(number: int) -> Correspondence:
        return encode_correspondence(
            pipe,
            (scenes.video[number] + 1) / 2,
            clips[number].points,
            noise_level=levels,
            visibility=clips[number].visibility,
            prompt=captions[number],
            seed=seed + number,
            call={"max_sequence_length": TEXT_LENGTH},
        )

    return summarize(clips, match, columns=levels, axis="noise level", threshold=threshold)


def score_generated(pipe: CogVideoXPipeline, count: int, seed: int, *, threshold: float | None = None) -> Summary:
    """Clips that the model generates, of single objects, as far as they show what was asked for.

    Args:
        pipe: the embedded model or one like it.
        count: number of prompts; fewer clips are scored.
        seed: of the noise, such as `frozen.EVALUATION_SEED`.
        threshold: as for `summarize`.
    """
    prompts = [prompt for prompt in generation_prompts() if prompt.motion in _RIGID][:count]
    confirmed, clips = [], []
    for number, prompt in enumerate(prompts):
        mask = _confirmed_mask(generate(pipe, [prompt.text], seed + number), prompt)
        if mask is not None:
            confirmed.append(number)
            clips.append(_clip(f"prompt {number}", [object_tracks(mask)]))

    def match(index: int) -> Correspondence:
        clip, number = clips[index], confirmed[index]
        with trace_correspondence(
            pipe, clip.points, size=clip.size, num_frames=FRAMES, visibility=clip.visibility
        ) as found:
            generate(pipe, [prompts[number].text], seed + number)
        return found

    return summarize(clips, match, threshold=threshold)


def _confirmed_mask(clip: torch.Tensor, prompt: Prompt) -> torch.Tensor | None:
    """Pixels `[frame, height, width]` of the object in `[1, frame, 3, height, width]`; None if it is another one."""
    verdict = judge(clip, [prompt.color], [prompt.shape], [prompt.motion])
    mask = segment(clip)[0] == list(COLORS).index(prompt.color)
    shown = all(verdict.rates().values()) and bool(mask.any(2).any(1).all())
    return mask.float() if shown else None


def _clip(name: str, objects: Sequence[torch.Tensor]) -> TrackedClip:
    tracks = torch.cat(list(objects))
    return TrackedClip.of(name, tracks, torch.ones(tracks.shape[:2], dtype=torch.bool), (HEIGHT, WIDTH))
