"""Tracks of scenes, from their masks, against where their objects were drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_concept_maps.shapes import scenes
from diffusers_concept_maps.shapes.scenes import COLORS, SHAPES, sample_scenes
from diffusers_concept_maps.shapes.suite.correspondence import _confirmed_mask, object_tracks
from diffusers_concept_maps.shapes.suite.frozen import Prompt


def test_points_go_with_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the plan of a scene: with its center, and by its radius."""
    plans = []
    plan = scenes._plan
    monkeypatch.setattr(scenes, "_plan", lambda *args: plans.append(plan(*args)) or plans[-1])
    drawn = sample_scenes(40, np.random.default_rng(0))
    for i in range(40):
        for slot in range(drawn.count[i]):
            tracks = object_tracks(drawn.masks[i, slot]).double()
            center = torch.from_numpy(plans[0].center[i, slot]) - 0.5
            growth = torch.from_numpy(plans[0].radius[i, slot] / plans[0].radius[i, slot, 0])
            expected = center + (tracks[:, :1] - center[0]) * growth[:, None]
            assert len(tracks) >= 4
            torch.testing.assert_close(tracks, expected, rtol=0, atol=0.12)
            columns, rows = tracks[:, 0].round().long().unbind(1)
            assert (drawn.masks[i, slot, 0, rows, columns] > 0.5).all()


def test_only_clips_that_show_what_was_asked_for_are_used() -> None:
    drawn = sample_scenes(12, np.random.default_rng(3), objects=1)
    colors = list(COLORS)
    confirmed = 0
    for i in range(12):
        words = colors[drawn.color[i, 0]], SHAPES[drawn.shape[i, 0]], scenes.MOTIONS[drawn.motion[i, 0]]
        clip = (drawn.video[i : i + 1] + 1) / 2
        mask = _confirmed_mask(clip, Prompt("", *words))
        if mask is not None:
            confirmed += 1
            both = torch.minimum(mask, drawn.masks[i, 0]).sum() / torch.maximum(mask, drawn.masks[i, 0]).sum()
            assert both > 0.7
        wrong = colors[(drawn.color[i, 0] + 1) % 4], *words[1:]
        assert _confirmed_mask(clip, Prompt("", *wrong)) is None
    assert confirmed >= 11
