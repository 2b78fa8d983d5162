"""Captions of the moving-shapes scenes, and the vocabulary they are written in."""

from __future__ import annotations

import numpy as np

from diffusers_concept_maps.shapes.scenes import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scenes

WORDS = (
    *("a", "and", "on", "background", "object", "later"),
    *BACKGROUNDS,
    *("moving", "left", "right", "up", "down", "growing", "shrinking", "standing", "still"),
    *COLORS,
    *SHAPES,
)
"""Every word the embedded model knows."""

TEXT_LENGTH = 20
"""Text tokens of the embedded model: the longest caption has 17, its end mark included."""

_COLOR_NAMES = tuple(COLORS)


def describe(
    scenes: Scenes, index: int, slot: int, *, color: bool = True, shape: bool = True, motion: bool = True
) -> str:
    """One object in words, such as "a red circle later moving left"; what is left out becomes "object" or nothing."""
    words = ["a"]
    if color:
        words.append(_COLOR_NAMES[scenes.color[index, slot]])
    words.append(SHAPES[scenes.shape[index, slot]] if shape else "object")
    if motion:
        if scenes.start[index, slot] > 0:
            words.append("later")
        words.append(MOTIONS[scenes.motion[index, slot]])
    return " ".join(words)


def full_captions(scenes: Scenes) -> list[str]:
    """The complete caption of every scene: all objects in slot order, then the background."""
    captions = []
    for i in range(len(scenes)):
        objects = " and ".join(describe(scenes, i, slot) for slot in range(scenes.count[i]))
        captions.append(f"{objects} on {BACKGROUNDS[scenes.background[i]]} background")
    return captions


def training_captions(scenes: Scenes, rng: np.random.Generator) -> list[str]:
    """Captions as the model is trained on them.

    8% are empty (for classifier-free guidance), 6% are a single word or motion (so that a concept alone is in
    distribution), 2% name one object only, 15% leave any attributes out and 25% the colors, so that what is left is
    the only handle on an object; the rest are complete. Objects come in random order.
    """
    return [_training_caption(scenes, i, rng) for i in range(len(scenes))]


def _training_caption(scenes: Scenes, i: int, rng: np.random.Generator) -> str:
    kind = rng.random()
    slots = rng.permutation(int(scenes.count[i]))
    if kind < 0.08:
        return ""
    if kind < 0.14:
        return _single_word(scenes, i, int(slots[0]), rng)
    if kind < 0.16:
        slots = slots[:1]
    parts = [_described(scenes, i, int(slot), kind, rng) for slot in slots]
    text = " and ".join(parts)
    return f"{text} on {BACKGROUNDS[scenes.background[i]]} background" if rng.random() < 0.7 else text


def _single_word(scenes: Scenes, i: int, slot: int, rng: np.random.Generator) -> str:
    motion = MOTIONS[scenes.motion[i, slot]]
    choices = (
        _COLOR_NAMES[scenes.color[i, slot]],
        SHAPES[scenes.shape[i, slot]],
        motion,
        motion.split()[-1],
        f"{BACKGROUNDS[scenes.background[i]]} background",
    )
    return choices[rng.integers(len(choices))]


def _described(scenes: Scenes, i: int, slot: int, kind: float, rng: np.random.Generator) -> str:
    color = shape = motion = True
    if 0.16 <= kind < 0.31:
        color, shape, motion = (bool(keep) for keep in rng.random(3) < 0.5)
    elif 0.31 <= kind < 0.56:
        color = False
    return describe(scenes, i, slot, color=color, shape=shape, motion=motion or not (color or shape))
