"""Does the model draw what a prompt says? Verdicts of the judge on clips of frozen prompts and noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from diffusers import CogVideoXPipeline

from diffusers_concept_maps.shapes.captions import full_captions
from diffusers_concept_maps.shapes.judge import Verdict, both_colors, judge
from diffusers_concept_maps.shapes.model import GUIDANCE_SCALE
from diffusers_concept_maps.shapes.scenes import Scenes, sample_scenes
from diffusers_concept_maps.shapes.suite import frozen
from diffusers_concept_maps.shapes.suite.frozen import DEVELOPMENT_SEED, EVALUATION_SEED, WORDS_OF
from diffusers_concept_maps.shapes.suite.probe import generate
from diffusers_concept_maps.shapes.suite.result import Result

_BATCH = 12


def judge_results() -> Iterator[Result]:
    """The judge on real clips, for every word."""
    scenes = sample_scenes(frozen.JUDGE_CLIPS, np.random.default_rng(EVALUATION_SEED), objects=1)
    words = {name: [known[i] for i in getattr(scenes, name)[:, 0]] for name, known in WORDS_OF.items()}
    verdict = judge((scenes.video + 1) / 2, *words.values())
    for name, rate in verdict.rates().items():
        if name not in WORDS_OF:
            yield Result.at_least(f"judge on real clips: {name}", rate, frozen.JUDGE_GATE)
            continue
        passed, present = getattr(verdict, name).numpy(), np.array(words[name])
        by_word = {word: float(passed[present == word].mean()) for word in WORDS_OF[name]}
        worst = min(by_word, key=by_word.__getitem__)
        yield Result.at_least(f"judge on real clips: {name}", by_word[worst], frozen.JUDGE_GATE, f"least: {worst}")


def score_generation(
    pipe: CogVideoXPipeline,
    prompts: Sequence[frozen.Prompt],
    *,
    seed: int = EVALUATION_SEED,
    guidance_scale: float = GUIDANCE_SCALE,
) -> dict[str, float]:
    """Share of single-object prompts that the pipeline follows.

    Args:
        pipe: the embedded model or one like it.
        prompts: such as `frozen.generation_prompts()`.
        seed: of the noise.
        guidance_scale: of the pipeline's call.

    Returns:
        Rates by the names of `Verdict`: "present", "coherent", "color", "shape", "motion".
    """
    return judge_generated(pipe, prompts, seed=seed, guidance_scale=guidance_scale).rates()


def judge_generated(
    pipe: CogVideoXPipeline, prompts: Sequence[frozen.Prompt], *, seed: int, guidance_scale: float
) -> Verdict:
    """The judge on one clip per prompt; arguments as for `score_generation`."""
    clips = _generate(pipe, [prompt.text for prompt in prompts], seed, guidance_scale)
    return judge(clips, [p.color for p in prompts], [p.shape for p in prompts], [p.motion for p in prompts])


def score_pairs(pipe: CogVideoXPipeline) -> float:
    """Share of two-object prompts whose clips show both colors."""
    scenes = frozen.contrast_scenes(frozen.PAIR_PROMPTS, EVALUATION_SEED, "color")
    first, second = color_words(scenes)
    clips = _generate(pipe, full_captions(scenes), EVALUATION_SEED, GUIDANCE_SCALE)
    return float(both_colors(clips, first, second).float().mean())


def color_words(scenes: Scenes) -> list[list[str]]:
    """The color of every clip's first object, and that of every second one."""
    return [[WORDS_OF["color"][i] for i in colors] for colors in scenes.color.T]


def _generate(pipe: CogVideoXPipeline, texts: Sequence[str], seed: int, guidance_scale: float) -> torch.Tensor:
    starts = range(0, len(texts), _BATCH)
    return torch.cat([generate(pipe, texts[i : i + _BATCH], seed + i, guidance_scale) for i in starts])


def compare_guidance(pipe: CogVideoXPipeline) -> Iterator[tuple[str, dict[str, float]]]:
    """Rates of every scale of classifier-free guidance that is compared, on the prompts with development noise."""
    for scale in frozen.GUIDANCE_SCALES:
        yield (
            f"guidance {scale}",
            score_generation(pipe, frozen.generation_prompts(), seed=DEVELOPMENT_SEED, guidance_scale=scale),
        )
