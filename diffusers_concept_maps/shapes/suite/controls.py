"""Controls that must stay at chance: untrained models, and words that no object of the clip has."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from diffusers import CogVideoXPipeline

from diffusers_concept_maps.shapes.model import build_pipeline, build_text_encoder, build_transformer
from diffusers_concept_maps.shapes.scenes import Scenes
from diffusers_concept_maps.shapes.suite import frozen
from diffusers_concept_maps.shapes.suite.frozen import EVALUATION_SEED
from diffusers_concept_maps.shapes.suite.probe import Choice, object_weights, read_real, word_embeds
from diffusers_concept_maps.shapes.suite.result import Result
from diffusers_concept_maps.shapes.suite.scores import bootstrap_interval, contrast_hits


def control_results(pipe: CogVideoXPipeline, word: str, choice: Choice) -> Iterator[Result]:
    """Contrast accuracy where there is nothing to find, with the layer and heads that were chosen.

    Args:
        pipe: the embedded model or one like it.
        word: "color", "shape" or "motion".
        choice: how maps of real clips are read.
    """
    untrained = [_untrained_hits(seed, word, choice) for seed in range(frozen.CONTROL_MODELS)]
    models = np.repeat(np.arange(frozen.CONTROL_MODELS), frozen.CONTROL_CLIPS)
    yield at_chance(f"control of {word} words: untrained models", np.concatenate(untrained), models)
    scenes, others = frozen.absent_scenes(frozen.ABSENT_CLIPS, EVALUATION_SEED, word)
    hits = _hits(pipe, scenes, word_embeds(pipe, others, word, choice.place.words), choice, EVALUATION_SEED)
    pairs = scenes.color @ (len(frozen.WORDS_OF["color"]), 1)
    yield at_chance(f"control of {word} words: absent words", hits, pairs)


def _untrained_hits(seed: int, word: str, choice: Choice) -> np.ndarray:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = build_pipeline(build_transformer(), build_text_encoder())
    scenes = frozen.contrast_scenes(frozen.CONTROL_CLIPS, EVALUATION_SEED + 1 + seed, word)
    return _hits(pipe, scenes, word_embeds(pipe, scenes, word, choice.place.words), choice, seed)


def _hits(pipe: CogVideoXPipeline, scenes: Scenes, embeds: torch.Tensor, choice: Choice, seed: int) -> np.ndarray:
    readings = read_real(pipe, scenes, embeds, choice.place.noise_level, seed, [choice.read.source_method])
    return contrast_hits(readings[choice.read][choice.layer], object_weights(scenes.masks))


def at_chance(name: str, hits: np.ndarray, clusters: np.ndarray) -> Result:
    """A control, green where the 99% interval of its hits, drawn by clusters, is narrow and holds 0.5.

    Args:
        name: of the control.
        hits: bool `[n]`.
        clusters: `[n]`, which hits belong together.
    """
    low, high = bootstrap_interval(hits, clusters=clusters, level=0.99)
    inside = 0.5 - frozen.CONTROL_WIDTH < low <= 0.5 <= high < 0.5 + frozen.CONTROL_WIDTH
    note = f"99% interval {low:.3f} to {high:.3f}, {len(np.unique(clusters))} clusters"
    return Result(name, float(hits.mean()), inside, "at 0.50", note)
