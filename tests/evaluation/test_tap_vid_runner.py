"""TAP-Vid by any model: scores of a small pickle, resumed, with failures, and by the command line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import tiny_cogvideox

import diffusers_concept_maps as dcm
from diffusers_concept_maps import cli
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.evaluation import tap_vid_runner
from diffusers_concept_maps.evaluation.tap_vid_runner import evaluate_tap_vid
from diffusers_concept_maps.evaluation.tracking import mean_scores, sample_queries, score_tracks

OPTIONS = {"layers": [1], "size": (48, 80)}
FRAMES = 7


def make_video(seed: int) -> dict[str, Any]:
    """Three points: one that reaches the very border, and one that comes into sight later."""
    random = np.random.default_rng(seed)
    points = random.random((3, FRAMES, 2)).astype(np.float32)
    points[0, :2] = [(1.0, 0.0), (1.003, 0.5)]
    occluded = random.random((3, FRAMES)) < 0.3
    occluded[:, 0] = [False, True, False]
    return {
        "video": random.integers(0, 256, (FRAMES, 24, 40, 3), dtype=np.uint8),
        "points": points,
        "occluded": occluded,
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    videos = {name: make_video(seed) for seed, name in enumerate(("goat", "bike"))}
    (tmp_path / "tapvid_davis.pkl").write_bytes(pickle.dumps(videos))
    return tmp_path


def expected(root: Path, mode: Any) -> list[Any]:
    """Scores of every video by `track` and `score_tracks`, in the benchmark's 256 x 256 pixels."""
    scores, pipe = [], tiny_cogvideox.shaken_pipeline()
    for sample in tap_vid_runner.read_davis(root / "tapvid_davis.pkl"):
        queries = sample_queries(sample.tracks, sample.visibility, mode)
        asked = queries.points.clone()
        asked[:, 1:] = asked[:, 1:].clamp(-0.5, 255.5)
        out = dcm.track(pipe, sample.frames, asked, **OPTIONS)  # type: ignore[arg-type]
        true = sample.tracks[queries.track], sample.visibility[queries.track]
        frames = queries.points[:, 0].long()
        scores.append(score_tracks(out.tracks, out.visibility, *true, frames, mode, size=(256, 256)))
    return scores


@pytest.mark.parametrize("mode", ["first", "strided"])
def test_scores_are_those_of_the_benchmark(mode: Any, root: Path, tmp_path: Path) -> None:
    pipe = tiny_cogvideox.shaken_pipeline()
    summary = evaluate_tap_vid(pipe, "davis", root, tmp_path / "out", mode=mode, options=OPTIONS)
    scores = expected(root, mode)
    assert summary["scores"] == pytest.approx(mean_scores(scores).as_dict())
    assert summary["videos"] == 2
    assert any("DiffTrack" in line for line in summary["published"])
    lines = (tmp_path / "out" / "samples" / "rank_0.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["sample"] for record in records] == ["goat", "bike"]
    for record, score in zip(records, scores, strict=True):
        assert record["scores"] == pytest.approx(score.as_dict())
    stored = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert stored["scores"] == summary["scores"]
    assert (stored["mode"], stored["dataset"], stored["options"]["size"]) == (mode, "tap-vid-davis", [48, 80])


def test_resumes_behind_what_is_through(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, tracked, out = tiny_cogvideox.shaken_pipeline(), [], tmp_path / "out"
    stock = tap_vid_runner.track

    def track(pipe: Any, frames: torch.Tensor, *args: Any, **options: Any) -> Any:
        tracked.append(frames)
        if len(tracked) == 2:
            raise ConceptMapsError("no luck")
        return stock(pipe, frames, *args, **options)

    monkeypatch.setattr(tap_vid_runner, "track", track)
    one = evaluate_tap_vid(pipe, "davis", root, out, limit=1, options=OPTIONS)
    assert (one["videos"], len(tracked)) == (1, 1)
    two = evaluate_tap_vid(pipe, "davis", root, out, options=OPTIONS)
    assert two["failed"] == {"bike": "ConceptMapsError: no luck"}
    assert two["scores"] == one["scores"]
    both = evaluate_tap_vid(pipe, "davis", root, out, options=OPTIONS)
    assert len(tracked) == 3
    assert both["failed"] == {}
    assert both["scores"] == pytest.approx(mean_scores(expected(root, "first")).as_dict())
    with pytest.raises(
        ConceptMapsError, match='holds a run with other settings: mode was "first" and is now "strided"'
    ):
        evaluate_tap_vid(pipe, "davis", root, out, mode="strided", options=OPTIONS)


def test_scores_that_a_video_does_not_have(tmp_path: Path) -> None:
    """A point that is only seen where it is asked for has no place to be scored at."""
    lone, hidden = make_video(3), make_video(4)
    lone["occluded"][:] = True
    lone["occluded"][0, 0] = False
    hidden["occluded"][:] = True
    (tmp_path / "v.pkl").write_bytes(pickle.dumps([lone, hidden]))
    pipe = tiny_cogvideox.shaken_pipeline()
    summary = evaluate_tap_vid(pipe, "rgb-stacking", tmp_path / "v.pkl", tmp_path / "out", options=OPTIONS)
    assert summary["scores"]["average_within"] is None
    assert summary["scores"]["occlusion_accuracy"] is not None
    assert "no point of 'rgb_stacking_001' is visible" in summary["failed"]["rgb_stacking_001"]
    (tmp_path / "v.pkl").write_bytes(pickle.dumps([hidden]))
    with pytest.raises(ConceptMapsError, match="no video could be scored"):
        evaluate_tap_vid(pipe, "rgb-stacking", tmp_path / "v.pkl", tmp_path / "other", options=OPTIONS)


def test_wrong_arguments(root: Path, tmp_path: Path) -> None:
    pipe = tiny_cogvideox.shaken_pipeline()
    with pytest.raises(ConceptMapsValueError, match="unknown part 'dogs' of TAP-Vid; expected one of davis, kinetics"):
        evaluate_tap_vid(pipe, "dogs", root, tmp_path / "out")
    with pytest.raises(ConceptMapsValueError, match="limit is 0; expected at least 1"):
        evaluate_tap_vid(pipe, "davis", root, tmp_path / "out", limit=0)


def test_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "0000_of_0001.pkl").write_bytes(pickle.dumps([make_video(5)]))
    out = tmp_path / "out"
    arguments = ["evaluate", "--tap-vid", "kinetics", "--root", str(root), "--out", str(out), "--mode", "strided"]
    given = ["--layers", "3", "--noise-level", "0.1", "--size", "32", "32", "--readout", "displacement"]
    assert cli.main([*arguments, *given]) == 0
    printed = capsys.readouterr().out
    stored = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert f"average_jaccard      {stored['scores']['average_jaccard']:.3f}" in printed
    assert "mean of 1 videos, strided" in printed
    assert "published: DiffTrack" in printed
    assert stored["options"] == {
        "layers": [3], "noise_level": 0.1, "size": [32, 32], "seed": 0, "readout": "displacement"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--tap-vid davis is there without --root"),
        (["--root", "nowhere"], "nowhere"),
        (["--root", ".", "--noise-level", "0.1", "0.2"], "expected one for --tap-vid"),
        (["--root", ".", "--guidance"], "--guidance is there with --tap-vid"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "--tap-vid", "davis", *arguments]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())
