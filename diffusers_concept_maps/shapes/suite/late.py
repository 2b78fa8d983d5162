"""Do the maps say when? Hits of the maps of motion words on objects that start late."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from diffusers import CogVideoXPipeline

from diffusers_concept_maps.shapes.scenes import Scenes
from diffusers_concept_maps.shapes.suite import frozen
from diffusers_concept_maps.shapes.suite.contrast import FAMILIES, Hits, choose, real_hits, score
from diffusers_concept_maps.shapes.suite.frozen import DEVELOPMENT_SEED, EVALUATION_SEED
from diffusers_concept_maps.shapes.suite.probe import WORDS
from diffusers_concept_maps.shapes.suite.result import Result
from diffusers_concept_maps.shapes.suite.scores import late_hits


def late_results(pipe: CogVideoXPipeline, claimed: bool) -> Iterator[Result]:
    """Whether the map of a motion word rises on its object as that starts to move, against the other object's word.

    Args:
        pipe: the embedded model or one like it.
        claimed: whether the model follows motion words, so that their maps have gates.
    """
    development = _late_hits(pipe, frozen.late_scenes(frozen.LATE_CLIPS, DEVELOPMENT_SEED), DEVELOPMENT_SEED)
    scored = _late_hits(pipe, frozen.late_scenes(frozen.LATE_CLIPS, EVALUATION_SEED), EVALUATION_SEED)
    best = choose(development, words="alone")
    yield score("late starts: the map rises with the motion", best, scored, frozen.LATE_GATE, claimed)
    unseen = frozen.late_scenes(frozen.LATE_CLIPS, EVALUATION_SEED, held_out=True)
    yield score("late starts of held-out pairs", best, _late_hits(pipe, unseen, EVALUATION_SEED))
    for family in FAMILIES:
        for words in WORDS:
            choice = choose(development, family, words=words)
            yield score(f"  late starts, {words}: {family}", choice, scored)


def _late_hits(pipe: CogVideoXPipeline, scenes: Scenes, seed: int) -> Hits:
    return real_hits(pipe, scenes, "motion", seed, partial(late_hits, start=scenes.start[:, 0]))
