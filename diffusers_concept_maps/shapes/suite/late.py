"""Do the maps say when? Hits of the maps of motion words on objects that start late."""

from __future__ import annotations

from collections.abc import Iterator

from diffusers import CogVideoXPipeline

from diffusers_concept_maps.shapes.suite import frozen
from diffusers_concept_maps.shapes.suite.contrast import FAMILIES, Hits, choose, score
from diffusers_concept_maps.shapes.suite.frozen import DEVELOPMENT_SEED, EVALUATION_SEED, NOISE_LEVELS
from diffusers_concept_maps.shapes.suite.probe import WORDS, Place, object_weights, read_real, word_embeds
from diffusers_concept_maps.shapes.suite.result import Result
from diffusers_concept_maps.shapes.suite.scores import late_hits


def late_results(pipe: CogVideoXPipeline, claimed: bool) -> Iterator[Result]:
    """Whether the map of a motion word rises on its object as that starts to move, against the other object's word.

    Args:
        pipe: the embedded model or one like it.
        claimed: whether the model follows motion words, so that their maps have gates.
    """
    development, scored = (_late_hits(pipe, seed) for seed in (DEVELOPMENT_SEED, EVALUATION_SEED))
    name = "late starts: the map rises with the motion"
    yield score(name, choose(development, words="alone"), scored, frozen.LATE_GATE, claimed)
    for family in FAMILIES:
        for words in WORDS:
            choice = choose(development, family, words=words)
            yield score(f"  late starts, {words}: {family}", choice, scored)


def _late_hits(pipe: CogVideoXPipeline, seed: int) -> Hits:
    scenes, found = frozen.late_scenes(frozen.LATE_CLIPS, seed), Hits()
    weights = object_weights(scenes.masks)
    for words in WORDS:
        embeds = word_embeds(pipe, scenes, "motion", words)
        for level in NOISE_LEVELS:
            readings = read_real(pipe, scenes, embeds, level, seed)
            found[Place("real", level, words)] = {
                read: late_hits(maps, weights, scenes.start[:, 0]) for read, maps in readings.items()
            }
    return found
