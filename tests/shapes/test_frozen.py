"""What the embedded model is judged by: balanced, repeatable, and what it says it is."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

import diffusers_concept_maps as dcm
from diffusers_concept_maps.shapes.captions import WORDS, full_captions
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
from diffusers_concept_maps.shapes.suite import frozen


def is_held_out(scenes: Scenes) -> np.ndarray:
    named = np.array(
        [
            [(list(COLORS)[c], SHAPES[s]) in HELD_OUT for c, s in zip(*pair, strict=True)]
            for pair in zip(scenes.color, scenes.shape, strict=True)
        ]
    )
    return named.any(1)


def test_prompts_are_balanced_and_frozen() -> None:
    prompts = frozen.generation_prompts()
    assert prompts == frozen.generation_prompts()
    assert len(prompts) == 120
    assert set(Counter(prompt.text for prompt in prompts).values()) <= {1, 2}
    assert Counter(prompt.color for prompt in prompts) == dict.fromkeys(COLORS, 30)
    assert Counter(prompt.shape for prompt in prompts) == dict.fromkeys(SHAPES, 40)
    motions = Counter(prompt.motion for prompt in prompts)
    assert set(motions) == set(MOTIONS)
    assert max(motions.values()) - min(motions.values()) == 1
    assert Counter(prompt.text.split()[-2] for prompt in prompts) == dict.fromkeys(BACKGROUNDS, 60)
    assert not {(prompt.color, prompt.shape) for prompt in prompts} & set(HELD_OUT)
    for prompt in prompts:
        assert prompt.text.startswith(f"a {prompt.color} {prompt.shape} {prompt.motion} on ")
        assert set(prompt.text.split()) <= set(WORDS)


@pytest.mark.parametrize("word", ["color", "shape", "motion"])
def test_contrast_scenes_differ_in_the_word(word: str) -> None:
    scenes = frozen.contrast_scenes(40, frozen.DEVELOPMENT_SEED, word)
    again = frozen.contrast_scenes(40, frozen.DEVELOPMENT_SEED, word)
    other = frozen.contrast_scenes(40, frozen.EVALUATION_SEED, word)
    first, second = getattr(scenes, word).T
    assert len(scenes) == len(scenes.video) == 40
    assert bool((first != second).all())
    assert bool((scenes.count == 2).all())
    assert torch.equal(scenes.video, again.video)
    assert full_captions(scenes) == full_captions(again)
    assert not torch.equal(scenes.video, other.video)
    assert not is_held_out(scenes).any()
    if word == "motion":
        assert ((scenes.motion == STILL).sum(1) == 1).all()


def test_held_out_described_and_late_scenes() -> None:
    assert is_held_out(frozen.contrast_scenes(20, 1, "shape", held_out=True)).all()
    described = frozen.described_scenes(20, 1)
    for word in ("color", "shape", "motion"):
        first, second = getattr(described, word).T
        assert (first != second).all()
    assert ((described.motion == STILL).sum(1) == 1).all()
    late = frozen.late_scenes(20, 1)
    assert (late.start[:, 0] >= 2).all()
    assert (late.start[:, 1] == 0).all()


@pytest.mark.parametrize("word", ["color", "shape", "motion"])
def test_absent_words_are_absent_and_come_in_either_order(word: str) -> None:
    scenes, others = frozen.absent_scenes(160, 7, word)
    here, there = getattr(scenes, word), getattr(others, word)
    assert len(here) == len(there) == 160
    assert all(not set(a) & set(b) and b[0] != b[1] for a, b in zip(here, there, strict=True))
    assert 0.35 < (there[:, 0] < there[:, 1]).mean() < 0.65


def test_scenes_can_be_taken_apart_and_joined() -> None:
    scenes = sample_scenes(6, np.random.default_rng(3))
    joined = Scenes.join([scenes.take(np.array([4, 1])), scenes.take(np.array([5]))])
    assert torch.equal(joined.video, scenes.video[[4, 1, 5]])
    assert torch.equal(joined.moves, scenes.moves[[4, 1, 5]])
    assert joined.motion.tolist() == scenes.motion[[4, 1, 5]].tolist()
    assert full_captions(joined) == [full_captions(scenes)[i] for i in (4, 1, 5)]


def test_errors() -> None:
    for draw in (frozen.contrast_scenes, frozen.absent_scenes):
        with pytest.raises(dcm.ConceptMapsValueError, match="word is 'size'; expected one of color, shape, motion"):
            draw(4, 1, "size")
