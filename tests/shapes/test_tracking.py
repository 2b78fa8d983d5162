"""Points in scenes: where they truly go, what stands beside the model, and what is printed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import diffusers_concept_maps as dcm
from diffusers_concept_maps import cli
from diffusers_concept_maps.shapes.scenes import STILL, sample_scenes
from diffusers_concept_maps.shapes.suite import frozen, tracking
from diffusers_concept_maps.shapes.suite.tracking import KINDS, Choice, TrackedClip, score_tracker, tracked_clips

CLIPS = tracked_clips(12, 5)


def test_true_tracks_stay_on_their_objects() -> None:
    scenes = sample_scenes(12, np.random.default_rng(5), objects=2)
    for index, clip in enumerate(CLIPS):
        masks, slots = scenes.masks[index], [0, 0, 1, 1, None, None, None, None] * 2
        assert len(clip.points) == len(slots)
        assert clip.points[:8, 0].eq(0).all()
        assert clip.points[8:, 0].gt(0).all()
        for slot, point, track, visible, kind in zip(
            slots, clip.points, clip.tracks, clip.visibility, clip.kinds, strict=True
        ):
            frame = int(point[0])
            torch.testing.assert_close(track[frame], point[1:], rtol=0, atol=1e-4)
            assert visible[frame]
            x, y = track.round().long().unbind(-1)
            covered = masks[:, torch.arange(6), y, x]
            if slot is None:
                assert kind == "ground"
                assert (track == point[1:]).all()
                assert torch.equal(visible, covered.sum(0) < 0.5)
            else:
                still = scenes.motion[index, slot] == STILL
                assert kind == ("still" if still else "moving")
                assert visible.all()
                assert (covered[slot] > 0.4).all()  # to a rounded pixel
                assert not still or torch.allclose(track, point[1:].expand(6, -1), atol=1e-4)
                center = torch.from_numpy(scenes.center[index, slot])
                away = (track.double() + 0.5 - center).norm(dim=-1) / torch.from_numpy(scenes.radius[index, slot])
                torch.testing.assert_close(away, away[:1].expand(6), rtol=0, atol=1e-4)
    assert {kind for clip in CLIPS for kind in clip.kinds} == set(KINDS)
    assert not torch.cat([clip.visibility for clip in CLIPS]).all()


def test_clips_are_frozen() -> None:
    again, other = tracked_clips(12, 5), tracked_clips(12, 6)
    assert all(torch.equal(a.points, b.points) for a, b in zip(CLIPS, again, strict=True))
    assert not all(torch.equal(a.points, b.points) for a, b in zip(CLIPS, other, strict=True))
    assert CLIPS[0].frames.dtype == torch.uint8


def test_nearest_color_against_a_search() -> None:
    tracks, visible = tracking.nearest_color(CLIPS[0])
    frames = CLIPS[0].frames.numpy().astype(int)
    for point, track in zip(CLIPS[0].points.long().tolist(), tracks.tolist(), strict=True):
        own = frames[point[0], :, point[2], point[1]]
        for frame in range(6):
            places = [
                (((frames[frame, :, y, x] - own) ** 2).sum(), (x - point[1]) ** 2 + (y - point[2]) ** 2, y, x)
                for y in range(32)
                for x in range(32)
            ]
            _, _, y, x = min(places)
            assert track[frame] == [x, y]
    assert visible.all()
    still, _ = tracking.no_motion(CLIPS[0])
    assert torch.equal(still, CLIPS[0].points[:, None, 1:].expand(-1, 6, -1))


def test_scores_of_a_perfect_tracker_and_of_one_that_is_off() -> None:
    perfect = score_tracker(lambda clip: (clip.tracks, clip.visibility), CLIPS)
    assert set(perfect) == {"all", *KINDS}
    for score in perfect.values():
        assert (score.scores.average_within, score.scores.average_jaccard, score.median) == (1.0, 1.0, 0.0)
        assert score.scores.occlusion_accuracy == 1.0

    def off(clip: TrackedClip) -> Any:
        """Ground points are three quarters of a pixel off: 6 of the benchmark's pixels."""
        ground = torch.tensor([kind == "ground" for kind in clip.kinds])
        return clip.tracks + torch.where(ground[:, None, None], torch.tensor([0.75, 0.0]), 0.0), clip.visibility

    scores = score_tracker(off, CLIPS)
    assert scores["moving"].scores.average_within == 1.0
    assert scores["ground"].scores.within == {1: 0.0, 2: 0.0, 4: 0.0, 8: 1.0, 16: 1.0}
    assert scores["ground"].median == pytest.approx(0.75)


def test_choice_is_the_best_on_the_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is right in one layer and noise, and takes points for visible at one value alone."""

    def by_model(pipe: Any, choice: Choice) -> Any:
        good = choice[:3] == (3, 0.2, True)
        sure = choice.visibility_tokens == 0.5
        return lambda clip: (
            clip.tracks if good else clip.tracks + 9,
            clip.visibility if sure else torch.zeros_like(clip.visibility),
        )

    monkeypatch.setattr(tracking, "by_model", by_model)
    assert tracking.choose(None, CLIPS[:2]) == Choice(3, 0.2, True, 0.5)  # type: ignore[arg-type]


def test_the_model_follows_what_moves() -> None:
    """By its preset, on a small part of the development clips."""
    pipe = dcm.load_shapes_pipeline()
    clips = tracked_clips(6, frozen.DEVELOPMENT_SEED)

    def follow(clip: TrackedClip) -> Any:
        out = dcm.track(pipe, clip.frames, clip.points)
        return out.tracks, out.visibility

    model, still = score_tracker(follow, clips)["moving"], score_tracker(tracking.no_motion, clips)["moving"]
    color = score_tracker(tracking.nearest_color, clips)["moving"]
    assert model.scores.average_within > max(still.scores.average_within, color.scores.average_within)
    assert model.median < 1.0 < still.median


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(frozen, "TRACKING_DEVELOPMENT_CLIPS", 1)
    monkeypatch.setattr(frozen, "TRACKING_EVALUATION_CLIPS", 4)
    monkeypatch.setattr(frozen, "TRACKING_NOISE_LEVELS", (0.2,))
    monkeypatch.setattr(frozen, "TRACKING_VISIBILITY", (1.0,))
    assert cli.main(["evaluate", "--suite", "tracking"]) in (0, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("layer")
    for name in ("no motion", "nearest color", "model", "model, tokens", "model, official"):
        assert sum(line.startswith(f"{name}: ") for line in lines) == 4
    assert sum(" ok" in line or " RED" in line for line in lines) == 1
    assert cli.main(["evaluate", "--suite", "tracking", "--guidance"]) == 2
    assert "--guidance is there with --suite tracking" in capsys.readouterr().err
