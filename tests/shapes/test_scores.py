"""Scores of maps, against maps whose answer is known and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from diffusers_concept_maps.shapes.scenes import FRAMES, Scenes
from diffusers_concept_maps.shapes.suite import frozen
from diffusers_concept_maps.shapes.suite.probe import object_weights
from diffusers_concept_maps.shapes.suite.scores import (
    average_precisions,
    bootstrap_interval,
    contrast_hits,
    late_hits,
    localization,
    objectness,
)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return frozen.late_scenes(24, 5)


@pytest.fixture(scope="module")
def weights(scenes: Scenes) -> torch.Tensor:
    return object_weights(scenes.masks)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(41))


def test_weights_are_the_share_of_a_token_in_an_object(scenes: Scenes, weights: torch.Tensor) -> None:
    expected = scenes.masks.unflatten(-1, (8, 4)).unflatten(-3, (8, 4)).mean((-1, -3)).flatten(2)
    torch.testing.assert_close(weights, expected)


def test_planted_maps_win_every_clip_and_exchanged_ones_none(weights: torch.Tensor) -> None:
    """What both maps share, however loud, cancels; leading axes are kept."""
    planted = weights + 10 * noise(24, 1, 384)
    maps = torch.stack([planted, planted.flip(1)])
    assert contrast_hits(maps, weights).tolist() == [[True] * 24, [False] * 24]


def test_hit_is_the_difference_of_means() -> None:
    """By hand: A's word is 3 and 1 on A's tokens of weight 1 and 0.5, 2 on B's."""
    maps = torch.tensor([[[3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    weights = torch.tensor([[[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]])
    assert contrast_hits(maps, weights).tolist() == [True]  # (3 + 0.5) / 1.5 > 2
    maps[0, 0, 0] = 2.4
    assert contrast_hits(maps, weights).tolist() == [False]  # (2.4 + 0.5) / 1.5 < 2


def test_late_hits_see_the_start_of_their_word_and_not_the_clock(scenes: Scenes, weights: torch.Tensor) -> None:
    """A map that rises with the clock, and a map of all motion that both words share, earn nothing."""
    start = scenes.start[:, 0]
    moving = torch.from_numpy(np.arange(FRAMES) >= start[:, None]).double()
    shares = weights.double()
    clock = torch.arange(FRAMES).double()[None, :, None].expand(24, FRAMES, 64).flatten(1)
    rise = (moving[..., None] * (shares[:, 0].unflatten(-1, (FRAMES, -1)) > 0)).flatten(1)
    energy = clock + 5 * rise
    right, wrong = torch.stack([energy + 0.1 * rise, energy], 1), torch.stack([energy, energy + 0.1 * rise], 1)
    assert late_hits(torch.stack([right, wrong]), shares, start).tolist() == [[True] * 24, [False] * 24]
    assert not late_hits(torch.stack([energy, energy], 1), shares, start).any()
    by_clock = torch.stack([clock + 0.1 * rise, torch.zeros_like(clock)], 1)
    assert late_hits(by_clock, shares, start).all()  # the other object takes the clock's rise off


def test_average_precision_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    scores = np.concatenate([rng.normal(size=(20, 50)), rng.integers(3, size=(20, 50)).astype(float)])
    positives = rng.random((40, 50)) < 0.2
    positives[:, 0] = True
    expected = [average_precision_score(y, s) for y, s in zip(positives, scores, strict=True)]
    np.testing.assert_allclose(average_precisions(scores, positives), expected, atol=1e-12)


def test_localization_and_its_oracle(weights: torch.Tensor) -> None:
    covered = weights > 0.5
    count = covered.sum(2).numpy()
    np.testing.assert_allclose(objectness(weights), count[:, 0] / count.sum(1), atol=1e-12)
    background = 1 - weights.sum(1, keepdim=True)
    np.testing.assert_allclose(localization(torch.cat([weights, background], 1), weights), 1.0)
    flipped = torch.cat([weights.flip(1), background], 1)
    assert (localization(flipped, weights) < objectness(weights)).all()


def test_bootstrap_interval() -> None:
    assert bootstrap_interval(np.ones(50, dtype=bool)) == (1, 1)
    low, high = bootstrap_interval(np.arange(400) % 4 > 0)
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)


def test_bootstrap_draws_clusters_whole() -> None:
    """Forty clusters that are all ones or all zeros: as uncertain as forty values, however large they are."""
    values = np.repeat(np.arange(40) % 2, 25)
    low, high = bootstrap_interval(values, clusters=np.repeat(np.arange(40), 25), level=0.99)
    half = 2.576 * (0.25 / 40) ** 0.5
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.02)
