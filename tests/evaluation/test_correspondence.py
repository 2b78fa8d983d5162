"""Tables of matching scores: against counting by hand, and what the command writes of clips whose tracks are known."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import tiny_cogvideox, tiny_cogvideox_variants
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps import ConceptMapsError, ConceptMapsValueError, cli
from diffusers_concept_maps.commands import _correspondence
from diffusers_concept_maps.correspondence.matching import Matches
from diffusers_concept_maps.correspondence.scores import SegmentScores, harmonic_mean
from diffusers_concept_maps.correspondence.tracing import Cell, Correspondence
from diffusers_concept_maps.evaluation.correspondence import Summary, TrackedClip, score_clip, summarize
from diffusers_concept_maps.evaluation.correspondence_runs import read_tracks, score_dataset, score_video

SIZE = (40, 60)
TRACKS = torch.tensor(
    [[[10.0, 10.0], [20.0, 10.0], [30.0, 10.0]], [[50.0, 30.0], [50.0, 30.0], [50.0, 30.0]], [[5.0, 5.0]] * 3]
)
VISIBLE = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1]]).bool()
CLIP = TrackedClip.of("clip", TRACKS, VISIBLE, SIZE)
OTHER = replace(CLIP, name="other", tracks=CLIP.tracks.flip(0), visibility=torch.ones_like(CLIP.visibility))


def found(moved: torch.Tensor, layers: int = 2, steps: int = 2) -> Correspondence:
    """Matches that are off by `moved [layer, step]` pixels in x, and scores that tell layer and step."""
    result = Correspondence(CLIP.points)
    result.cover, result.stride = torch.arange(3), (8.0, 8.0)
    for layer in range(layers):
        for step in range(steps):
            positions = CLIP.tracks + torch.stack([moved[layer, step], torch.zeros(())])
            rest = torch.zeros(1, len(positions), 3)
            scores = SegmentScores(
                ("self", "cross"), torch.tensor([[0.1 * layer, 0.01 * step]]), torch.tensor([[0.5, 0.2 * layer]])
            )
            result.put(step, layer, Cell(Matches(positions[None], rest.long(), rest, rest), scores))
    return result


def test_points_are_asked_for_where_they_are_first_seen() -> None:
    assert CLIP.points.tolist() == [[0, 10, 10], [0, 50, 30]]  # the third is seen once
    later = TrackedClip.of("later", TRACKS, VISIBLE.flip(1), SIZE)
    assert later.points.tolist() == [[0, 10, 10], [0, 50, 30]]
    shown = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 1, 1]]).bool()
    assert TrackedClip.of("clip", TRACKS, shown, SIZE).points.tolist() == [[1, 20, 10], [0, 50, 30], [1, 5, 5]]
    assert TrackedClip.of("clip", TRACKS, shown, SIZE, first_frame=True).points.tolist() == [[0, 50, 30]]
    every = TrackedClip.of("clip", TRACKS, shown, SIZE, first_frame=True, every_point=True)
    assert every.points.tolist() == [[0, 10, 10], [0, 50, 30], [0, 5, 5]]


def test_clips_that_cannot_be_scored() -> None:
    with pytest.raises(ConceptMapsValueError, match=r"^clip has tracks of shape \(3, 3, 2\) and visibility of shape"):
        TrackedClip.of("clip", TRACKS, VISIBLE[:2], SIZE)
    with pytest.raises(ConceptMapsValueError, match="^clip has no point that is visible where it starts and in ano"):
        TrackedClip.of("clip", TRACKS, torch.zeros(3, 3, dtype=torch.bool), SIZE)
    with pytest.raises(ConceptMapsValueError, match="^there is no clip to score"):
        summarize([], lambda _: found(torch.zeros(2, 2)))


def test_scores_of_a_clip() -> None:
    table = score_clip(found(torch.tensor([[0.0, 3.9], [4.1, 30.0]])), CLIP, OTHER, threshold=4.0)
    assert table["accuracy"].tolist() == [[100, 100], [0, 0]]
    # Not counting the first frame, the first point moves and the second is still, seen in 2 and in 1 frame.
    assert table["accuracy_still"].unique().tolist() == [pytest.approx(100 / 3)]
    # The points of the other clip are the same in another order, and far from one another.
    assert table["accuracy_shuffled"].tolist() == [[0, 0], [0, 0]]
    assert table["attention_self"].tolist() == [[0, 0], [pytest.approx(0.1)] * 2]
    assert table["attention_cross"].tolist() == [[0, pytest.approx(0.01)]] * 2
    assert table["confidence_cross"].tolist() == [[0, 0], [pytest.approx(0.2)] * 2]
    official = score_clip(found(torch.full((2, 2), 30.0)), CLIP, OTHER, threshold=4.0, parity="difftrack")
    assert official["accuracy"].tolist() == [[0, 0], [0, 0]]
    assert official["accuracy_still"].unique().tolist() == [pytest.approx(60.0)]  # 3 of 5, with the first frames


def test_a_clip_alone_is_its_own_control_the_other_way_round() -> None:
    alone = summarize([CLIP], lambda _: found(torch.zeros(2, 2)))
    assert alone.mean("accuracy").tolist() == [[100, 100], [100, 100]]
    assert alone.mean("accuracy_shuffled").tolist() == [[0, 0], [0, 0]]


def test_half_a_token_is_the_threshold() -> None:
    for off, accuracy in ((3.9, 100), (4.1, 0)):
        summary = summarize([CLIP, OTHER], lambda _, off=off: found(torch.full((2, 2), off)))
        assert summary.scores["accuracy"][0].unique().tolist() == [accuracy]


def random_summary(clips: int = 7) -> Summary:
    generator = torch.Generator().manual_seed(0)
    names = ("accuracy", "confidence_cross", "attention_cross")
    scores = {name: torch.rand(clips, 3, 4, generator=generator, dtype=torch.float64) for name in names}
    return Summary((0, 2, 5), (0.1, 0.2, 0.5, 0.9), "noise level", tuple(map(str, range(clips))), scores)


def test_intervals_are_of_means_of_drawn_clips() -> None:
    summary = random_summary(200)
    low, high = summary.interval("accuracy")
    values = summary.scores["accuracy"]
    width = 2 * 1.96 * values.std(0) / 200**0.5
    torch.testing.assert_close(high - low, width, rtol=0.15, atol=0)
    assert ((low < values.mean(0)) & (values.mean(0) < high)).all()
    low, high = summary.interval("harmonic_mean")
    mean = summary.mean("harmonic_mean")
    expected = harmonic_mean(*(part.mean(0) for part in summary.scores.values()))
    torch.testing.assert_close(mean, expected, rtol=0, atol=0)
    assert (low <= high).all()


def test_files_say_what_was_measured(tmp_path: Path) -> None:
    summary = random_summary()
    summary.write(tmp_path / "out")
    names = {*summary.scores, "harmonic_mean"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{n}.{kind}" for n in names for kind in ("csv", "png")
    }
    with open(tmp_path / "out" / "accuracy.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12
    low, high = summary.interval("accuracy")
    for line, (row, column) in zip(lines, np.ndindex(3, 4), strict=True):
        assert (int(line["layer"]), float(line["noise level"])) == (summary.layers[row], summary.columns[column])
        assert int(line["clips"]) == 7
        for key, side in (("mean", summary.mean("accuracy")), ("low", low), ("high", high)):
            assert float(line[key]) == pytest.approx(float(side[row, column]), rel=1e-5)
    with Image.open(tmp_path / "out" / "harmonic_mean.png") as picture:
        assert picture.width > 200
    line, column = summary.best("accuracy")
    assert summary.mean("accuracy")[line, column] == summary.mean("accuracy").max()
    assert f"at layer {summary.layers[line]}, noise level {summary.columns[column]:g}" in summary.describe("accuracy")


def make_dataset(folder: Path, images: bool = False) -> Path:
    """Points that stay and points that move, in 480 x 720 pixels."""
    generator = np.random.default_rng(0)
    for name in ("tracks", "visibility", *(["image"] if images else [])):
        (folder / name).mkdir(parents=True)
    (folder / "prompt.txt").write_text("a red dog running\nthe sky on a rock\n")
    for number in range(2):
        start = generator.uniform(50, 400, (1, 1, 6, 2))
        tracks = (start + np.arange(9)[None, :, None, None] * generator.uniform(-3, 3, (1, 1, 6, 2))).astype("f4")
        visible = np.ones((1, 9, 6), bool)
        visible[0, 0, 5] = False
        np.save(folder / "tracks" / f"{number:03d}.npy", tracks)
        np.save(folder / "visibility" / f"{number:03d}.npy", visible)
        if images:
            pixels = generator.integers(0, 256, (48, 80, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "image" / f"{number:03d}.png")
    return folder


CALL: dict[str, Any] = {
    "height": 48,
    "width": 80,
    "num_frames": 9,
    "num_inference_steps": 2,
    "max_sequence_length": tiny_cogvideox.TEXT_LENGTH,
}


def test_a_data_set_is_generated_and_matched(tmp_path: Path) -> None:
    """As by tracing the same runs, with the seed of the data set."""
    folder, pipe = make_dataset(tmp_path / "fg"), tiny_cogvideox.make_pipeline()
    told: list[str] = []
    summary = score_dataset(pipe, folder, call=CALL, layers=[2, 0], tell=told.append)
    assert (summary.layers, summary.columns, summary.clips) == ((0, 2), (0, 1), ("000", "001"))
    assert told == ["1 of 2: 000", "2 of 2: 001"]
    tracks = torch.from_numpy(np.load(folder / "tracks" / "001.npy"))[0].transpose(0, 1)[:5]
    points = torch.cat([torch.zeros(5, 1), tracks[:, 0]], 1)
    with dcm.trace_correspondence(pipe, points, size=(480, 720), num_frames=9, layers=[2]) as traced:
        pipe("the sky on a rock", generator=torch.Generator().manual_seed(42), output_type="latent", **CALL)
    positions = traced.cell(1, 2).matches.positions[0]
    stride, middle = 720 / 5, torch.tensor([0.0, 2.5, 6.5])
    near = 0
    for point in range(5):
        for frame in range(1, 9):
            left = 0 if frame < 2.5 else 1
            share = (frame - middle[left]) / (middle[left + 1] - middle[left])
            place = positions[point, left] * (1 - share) + positions[point, left + 1] * share
            near += int((place - tracks[point, frame]).norm() < stride / 2)
    assert float(summary.scores["accuracy"][1, 1, 1]) == pytest.approx(100 * near / 40)


def test_image_to_video_starts_from_the_image_of_the_data_set(tmp_path: Path) -> None:
    pipe = tiny_cogvideox_variants.make_pipeline(tiny_cogvideox_variants.VARIANTS["image"])
    folder = make_dataset(tmp_path / "fg", images=True)
    given: list[Any] = []
    prepare = pipe.video_processor.preprocess
    pipe.video_processor.preprocess = lambda image, **size: given.append(image) or prepare(image, **size)
    assert score_dataset(pipe, folder, call=CALL, layers=[1], limit=1).clips == ("000",)
    with Image.open(folder / "image" / "000.png") as expected:
        assert np.array_equal(np.asarray(given[0]), np.asarray(expected))


def test_clips_whose_points_are_seen_too_shortly_are_left_out(tmp_path: Path) -> None:
    folder, pipe, told = make_dataset(tmp_path / "fg"), tiny_cogvideox.make_pipeline(), list[str]()
    shortly = np.zeros((1, 9, 6), bool)
    shortly[0, :4] = True  # the first frame, and three of the four of the second frame of tokens
    np.save(folder / "visibility" / "000.npy", shortly)
    assert score_dataset(pipe, folder, call=CALL, layers=[1], tell=told.append).clips == ("001",)
    assert told == ["left out: 000 has no point that is seen in another frame of tokens", "1 of 1: 001"]
    np.save(folder / "visibility" / "001.npy", np.zeros((1, 9, 6), bool))
    with pytest.raises(ConceptMapsValueError, match="^there is no clip to score"):
        score_dataset(pipe, folder, call=CALL)


def test_limit_and_parity(tmp_path: Path) -> None:
    folder, pipe = make_dataset(tmp_path / "fg"), tiny_cogvideox.make_pipeline()
    summary = score_dataset(pipe, folder, call=CALL, limit=1, layers=[1], threshold=200.0, parity="difftrack")
    assert summary.clips == ("000",)
    own = score_dataset(pipe, folder, call=CALL, limit=1, layers=[1], threshold=200.0)
    assert summary.mean("accuracy").tolist() != own.mean("accuracy").tolist()


def test_a_video_with_tracks(tmp_path: Path) -> None:
    """As many frames are used as the model takes."""
    video = torch.rand(11, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    tracks = torch.tensor([[20.0, 11.0], [60.0, 30.0]])[:, None].expand(-1, 11, -1).clone()
    np.savez(tmp_path / "tracks.npz", tracks=tracks.numpy(), visibility=np.ones((2, 11), bool))
    given = read_tracks(tmp_path / "tracks.npz")
    assert torch.equal(given[0], tracks)
    call = {"max_sequence_length": tiny_cogvideox.TEXT_LENGTH}
    summary = score_video(tiny_cogvideox.make_pipeline(), video, given, levels=[0.1, 0.5], call=call, threshold=1.0)
    assert (summary.axis, summary.columns, summary.layers) == ("noise level", (0.1, 0.5), (0, 1, 2))
    assert summary.mean("accuracy_still").unique().tolist() == [100]
    with pytest.raises(ConceptMapsError, match="^the tracks have 11 frames and the video 9; expected as many"):
        score_video(tiny_cogvideox.make_pipeline(), video[:9], given)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tracks": np.zeros((2, 3, 2))}, "has no 'visibility"),
        ({"tracks": np.zeros((2, 3)), "visibility": np.ones((2, 3), bool)}, r"has tracks of float64 \(2, 3\)"),
        ({"tracks": np.zeros((2, 3, 2)), "visibility": np.ones((2, 3))}, r"has visibility of float64 \(2, 3\)"),
        ({"tracks": np.array([None]), "visibility": np.ones((2, 3))}, "cannot read .* as tracks"),
    ],
)
def test_files_that_hold_no_tracks(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "tracks.npz", **arrays)
    with pytest.raises(ConceptMapsError, match=message):
        read_tracks(tmp_path / "tracks.npz")
    with pytest.raises(ConceptMapsError, match="^cannot read .* as tracks"):
        read_tracks(tmp_path / "none.npz")


class TestCommand:
    arguments = ("evaluate", "--suite", "correspondence")

    def test_embedded_model(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        options = ["--limit", "1", "--levels", "0.1", "0.7", "--out", str(tmp_path)]
        assert cli.main([*self.arguments, *options]) == 0
        printed = capsys.readouterr().out
        assert "real: 1 clips, chosen on 1 others" in printed
        assert "  accuracy_shuffled: " in printed
        for kind in ("real", "generated"):
            assert {"accuracy.csv", "accuracy.png", "harmonic_mean.csv"} <= {
                p.name for p in (tmp_path / kind).iterdir()
            }
        with open(tmp_path / "real" / "accuracy.csv", newline="") as file:
            cells = {(line["layer"], line["noise level"]): float(line["mean"]) for line in csv.DictReader(file)}
        assert len(cells) == 10
        assert cells["3", "0.1"] > 80

    def test_data_set_and_video(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = tiny_cogvideox.make_pipeline()
        monkeypatch.setattr(_correspondence, "load_pipeline", lambda *_: (pipe, CALL))
        folder = make_dataset(tmp_path / "fg")
        options = ["--root", str(folder), "--layers", "1", "--out", str(tmp_path / "out"), "--model", "tiny"]
        assert cli.main([*self.arguments, *options, "--difftrack-parity"]) == 0
        assert (tmp_path / "out" / "generated" / "accuracy.csv").is_file()
        frames = [Image.new("RGB", (80, 48), (20 * i, 0, 0)) for i in range(9)]
        frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
        np.savez(tmp_path / "t.npz", tracks=np.full((2, 9, 2), 20.0), visibility=np.ones((2, 9), bool))
        video = ["--video", str(tmp_path / "clip.gif"), "--tracks", str(tmp_path / "t.npz"), "--levels", "0.3"]
        assert cli.main([*self.arguments, *video, "--out", str(tmp_path / "out")]) == 0
        assert (tmp_path / "out" / "video" / "accuracy_still.csv").is_file()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--video", "a.mp4"], "--video and --tracks belong together"),
            (["--video", "a.mp4", "--tracks", "t.npz", "--root", "d"], "--video and --root are two things to score"),
            (["--model", "m"], "--model is there without clips to score it on"),
            (["--layers", "1"], "--layers and --difftrack-parity are for --root and --video"),
        ],
    )
    def test_mistakes(self, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([*self.arguments, *options]) != 0
        assert message in capsys.readouterr().err
