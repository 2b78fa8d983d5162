"""Do the maps say where? Hits on real and on generated clips, of every method, layer and set of heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import CogVideoXPipeline

from diffusers_concept_maps.shapes.judge import Verdict, both_colors, judge, segment
from diffusers_concept_maps.shapes.scenes import Scenes
from diffusers_concept_maps.shapes.suite import frozen
from diffusers_concept_maps.shapes.suite.controls import control_results
from diffusers_concept_maps.shapes.suite.frozen import DEVELOPMENT_SEED, EVALUATION_SEED, NOISE_LEVELS, WORDS_OF
from diffusers_concept_maps.shapes.suite.generation import color_words
from diffusers_concept_maps.shapes.suite.probe import (
    METHODS,
    WORDS,
    Choice,
    Place,
    Read,
    alone,
    in_prompt,
    object_weights,
    read_generated,
    read_real,
    word_embeds,
)
from diffusers_concept_maps.shapes.suite.result import Result
from diffusers_concept_maps.shapes.suite.scores import bootstrap_interval, contrast_hits, localization, objectness

FAMILIES = (*METHODS, "imap motion", "imap random", "imap lowest")
"""Methods, and the sets of heads that IMAP takes, might take and leaves."""


Hits = dict[Place, dict[Read, np.ndarray]]
"""Hits `[layer, clip]` of every way to read."""


@dataclass(frozen=True)
class Generated:
    """Generated clips of two objects.

    Attributes:
        readings: maps of the words of color, shape and motion, each of both objects, first alone and then in the
            prompt `[layer, clip, 14, token]`; the seventh and the last concept are "background".
        weights: share of every token in an object `[clip, 2, token]`.
        confirmed: by attribute, bool `[clip]`: both objects can be seen, and the judge says that both are as asked.
    """

    readings: Mapping[Read, torch.Tensor]
    weights: torch.Tensor
    confirmed: Mapping[str, torch.Tensor]

    def hits(self, word: str) -> Hits:
        """Hits of the pair of maps of one attribute on the confirmed clips; none where these are too few."""
        first, found, kept = 2 * list(WORDS_OF).index(word), Hits(), self.confirmed[word]
        if int(kept.sum()) < frozen.LEAST_GENERATED:
            return found
        for offset, words in zip((first, first + 2 * len(WORDS_OF) + 1), WORDS, strict=True):
            found[Place("generated", frozen.GENERATED_NOISE_LEVEL, words)] = {
                read: contrast_hits(maps[:, kept, offset : offset + 2], self.weights[kept])
                for read, maps in self.readings.items()
            }
        return found


def read_described(pipe: CogVideoXPipeline, n: int, seed: int) -> Generated:
    """Generate clips of `described_scenes` and read the maps of all their words.

    Args:
        pipe: the embedded model or one like it.
        n: number of clips.
        seed: of the scenes and of the noise.
    """
    scenes = frozen.described_scenes(n, seed)
    single = [alone(pipe, word, torch.from_numpy(getattr(scenes, word))) for word in WORDS_OF]
    prompt = [in_prompt(pipe, scenes, word) for word in WORDS_OF]
    concepts = [part for kind in (single, prompt) for part in (*(embeds[:, :2] for embeds in kind), kind[0][:, 2:])]
    readings, clips = read_generated(pipe, scenes, torch.cat(concepts, 1), seed)
    masks = segment(clips)[:, None] == torch.from_numpy(scenes.color)[:, :, None, None, None]
    weights = object_weights(masks)
    confirmed = {"color": both_colors(clips, *color_words(scenes)) & (weights.sum(2) > 0).all(1)}
    for word in ("shape", "motion"):
        verdicts = [getattr(_judge_slot(clips, scenes, slot), word) for slot in range(2)]
        confirmed[word] = confirmed["color"] & verdicts[0] & verdicts[1]
    return Generated(readings, weights, confirmed)


def _judge_slot(clips: torch.Tensor, scenes: Scenes, slot: int) -> Verdict:
    """What the judge says of one object; pixels of the other one's color do not count against it."""
    words = [[known[i] for i in getattr(scenes, word)[:, slot]] for word, known in WORDS_OF.items()]
    return judge(clips, *words)


def word_results(
    pipe: CogVideoXPipeline, word: str, generated: Mapping[int, Generated], claimed: bool
) -> Iterator[Result]:
    """Contrast, localization and controls of the words of one attribute.

    Args:
        pipe: the embedded model or one like it.
        word: "color", "shape" or "motion".
        generated: clips of both seeds.
        claimed: whether the model follows these words, so that their maps have gates.
    """
    scenes = frozen.contrast_scenes(frozen.EVALUATION_CLIPS, EVALUATION_SEED, word)
    scored = real_hits(pipe, scenes, word, EVALUATION_SEED) | generated[EVALUATION_SEED].hits(word)
    trial = frozen.contrast_scenes(frozen.DEVELOPMENT_CLIPS, DEVELOPMENT_SEED, word)
    development = real_hits(pipe, trial, word, DEVELOPMENT_SEED) | generated[DEVELOPMENT_SEED].hits(word)
    development = {place: reads for place, reads in development.items() if place in scored}
    # Words of a prompt carry those around them: the color may win for the shape. Claims are about words alone.
    best = choose(development, words="alone")
    yield score(f"contrast of {word} words", best, scored, frozen.CONTRAST_GATES[word], claimed)
    for source, words in dict.fromkeys((place.source, place.words) for place in scored):
        for family in FAMILIES:
            choice = _family_choice(development, family, source, words)
            yield score(f"  {word}, {source}, {words}: {family}", choice, scored)
    yield from _layer_results(word, development, scored)
    on_real = best._replace(place=Place("real", best.place.noise_level, best.place.words))
    if word == "motion":
        movers = frozen.mover_scenes(frozen.EVALUATION_CLIPS, EVALUATION_SEED)
        yield score("  motion, both objects move", on_real, real_hits(pipe, movers, word, EVALUATION_SEED))
    yield from _localization_results(pipe, scenes, word, on_real, claimed)
    yield from control_results(pipe, word, on_real)


def _family_choice(development: Hits, family: str, source: str, words: str) -> Choice:
    """The best of a family; random and lowest heads are those of the layer where motion heads do best."""
    method, _, heads = family.partition(" ")
    if method != "imap":
        return choose(development, family, source, words)
    return choose(development, "imap motion", source, words)._replace(read=Read(method, heads))


def real_hits(
    pipe: CogVideoXPipeline,
    scenes: Scenes,
    word: str,
    seed: int,
    hits: Callable[[torch.Tensor, torch.Tensor], np.ndarray] = contrast_hits,
) -> Hits:
    """Hits on real clips, of words of either kind and at every noise level.

    Args:
        pipe: the embedded model or one like it.
        scenes: the clips.
        word: "color", "shape" or "motion".
        seed: of the noise.
        hits: what is a hit, from maps `[layer, clip, concept, token]` and weights `[clip, 2, token]`.
    """
    weights, found = object_weights(scenes.masks), Hits()
    for words in WORDS:
        embeds = word_embeds(pipe, scenes, word, words)
        for level in NOISE_LEVELS:
            readings = read_real(pipe, scenes, embeds, level, seed)
            found[Place("real", level, words)] = {read: hits(maps, weights) for read, maps in readings.items()}
    return found


def choose(hits: Hits, family: str | None = None, source: str | None = None, words: str | None = None) -> Choice:
    """The way to read with the most hits, layer 0 left out.

    Args:
        hits: on clips of the development seed.
        family: only ways to read of this one of `FAMILIES`.
        source: only "real" or only "generated" clips.
        words: only of this one of `WORDS`.
    """
    accuracy = {
        Choice(place, read, layer): float(found[layer].mean())
        for place, reads in hits.items()
        for read, found in reads.items()
        for layer in range(1, len(found))
        if family in (None, _family(read)) and source in (None, place.source) and words in (None, place.words)
    }
    return max(accuracy, key=accuracy.__getitem__)


def _family(read: Read) -> str:
    return f"imap {read.heads}" if read.method == "imap" else read.method


def score(name: str, choice: Choice, scored: Hits, gate: float | None = None, claimed: bool = False) -> Result:
    """Share of hits of what was chosen, as a gate if there is one and if the model follows the words."""
    hits = scored[choice.place][choice.read][choice.layer]
    low, high = bootstrap_interval(hits)
    note = f"{choice}, 95% interval {low:.3f} to {high:.3f}"
    if gate is None:
        return Result(name, float(hits.mean()), note=note)
    return _claim(Result.at_least(name, float(hits.mean()), gate, note), claimed)


def _claim(result: Result, claimed: bool) -> Result:
    """The gate of a map, or a mere number where the model does not follow the words: nothing is claimed then."""
    return result if claimed else Result(result.name, result.value, note=f"no claim ({result.required}) {result.note}")


def _layer_results(word: str, development: Hits, scored: Hits) -> Iterator[Result]:
    """All heads, and the sets of heads of IMAP, layer by layer; the number is that of the development seed's layer."""
    for place, reads in scored.items():
        if place.noise_level != NOISE_LEVELS[0]:
            continue
        for read in (read for read in reads if not read.heads.isdecimal()):
            layers = reads[read].mean(1)
            best = 1 + int(development[place][read].mean(1)[1:].argmax())
            note = "by layer, 0 first: " + " ".join(f"{value:.3f}" for value in layers)
            name = f"  {word}, {place.source}, {place.words}: {read.method}, {read.heads} heads"
            yield Result(name, float(layers[best]), note=note)


def _localization_results(
    pipe: CogVideoXPipeline, scenes: Scenes, word: str, choice: Choice, claimed: bool
) -> Iterator[Result]:
    """Average precision against the oracle that knows all objects but no words, and both scores on held-out pairs."""
    unseen = frozen.contrast_scenes(frozen.DEVELOPMENT_CLIPS, EVALUATION_SEED, word, held_out=True)
    for label, clips in (("", scenes), (" of held-out pairs", unseen)):
        embeds = word_embeds(pipe, clips, word, choice.place.words)
        level, method = choice.place.noise_level, choice.read.source_method
        readings = read_real(pipe, clips, embeds, level, EVALUATION_SEED, [method])
        maps, weights = readings[choice.read][choice.layer], object_weights(clips.masks)
        precision, oracle = float(localization(maps, weights).mean()), float(objectness(weights).mean())
        name, required = f"average precision of {word} words{label}", f"> {oracle:.3f}"
        if label:
            yield Result(name, precision, note=f"objectness oracle {oracle:.3f}")
            yield Result(f"contrast of {word} words{label}", float(contrast_hits(maps, weights).mean()))
        else:
            yield _claim(Result(name, precision, precision > oracle, required, str(choice)), claimed)
