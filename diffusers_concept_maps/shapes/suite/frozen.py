"""What the embedded model is judged by, fixed before it was trained: prompts, clips, seeds and gates.

Everything that is chosen (a head, a layer, a noise level, a guidance scale) is chosen on clips and noise of
`DEVELOPMENT_SEED`; everything that is reported is scored on those of `EVALUATION_SEED`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    MOTIONS,
    SHAPES,
    STILL,
    Scenes,
    sample_scenes,
)

DEVELOPMENT_SEED, EVALUATION_SEED, NOISE_SEED = 20_001, 20_002, 20_003
DEVELOPMENT_CLIPS, EVALUATION_CLIPS = 128, 256
GENERATED_DEVELOPMENT_CLIPS, GENERATED_EVALUATION_CLIPS = 96, 192
LEAST_GENERATED = 48
"""Generated clips that must show what their prompt says of an attribute, or its maps are not read on them."""

JUDGE_CLIPS, PROMPTS, PAIR_PROMPTS = 700, 120, 60
CONTROL_MODELS, CONTROL_CLIPS, ABSENT_CLIPS = 40, 48, 1024

NOISE_LEVELS = (0.6, 0.7, 0.8)
"""Noise levels at which maps of real clips are read, as fractions of the scheduler's time steps."""

GENERATED_NOISE_LEVEL = 0.6
"""Maps of generated clips are means over the sampling steps at this noise level and above."""

GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
"""Guidance scales that are compared on prompts with noise of the development seed."""

GUIDED_LAYERS, GUIDED_SCALES = ((1,), (2,), (3,), (1, 2, 3)), (1.0, 0.5, 2.0)
"""Layers at which cross-attention guidance may cut, and its scales, that are compared in the same way."""

GUIDED_REPEATS = 2
"""Clips of every prompt that are judged with guidance and without, each with other noise."""
TRACKING_DEVELOPMENT_CLIPS, TRACKING_EVALUATION_CLIPS = 48, 128
TRACKING_NOISE_LEVELS = (0.02, 0.1, 0.2, 0.4, 0.6)
"""Noise levels at which points are matched, with and without the noise; the layers are all of them."""

TRACKING_VISIBILITY = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""How far off, in tokens, the match of a match may be for a point to be visible; of the values that are compared."""

WORDS_OF = {"color": tuple(COLORS), "shape": SHAPES, "motion": MOTIONS}
"""The words of every attribute, in the order in which `Scenes` counts them."""

BACKGROUND = "background"
"""The concept beside the words of both objects; average precision is that of a word against the two others."""

JUDGE_GATE = 0.98
GENERATION_GATES = {"present": 0.95, "coherent": 0.95, "color": 0.95, "shape": 0.80, "motion": 0.80}
PAIR_GATE = 0.80
CONTRAST_GATES = {"color": 0.95, "shape": 0.85, "motion": 0.75}
LATE_GATE, LATE_CLIPS = 0.75, 128
CONTROL_WIDTH = 0.08
"""A control is green when its 99% interval contains 0.5 and reaches no further than this to either side."""


@dataclass(frozen=True)
class Prompt:
    """A prompt for one object, and the words that the judge compares the clip with."""

    text: str
    color: str
    shape: str
    motion: str


def generation_prompts() -> tuple[Prompt, ...]:
    """The 120 single-object prompts, balanced over colors, shapes, motions and backgrounds.

    Where a `HELD_OUT` pair would stand, the two of them trade their shapes: none is asked for, the balance stays. A
    few texts come twice, with other noise each time.
    """
    (first_color, first_shape), (second_color, second_shape) = HELD_OUT
    traded = {HELD_OUT[0]: (first_color, second_shape), HELD_OUT[1]: (second_color, first_shape)}
    pairs = [traded.get(pair, pair) for pair in product(COLORS, SHAPES)]
    prompts = []
    for i in range(PROMPTS):
        color, shape = pairs[i % len(pairs)]
        motion, background = MOTIONS[i % len(MOTIONS)], BACKGROUNDS[i // len(pairs) % len(BACKGROUNDS)]
        prompts.append(Prompt(f"a {color} {shape} {motion} on {background} background", color, shape, motion))
    return tuple(prompts)


def _differ(scenes: Scenes, word: str) -> np.ndarray:
    first, second = getattr(scenes, word).T
    differ: np.ndarray = first != second
    return differ & ((scenes.motion == STILL).any(1) if word == "motion" else True)


def contrast_scenes(n: int, seed: int, word: str, *, held_out: bool = False) -> Scenes:
    """Two-object scenes whose objects differ in one attribute; of two motions one is standing still.

    Args:
        n: number of scenes.
        seed: such as `DEVELOPMENT_SEED`.
        word: "color", "shape" or "motion".
        held_out: one object has a color and shape that were never seen together in training.

    Raises:
        ConceptMapsValueError: an unknown attribute.
    """
    check_word(word)
    return _draw(n, seed, lambda scenes: _differ(scenes, word), held_out=held_out)


def described_scenes(n: int, seed: int) -> Scenes:
    """Two-object scenes that differ in all three attributes, so that a judge can tell the objects by their color."""
    return _draw(n, seed, lambda scenes: np.logical_and.reduce([_differ(scenes, word) for word in WORDS_OF]))


def mover_scenes(n: int, seed: int) -> Scenes:
    """Two-object scenes in which both objects move, each in its own way."""
    return _draw(n, seed, lambda scenes: (scenes.motion != STILL).all(1))


def late_scenes(n: int, seed: int, *, held_out: bool = False) -> Scenes:
    """Two-object scenes in which the object of slot 0, of a held-out pair if so asked, starts late, the other not."""
    return _draw(n, seed, lambda scenes: (scenes.start[:, 0] > 0) & (scenes.start[:, 1] == 0), held_out=held_out)


def _lacks(scenes: Scenes, word: str) -> np.ndarray:
    """Scenes that lack two words which `contrast_scenes` could ask for."""
    if word == "motion":
        lacks: np.ndarray = (scenes.motion != STILL).all(1)
    else:  # there are three shapes only
        lacks = (scenes.shape[:, 0] == scenes.shape[:, 1]) | (word != "shape")
    return lacks


def absent_scenes(n: int, seed: int, word: str) -> tuple[Scenes, Scenes]:
    """Two-object scenes, and as many others whose objects differ in words that the first ones do not have.

    Which of the two words comes first is a matter of chance.

    Args:
        n: number of scenes.
        seed: such as `EVALUATION_SEED`.
        word: "color", "shape" or "motion".

    Raises:
        ConceptMapsValueError: an unknown attribute.
    """
    check_word(word)
    scenes = _draw(n, seed, lambda drawn: _lacks(drawn, word))
    others = _draw(n, seed + NOISE_SEED, lambda drawn: _differ(drawn, word))
    rng, here, there = np.random.default_rng(seed), getattr(scenes, word), getattr(others, word)
    foreign = (here[:, None, :, None] != there[None, :, None, :]).all((2, 3))
    return scenes, others.take(np.array([rng.choice(np.flatnonzero(row)) for row in foreign]))


def _draw(n: int, seed: int, wanted: Callable[[Scenes], np.ndarray], *, held_out: bool = False) -> Scenes:
    """The first `n` wanted scenes of a seed."""
    rng, parts, found = np.random.default_rng(seed), list[Scenes](), 0
    while found < n:
        drawn = sample_scenes(n, rng, objects=2, held_out=held_out)
        parts.append(drawn.take(np.flatnonzero(wanted(drawn))))
        found += len(parts[-1])
    return Scenes.join(parts).take(np.arange(n))


def check_word(word: str) -> None:
    """Raise `ConceptMapsValueError` unless the word is an attribute."""
    if word not in WORDS_OF:
        raise ConceptMapsValueError(f"word is {word!r}; expected one of {', '.join(WORDS_OF)}")
