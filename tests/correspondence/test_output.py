"""Tracks come back from a file as they were, whole or not at all, and are drawn as `draw_tracks` does."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from diffusers.utils import BaseOutput

from diffusers_concept_maps.correspondence.output import TrackOutput
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.visualize.trails import draw_tracks

POINTS, FRAMES = 3, 4


def make(points: int = POINTS, frames: int = FRAMES) -> TrackOutput:
    generator = torch.Generator().manual_seed(0)
    return TrackOutput(
        tracks=torch.rand(points, frames, 2, generator=generator) * 30,
        visibility=torch.rand(points, frames, generator=generator) < 0.5,
        confidence=torch.rand(points, frames, generator=generator),
        points=torch.rand(points, 3, generator=generator),
        metadata={"layer": 17, "steps": [49], "model": "\N{BULLET} tiny", "nested": {"a": None, "b": 0.5}},
    )


def same(one: TrackOutput, other: TrackOutput) -> bool:
    names = ("tracks", "visibility", "confidence", "points")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs) and one.metadata == other.metadata


@pytest.mark.parametrize(("points", "frames"), [(POINTS, FRAMES), (1, 1), (0, 7)])
@pytest.mark.parametrize("name", ["tracks.npz", "tracks", "tracks.v1.dat"])
def test_a_file_holds_what_was_saved(points: int, frames: int, name: str, tmp_path: Path) -> None:
    output = make(points, frames)
    output.save(tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    assert same(TrackOutput.load(tmp_path / name), output)
    assert same(TrackOutput.load(str(tmp_path / name)), output)


def test_numpy_alone_reads_the_file(tmp_path: Path) -> None:
    output = make()
    output.save(tmp_path / "tracks.npz")
    with np.load(tmp_path / "tracks.npz", allow_pickle=False) as file:
        assert np.array_equal(file["tracks"], output.tracks.numpy())
        assert np.array_equal(file["visibility"], output.visibility.numpy())


def test_an_output_is_one_of_diffusers() -> None:
    output = make()
    assert isinstance(output, BaseOutput)
    assert output["tracks"] is output.tracks is output[0]
    assert [id(value) for value in output.to_tuple()[:2]] == [id(output.tracks), id(output.visibility)]
    assert same(pickle.loads(pickle.dumps(output)), output)


def test_a_file_that_cannot_be_written_leaves_the_older_one(tmp_path: Path) -> None:
    output = make()
    output.save(tmp_path / "tracks.npz")
    wrong = make()
    wrong.metadata = {"model": object()}
    with pytest.raises(ConceptMapsValueError, match=r"are no JSON \(.*object.*\); expected numbers, strings"):
        wrong.save(tmp_path / "tracks.npz")
    wrong.metadata = {"model": float("nan")}
    with pytest.raises(ConceptMapsValueError, match="are no JSON"):
        wrong.save(tmp_path / "tracks.npz")
    assert os.listdir(tmp_path) == ["tracks.npz"]
    assert same(TrackOutput.load(tmp_path / "tracks.npz"), output)
    with pytest.raises(ConceptMapsError, match="because there is no folder"):
        output.save(tmp_path / "none" / "tracks.npz")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("tracks", torch.zeros(3, 4, 3), r"tracks is torch.float32 of shape \(3, 4, 3\); expected .*\(3, 4, 2\)"),
        ("tracks", torch.zeros(3, 4, 2).double(), "tracks is torch.float64 of shape .* expected torch.float32"),
        ("tracks", torch.tensor(0.0), r"tracks is torch.float32 of shape \(\); expected"),
        ("visibility", torch.ones(3, 5).bool(), r"visibility is torch.bool of shape \(3, 5\); .* shape \(3, 4\)"),
        ("visibility", torch.ones(3, 4), "visibility is torch.float32 .* expected torch.bool"),
        ("confidence", torch.ones(4, 3), r"confidence is torch.float32 of shape \(4, 3\)"),
        ("points", torch.ones(3, 2), r"points is torch.float32 of shape \(3, 2\); expected .* \(3, 3\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, tensor: torch.Tensor, message: str, tmp_path: Path) -> None:
    output = make()
    output.save(tmp_path / "good.npz")
    output[name] = tensor
    with pytest.raises(ConceptMapsValueError, match=message):
        output.save(tmp_path / "tracks.npz")
    assert os.listdir(tmp_path) == ["good.npz"]
    with pytest.raises(ConceptMapsError, match=rf"bad.npz' as tracks: {message}"):
        TrackOutput.load(changed(tmp_path, {name: tensor.numpy()}))


def changed(folder: Path, members: dict[str, Any], *, without: str = "") -> Path:
    """A file with some arrays replaced."""
    with np.load(folder / "good.npz") as file:
        arrays = {name: file[name] for name in file.files if name != without}
    with open(folder / "bad.npz", "wb") as file:
        np.savez(file, **arrays | members)
    return folder / "bad.npz"


def test_files_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    make().save(tmp_path / "good.npz")
    with pytest.raises(ConceptMapsError, match=r"has format 'x/9'; this version reads 'diffusers_"):
        TrackOutput.load(changed(tmp_path, {"format": np.array("x/9")}))
    with pytest.raises(ConceptMapsError, match=r"bad.npz' holds no tracks \(.*confidence\.npy.*\); expected a"):
        TrackOutput.load(changed(tmp_path, {}, without="confidence"))
    for damaged in ("{", "[1]", "3"):
        with pytest.raises(ConceptMapsError, match="cannot read '.*bad.npz' as tracks: "):
            TrackOutput.load(changed(tmp_path, {"metadata": np.array(damaged)}))
    with pytest.raises(ConceptMapsError, match="cannot read '.*none.npz' as tracks: .*No such file"):
        TrackOutput.load(tmp_path / "none.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ConceptMapsError, match="cannot read '.*array.npy' as tracks: File is not a zip file"):
        TrackOutput.load(tmp_path / "array.npy")


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    make().save(tmp_path / "good.npz")
    path = changed(tmp_path, {"tracks": np.array([Bomb(tmp_path / "made")], dtype=object)})
    with pytest.raises(ConceptMapsError, match="Object arrays cannot be loaded when allow_pickle=False"):
        TrackOutput.load(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("at", [0.02, 0.3, 0.6])
def test_damaged_files_are_named(at: float, tmp_path: Path) -> None:
    make(200, 50).save(tmp_path / "good.npz")
    data = bytearray((tmp_path / "good.npz").read_bytes())
    cut = io.BytesIO(data[: int(at * len(data))])
    assert not zipfile.is_zipfile(cut)
    (tmp_path / "cut.npz").write_bytes(cut.getvalue())
    start = int(at * len(data))
    data[start : start + 64] = bytes(64)
    (tmp_path / "flipped.npz").write_bytes(data)
    for name in ("cut", "flipped"):
        with pytest.raises(ConceptMapsError, match=rf"cannot read '.*{name}\.npz' as tracks: "):
            TrackOutput.load(tmp_path / f"{name}.npz")


def test_overlay_and_video_show_the_tracks(tmp_path: Path) -> None:
    output = make()
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES, 20, 32, 3), dtype=np.uint8)
    for options in ({}, {"trail": 2, "radius": 3.5}):
        expected = draw_tracks(frames, output.tracks, output.visibility, **options)  # type: ignore[arg-type]
        found = output.overlay(frames, **options)  # type: ignore[arg-type]
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(found, expected, strict=True))
    gray = np.full((FRAMES, 160, 160, 3), 128, np.uint8)
    output.tracks *= 5
    output.to_video(tmp_path / "tracks.mp4", gray, radius=12, trail=2, fps=5)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "tracks.mp4"))
    meta = next(reader)
    assert (meta["size"], meta["fps"]) == ((160, 160), 5)
    video = np.stack([np.frombuffer(frame, np.uint8).reshape(160, 160, 3) for frame in reader]).astype(float)
    expected = np.stack([np.asarray(picture) for picture in output.overlay(gray, radius=12, trail=2)]).astype(float)
    assert video.shape == expected.shape
    assert np.abs(video - expected).mean() < 4 < np.abs(expected - 128).mean()
