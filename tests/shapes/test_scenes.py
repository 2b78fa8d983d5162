"""The truth that comes with every scene is true, and captions say it in words the model knows."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from diffusers_concept_maps.shapes.captions import TEXT_LENGTH, WORDS, describe, full_captions, training_captions
from diffusers_concept_maps.shapes.model import build_tokenizer
from diffusers_concept_maps.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    FRAMES,
    HEIGHT,
    HELD_OUT,
    MOTIONS,
    SHAPES,
    WIDTH,
    Scenes,
    sample_scenes,
)

PALETTE = torch.tensor(list(COLORS.values()))


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample_scenes(400, np.random.default_rng(21))


def pairs(scenes: Scenes) -> list[set[tuple[str, str]]]:
    """Color and shape of all objects of every scene."""
    names = list(COLORS)
    return [
        {(names[scenes.color[i, slot]], SHAPES[scenes.shape[i, slot]]) for slot in range(scenes.count[i])}
        for i in range(len(scenes))
    ]


def test_layout(scenes: Scenes) -> None:
    assert len(scenes) == 400
    assert scenes.video.shape == (400, FRAMES, 3, HEIGHT, WIDTH)
    assert scenes.masks.shape == (400, 2, FRAMES, HEIGHT, WIDTH)
    assert scenes.moves.shape == (400, 2, FRAMES)
    assert (scenes.video.dtype, scenes.masks.dtype, scenes.moves.dtype) == (torch.float32, torch.float32, torch.bool)
    assert float(scenes.video.abs().max()) <= 1


def test_masks_are_what_the_colors_show(scenes: Scenes) -> None:
    """Grounds are grey: the difference of two channels is that of the object's color, times its coverage."""
    video = (scenes.video + 1) / 2
    for slot in range(2):
        paint = PALETTE[torch.from_numpy(scenes.color[:, slot])]
        high, low = (
            index[:, None, None, None, None].expand(-1, FRAMES, 1, HEIGHT, WIDTH)
            for index in (paint.argmax(1), paint.argmin(1))
        )
        chroma = (video.gather(2, high) - video.gather(2, low))[:, :, 0]
        coverage = chroma / (paint.amax(1) - paint.amin(1))[:, None, None, None]
        alone = scenes.masks[:, 1 - slot] == 0
        torch.testing.assert_close(coverage[alone], scenes.masks[:, slot][alone], atol=1e-5, rtol=0)


def test_objects_never_overlap_and_are_never_cut(scenes: Scenes) -> None:
    assert float(scenes.masks.prod(1).max()) == 0
    area = scenes.masks.sum((-1, -2))
    there = torch.arange(2) < torch.from_numpy(scenes.count)[:, None]
    assert torch.equal(area > 0, there[..., None].expand_as(area))
    rigid = torch.from_numpy(~np.isin(scenes.motion, [MOTIONS.index("growing"), MOTIONS.index("shrinking")])) & there
    spread = (area.amax(2) - area.amin(2))[rigid] / area.mean(2)[rigid]
    assert float(spread.max()) < 0.05


def test_moves_says_when_the_mask_changes(scenes: Scenes) -> None:
    changed = (scenes.masks[:, :, 1:] != scenes.masks[:, :, :-1]).any(-1).any(-1)
    never = torch.zeros(len(scenes), 2, 1, dtype=torch.bool)
    assert torch.equal(scenes.moves, torch.cat([changed, never], 2) | torch.cat([never, changed], 2))
    begins = torch.where(scenes.moves.any(2), scenes.moves.int().argmax(2), 0)
    there = torch.arange(2) < torch.from_numpy(scenes.count)[:, None]
    assert torch.equal(begins[there], torch.from_numpy(scenes.start)[there])
    moving = there & torch.from_numpy(scenes.motion != MOTIONS.index("standing still"))
    assert 0.3 < float((begins[moving] > 0).float().mean()) < 0.5


def test_motion_is_the_one_that_its_word_says(scenes: Scenes) -> None:
    column, row = torch.arange(WIDTH) + 0.5, torch.arange(HEIGHT)[:, None] + 0.5
    for i in range(len(scenes)):
        for slot in range(scenes.count[i]):
            first, last = scenes.masks[i, slot, 0], scenes.masks[i, slot, -1]
            right, down = (
                (last * axis).sum() / last.sum() - (first * axis).sum() / first.sum() for axis in (column, row)
            )
            growth = float(last.sum() / first.sum())
            seen = [-right > 5, right > 5, -down > 5, down > 5, growth > 2.5, growth < 1 / 2.5]
            expected = [motion == MOTIONS[scenes.motion[i, slot]] for motion in MOTIONS[:-1]]
            assert [bool(yes) for yes in seen] == expected


def test_same_seed_same_scenes() -> None:
    first, second, other = (sample_scenes(8, np.random.default_rng(seed)) for seed in (1, 1, 2))
    for field in fields(Scenes):
        assert np.array_equal(np.asarray(getattr(first, field.name)), np.asarray(getattr(second, field.name)))
    assert not torch.equal(first.video, other.video)


def test_held_out_pairs_only_when_asked_for(scenes: Scenes) -> None:
    held = set(HELD_OUT)
    assert not any(held & there for there in pairs(scenes))
    every = set().union(*pairs(scenes))
    assert len(every) == len(COLORS) * len(SHAPES) - len(held)
    asked = sample_scenes(100, np.random.default_rng(22), held_out=True)
    first = [(list(COLORS)[asked.color[i, 0]], SHAPES[asked.shape[i, 0]]) for i in range(100)]
    assert set(first) == held


@pytest.mark.parametrize("objects", [1, 2])
def test_number_of_objects(objects: int) -> None:
    scenes = sample_scenes(50, np.random.default_rng(23), objects=objects)
    assert scenes.count.tolist() == [objects] * 50
    assert torch.equal(scenes.masks.flatten(2).any(2).sum(1), torch.full((50,), objects))


def test_mixed_number_of_objects(scenes: Scenes) -> None:
    assert set(scenes.count.tolist()) == {1, 2}
    assert 0.5 < float(np.mean(scenes.count == 2)) < 0.7
    two = scenes.count == 2
    assert bool((scenes.motion[two, 0] != scenes.motion[two, 1]).all())
    for words in (scenes.color, scenes.shape):  # pairs that only the other attributes tell apart
        assert 0.25 < float(np.mean(words[two, 0] == words[two, 1])) < 0.5


def test_errors() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="n is 0; expected at least one scene"):
        sample_scenes(0, rng)
    with pytest.raises(ValueError, match="objects is 3; expected 1, 2 or None"):
        sample_scenes(4, rng, objects=3)


def test_full_captions_name_every_attribute(scenes: Scenes) -> None:
    names = list(COLORS)
    for i, caption in enumerate(full_captions(scenes)):
        objects, background = caption.removesuffix(" background").split(" on ")
        assert background == BACKGROUNDS[scenes.background[i]]
        said = objects.split(" and ")
        assert len(said) == scenes.count[i]
        for slot, text in enumerate(said):
            article, color, shape, *motion = text.split()
            late = motion[0] == "later"
            assert (article, color, shape) == ("a", names[scenes.color[i, slot]], SHAPES[scenes.shape[i, slot]])
            assert (late, " ".join(motion[late:])) == (scenes.start[i, slot] > 0, MOTIONS[scenes.motion[i, slot]])


def test_description_leaves_out_what_it_is_told_to(scenes: Scenes) -> None:
    i = int(np.flatnonzero(scenes.start[:, 0] == 0)[0])
    color, shape, motion = list(COLORS)[scenes.color[i, 0]], SHAPES[scenes.shape[i, 0]], MOTIONS[scenes.motion[i, 0]]
    assert describe(scenes, i, 0, color=False) == f"a {shape} {motion}"
    assert describe(scenes, i, 0, shape=False) == f"a {color} object {motion}"
    assert describe(scenes, i, 0, color=False, shape=False, motion=False) == "a object"


def test_captions_fit_the_vocabulary_and_the_text_length() -> None:
    scenes = sample_scenes(600, np.random.default_rng(24))
    captions = full_captions(scenes) + training_captions(scenes, np.random.default_rng(25))
    assert {word for caption in captions for word in caption.split()} == set(WORDS)
    tokenizer = build_tokenizer()
    ids = tokenizer(captions).input_ids
    assert tokenizer.unk_token_id not in {token for row in ids for token in row}
    assert max(map(len, ids)) == 17 <= TEXT_LENGTH
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in ids] == captions


def test_training_captions_are_mixed_and_true(scenes: Scenes) -> None:
    captions = training_captions(scenes, np.random.default_rng(26))
    assert captions == training_captions(scenes, np.random.default_rng(26))
    assert 0.06 < np.mean([caption == "" for caption in captions]) < 0.14
    assert 0.03 < np.mean([0 < len(caption.split()) < 3 for caption in captions]) < 0.10
    full = [set(caption.split()) for caption in full_captions(scenes)]
    partial = [set(caption.split()) - {"a", "object"} for caption in captions]
    assert all(said <= true for said, true in zip(partial, full, strict=True))
    assert 0.3 < np.mean([said | {"a"} == true for said, true in zip(partial, full, strict=True)]) < 0.7
    colorless = [bool(said) and not said & set(COLORS) for said in partial]
    assert 0.25 < np.mean(colorless) < 0.5
