"""The gates of the embedded model: does it draw what a prompt says, and do its maps say where and when?

`concept-maps evaluate --suite shapes` prints every gate and what is measured beside it, and ends with status 1 when a
gate is red. Prompts, clips, seeds and gates are those of `frozen`; layer, head and noise level are chosen on clips of
the development seed.
"""

from __future__ import annotations

from collections.abc import Iterator

from diffusers import CogVideoXPipeline

from diffusers_concept_maps.shapes.suite import frozen
from diffusers_concept_maps.shapes.suite.contrast import read_described, word_results
from diffusers_concept_maps.shapes.suite.frozen import DEVELOPMENT_SEED, EVALUATION_SEED, WORDS_OF
from diffusers_concept_maps.shapes.suite.generation import (
    compare_guidance,
    judge_results,
    score_generation,
    score_pairs,
)
from diffusers_concept_maps.shapes.suite.late import late_results
from diffusers_concept_maps.shapes.suite.result import Result

__all__ = ["Result", "compare_guidance", "evaluate"]


def evaluate(pipe: CogVideoXPipeline) -> Iterator[Result]:
    """Everything that is measured, one result as soon as it is known.

    Args:
        pipe: the embedded model or one like it.
    """
    yield from judge_results()
    rates = score_generation(pipe, frozen.generation_prompts())
    for name, rate in rates.items():
        yield Result.at_least(f"generation: {name}", rate, frozen.GENERATION_GATES[name])
    yield Result.at_least("generation: both colors of two objects", score_pairs(pipe), frozen.PAIR_GATE)
    claims = {word: rates[word] >= frozen.GENERATION_GATES[word] for word in WORDS_OF}
    generated = {
        DEVELOPMENT_SEED: read_described(pipe, frozen.GENERATED_DEVELOPMENT_CLIPS, DEVELOPMENT_SEED),
        EVALUATION_SEED: read_described(pipe, frozen.GENERATED_EVALUATION_CLIPS, EVALUATION_SEED),
    }
    for word, confirmed in generated[EVALUATION_SEED].confirmed.items():
        yield Result(f"generated clips of two objects: {word} as asked", float(confirmed.float().mean()))
    for word in WORDS_OF:
        yield from word_results(pipe, word, generated, claims[word])
    yield from late_results(pipe, claims["motion"])
