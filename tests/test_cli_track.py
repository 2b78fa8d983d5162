"""`concept-maps track`: the files it writes, the points it takes, and what it says when something is wrong."""

from __future__ import annotations

from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from backbones import tiny_cogvideox
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps import cli
from diffusers_concept_maps.correspondence.output import TrackOutput
from diffusers_concept_maps.media import read_frames
from diffusers_concept_maps.visualize.video import write_video

FRAMES, HEIGHT, WIDTH = 5, 34, 46


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A square that moves over a dark ground, by ten frames a second."""
    path = tmp_path_factory.mktemp("track") / "square.mp4"
    frames = np.full((FRAMES, HEIGHT, WIDTH, 3), 30, np.uint8)
    for index, frame in enumerate(frames):
        frame[8:20, 6 + 4 * index : 18 + 4 * index] = (230, 30, 30)
    write_video(path, [Image.fromarray(frame) for frame in frames], fps=10)
    return str(path)


def test_files_and_table(video: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["track", video, "--points", "0,12,14", "3,40,30.5", "--layers", "3", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"tracks.npz", "tracks.mp4"}
    tracks = TrackOutput.load(out / "tracks.npz")
    expected = dcm.track(dcm.load_shapes_pipeline(), video, [(0, 12, 14), (3, 40, 30.5)], layers=3)
    assert torch.equal(tracks.tracks, expected.tracks)
    assert torch.equal(tracks.visibility, expected.visibility)
    shown = read_frames(str(out / "tracks.mp4"))
    assert shown.frames.shape == (FRAMES, 3, HEIGHT, WIDTH)
    assert shown.fps == 10
    drawn = np.stack([np.asarray(picture) for picture in expected.overlay(read_frames(video).frames)])
    difference = shown.frames.permute(0, 2, 3, 1).numpy() - drawn / 255.0
    assert np.abs(difference).mean() < 0.05
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    place = [f"{value:.1f}" for value in expected.tracks[1, -1].tolist()]
    visible = f"{int(expected.visibility[1].sum())}/{FRAMES}"
    assert lines[2] == ["1", "3", "40.0", "30.5", visible, *place, f"{expected.confidence[1].mean():.3f}"]


def test_points_of_files_and_grids(video: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = np.array([[0, 5, 6.5], [4, 45.0, 33.0]])
    np.save(tmp_path / "p.npy", points)
    lines = "\n".join(",".join(map(str, point)) for point in points)
    (tmp_path / "p.csv").write_text(f"{lines}\n\n", encoding="utf-8")
    (tmp_path / "named.csv").write_text(f"\ufeffframe, x, y\n{lines}\n", encoding="utf-8")
    options = ["--layers", "3", "--out", str(tmp_path / "out")]
    for name in ("p.npy", "p.csv", "named.csv"):
        assert cli.main(["track", video, "--points", str(tmp_path / name), *options]) == 0
        assert torch.equal(TrackOutput.load(tmp_path / "out" / "tracks.npz").points, torch.tensor(points).float())
    assert cli.main(["track", video, "--grid", "6", "--frame", "2", *options, "--max-frames", "3", "--fps", "4"]) == 0
    out = TrackOutput.load(tmp_path / "out" / "tracks.npz")
    assert out.tracks.shape == (36, 3, 2)
    x, y = WIDTH / 12 - 0.5, HEIGHT / 12 - 0.5
    assert out.points[0].tolist() == pytest.approx([2, x, y])
    assert out.points[1].tolist() == pytest.approx([2, x + WIDTH / 6, y])
    assert out.points[-1].tolist() == pytest.approx([2, WIDTH - 1 - x, HEIGHT - 1 - y])
    assert read_frames(str(tmp_path / "out" / "tracks.mp4")).fps == 4
    assert "and 11 more points" in capsys.readouterr().out


def test_options_and_a_model_of_your_own(video: str, tmp_path: Path) -> None:
    tiny_cogvideox.make_pipeline().save_pretrained(tmp_path / "model")
    arguments = ["track", video, "--points", "1,12,14", "--model", str(tmp_path / "model"), "--out", str(tmp_path)]
    given = ["--layers", "0", "2", "--heads", "1", "--noise-level", "0.3", "--add-noise", "--readout", "soft"]
    given += ["--direction", "forward", "--visibility-tokens", "2.5", "--chunk", "4", "--stride", "2", "--contiguous"]
    given += ["--size", "32", "64", "--prompt", "a red rock", "--seed", "3"]
    assert cli.main([*arguments, *given]) == 0
    expected = dcm.track(
        tiny_cogvideox.make_pipeline(),
        video,
        [(1, 12, 14)],
        layers=[0, 2],
        heads=[1],
        noise_level=0.3,
        add_noise=True,
        readout="soft",
        direction="forward",
        visibility_tokens=2.5,
        chunk=4,
        stride=2,
        interleave=False,
        size=(32, 64),
        prompt="a red rock",
        seed=3,
    )
    tracks = TrackOutput.load(tmp_path / "tracks.npz")
    torch.testing.assert_close(tracks.tracks, expected.tracks)
    assert torch.equal(tracks.visibility, expected.visibility)
    count, _ = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "tracks.mp4"))
    assert count == FRAMES


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (["--points", "0,1"], "point '0,1' is no frame,x,y; expected three numbers"),
        (["--points", "0,1,b"], "point '0,1,b' is no frame,x,y"),
        (["--points", "none.csv"], "cannot read points of 'none.csv'"),
        (["--points", "9,1,1"], "whole frame of 0 to 4"),
        (["--grid", "2", "--frame", "7"], "whole frame of 0 to 4"),
        (["--points", "0,1,1", "--parity", "official"], "unknown parity 'official'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    points: list[str], message: str, video: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["track", video, *points, "--layers", "3", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("concept-maps: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_damaged_files_of_points(video: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.npy").write_bytes(b"no array")
    (tmp_path / "p.csv").write_text("0,1,1\n0,1\n", encoding="utf-8")
    for name, message in (("p.npy", "cannot read points of"), ("p.csv", "'0,1' in")):
        assert cli.main(["track", video, "--points", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
