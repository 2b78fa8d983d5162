"""The judge passes real clips and fails clips that are wrong in one known way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from diffusers_concept_maps import ConceptMapsValueError
from diffusers_concept_maps.shapes.judge import Verdict, both_colors, judge, segment
from diffusers_concept_maps.shapes.scenes import COLORS, MOTIONS, SHAPES, Scenes, sample_scenes

COLOR_NAMES = list(COLORS)


@dataclass(frozen=True)
class RealClips:
    scenes: Scenes
    video: torch.Tensor
    colors: list[str]
    shapes: list[str]
    motions: list[str]

    def verdict(self, video: torch.Tensor | None = None) -> Verdict:
        return judge(self.video if video is None else video, self.colors, self.shapes, self.motions)

    def where(self, *motions: str) -> torch.Tensor:
        return torch.tensor([motion in motions for motion in self.motions])


def real_clips(n: int, seed: int) -> RealClips:
    scenes = sample_scenes(n, np.random.default_rng(seed), objects=1)
    return RealClips(
        scenes,
        (scenes.video + 1) / 2,
        [COLOR_NAMES[i] for i in scenes.color[:, 0]],
        [SHAPES[i] for i in scenes.shape[:, 0]],
        [MOTIONS[i] for i in scenes.motion[:, 0]],
    )


@pytest.fixture(scope="module")
def real() -> RealClips:
    return real_clips(350, 11)


@pytest.fixture(scope="module")
def some() -> RealClips:
    return real_clips(100, 15)


def share(passed: torch.Tensor) -> float:
    return float(passed.float().mean())


def test_real_clips_pass(real: RealClips) -> None:
    verdict = real.verdict()
    assert {name for name, rate in verdict.rates().items() if rate >= 0.98} == {
        "present",
        "coherent",
        "color",
        "shape",
        "motion",
    }
    by_word = {color: share(verdict.color[np.array(real.colors) == color]) for color in COLORS}
    by_word |= {shape: share(verdict.shape[np.array(real.shapes) == shape]) for shape in SHAPES}
    by_word |= {motion: share(verdict.motion[np.array(real.motions) == motion]) for motion in MOTIONS}
    assert {word: rate for word, rate in by_word.items() if rate < 0.95} == {}
    late = torch.from_numpy(real.scenes.start[:, 0] > 0)
    assert late.sum() > 80
    assert share(verdict.motion[late]) >= 0.98


def test_rates_are_the_shares_of_the_verdict(real: RealClips) -> None:
    shifted = judge(real.video, real.colors, real.shapes[1:] + real.shapes[:1], real.motions)
    expected = np.mean([a == b for a, b in zip(real.shapes, real.shapes[1:] + real.shapes[:1], strict=True)])
    assert shifted.rates()["shape"] == pytest.approx(expected, abs=0.01)


def test_segmentation_is_the_mask(real: RealClips) -> None:
    labels, mask = segment(real.video), real.scenes.masks[:, 0]
    painted = torch.from_numpy(real.scenes.color[:, 0])[:, None, None, None].expand_as(labels)
    assert torch.equal(labels[mask == 1], painted[mask == 1])
    assert bool((labels[mask < 0.3] == -1).all())
    assert bool(((labels == painted) | (labels == -1)).all())


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_wrong_color_fails(some: RealClips, shift: int) -> None:
    wrong = [COLOR_NAMES[(COLOR_NAMES.index(color) + shift) % 4] for color in some.colors]
    verdict = judge(some.video, wrong, some.shapes, some.motions)
    assert verdict.rates() == dict.fromkeys(verdict.rates(), 0.0)


@pytest.mark.parametrize("shift", [1, 2])
def test_wrong_shape_fails(some: RealClips, shift: int) -> None:
    wrong = [SHAPES[(SHAPES.index(shape) + shift) % 3] for shape in some.shapes]
    verdict = judge(some.video, some.colors, wrong, some.motions)
    assert share(verdict.shape) <= 0.01
    assert share(verdict.color) >= 0.98


@pytest.mark.parametrize("shift", range(1, 7))
def test_wrong_motion_fails(some: RealClips, shift: int) -> None:
    wrong = [MOTIONS[(MOTIONS.index(motion) + shift) % 7] for motion in some.motions]
    verdict = judge(some.video, some.colors, some.shapes, wrong)
    assert share(verdict.motion) == 0
    assert share(verdict.shape) >= 0.98


def test_reversed_clip_fails_unless_it_stands_still(some: RealClips) -> None:
    verdict = some.verdict(some.video.flip(1))
    still = some.where("standing still")
    assert share(verdict.motion[~still]) == 0
    assert share(verdict.motion[still]) >= 0.98
    assert share(verdict.shape) >= 0.98


def test_frames_out_of_order_are_no_motion(some: RealClips) -> None:
    """The path counts, not its ends alone: two frames are swapped, and the first and last stay."""
    moving = ~some.where("standing still")
    verdict = some.verdict(some.video[:, [0, 4, 2, 3, 1, 5]])
    early = moving & torch.from_numpy(some.scenes.start[:, 0] == 0)
    assert share(verdict.motion[early]) == 0
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(6, generator=generator) for _ in range(len(some.video))])
    shuffled = some.video[torch.arange(len(order))[:, None], order]
    changed = (shuffled != some.video).flatten(1).any(1)
    assert share(some.verdict(shuffled).motion[moving & changed]) <= 0.02


def test_diagonal_motion_is_none_of_the_motions() -> None:
    video = torch.full((1, 6, 3, 32, 32), 0.1)
    for frame in range(6):
        start = 3 + 3 * frame
        video[0, frame, :, start : start + 8, start : start + 8] = torch.tensor(COLORS["red"]).view(3, 1, 1)
    verdicts = [judge(video, ["red"], ["square"], [motion]) for motion in MOTIONS]
    assert not any(bool(verdict.motion) for verdict in verdicts)
    assert all(bool(verdict.shape) for verdict in verdicts)


def test_empty_clip_fails(some: RealClips) -> None:
    empty = torch.full_like(some.video, 0.1)
    assert some.verdict(empty).rates() == dict.fromkeys(some.verdict().rates(), 0.0)


def test_object_may_be_missing_in_one_frame_only(some: RealClips) -> None:
    for missing, expected in ((1, 1.0), (2, 0.0)):
        video = some.video.clone()
        video[:, 2 : 2 + missing] = 0.1
        assert share(some.verdict(video).present) == expected


def test_two_blobs_are_not_coherent() -> None:
    scenes = sample_scenes(100, np.random.default_rng(12), objects=2)
    paint = torch.tensor(COLORS["green"]).view(3, 1, 1)
    cover = scenes.masks.sum(1)[:, :, None]
    video = 0.1 * (1 - cover) + cover * paint
    shapes = [SHAPES[i] for i in scenes.shape[:, 0]]
    motions = [MOTIONS[i] for i in scenes.motion[:, 0]]
    verdict = judge(video, ["green"] * 100, shapes, motions)
    assert share(verdict.present) >= 0.95  # a few pairs cover more than any one object does
    assert max(share(verdict.coherent), share(verdict.shape), share(verdict.motion)) <= 0.01


def test_salt_and_pepper_fails(some: RealClips) -> None:
    generator = torch.Generator().manual_seed(13)
    pixels = torch.rand(some.video[:, :, 0].shape, generator=generator) < 0.1
    paint = torch.tensor([COLORS[color] for color in some.colors])[:, None, :, None, None]
    verdict = some.verdict(torch.where(pixels[:, :, None], paint, 0.1))
    assert share(verdict.present) >= 0.98
    assert (share(verdict.coherent), share(verdict.shape), share(verdict.motion)) == (0, 0, 0)


def test_second_color_spoils_the_color_only(some: RealClips) -> None:
    video = some.video.clone()
    other = torch.tensor([COLORS[COLOR_NAMES[(COLOR_NAMES.index(color) + 1) % 4]] for color in some.colors])
    video[:, :, :, :3, :3] = other[:, None, :, None, None]
    verdict = some.verdict(video)
    assert share(verdict.color) == 0
    assert share(verdict.present) >= 0.98


def test_both_colors() -> None:
    scenes = sample_scenes(100, np.random.default_rng(14), objects=2)
    video = (scenes.video + 1) / 2
    first, second = ([COLOR_NAMES[i] for i in colors] for colors in scenes.color.T)
    absent = [next(name for name in COLOR_NAMES if name not in pair) for pair in zip(first, second, strict=True)]
    assert share(both_colors(video, first, second)) >= 0.98
    assert share(both_colors(video, first, absent)) == 0
    assert share(both_colors(video, absent, second)) == 0


def test_errors(some: RealClips) -> None:
    with pytest.raises(ConceptMapsValueError, match=r"clips have shape \(6, 3, 32, 32\); expected \[n, frame, 3"):
        segment(some.video[0])
    with pytest.raises(ConceptMapsValueError, match=r"clips have shape \(1, 6, 32, 32, 3\)"):
        segment(some.video[:1].movedim(2, -1))
    with pytest.raises(ConceptMapsValueError, match="2 words for 1 clips; expected one for each"):
        judge(some.video[:1], ["red", "red"], ["circle"], ["growing"])
    with pytest.raises(ConceptMapsValueError, match="unknown word 'pentagon'; expected one of circle, square"):
        judge(some.video[:1], ["red"], ["pentagon"], ["growing"])
