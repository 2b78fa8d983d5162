"""TAP-Vid's files become samples: pixels resized as the benchmark does, coordinates of pixel centers."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.evaluation.tap_vid import TrackSample, read_davis, read_kinetics, read_rgb_stacking

FRAMES, HEIGHT, WIDTH, POINTS = 3, 12, 20, 4


def make_video(seed: int, frames: int = FRAMES) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "video": random.integers(0, 256, (frames, HEIGHT, WIDTH, 3), dtype=np.uint8),
        "points": random.random((POINTS, frames, 2)).astype(np.float32),
        "occluded": random.random((POINTS, frames)) < 0.4,
    }


def jpeg(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=95)
    return file.getvalue()


def decoded(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def write(path: Path, data: Any) -> Path:
    path.write_bytes(pickle.dumps(data))
    return path


def check(sample: TrackSample, name: str, video: dict[str, Any], frames: np.ndarray) -> None:
    """A sample is that of a stored video, whose pixels at the sample's size are `frames`."""
    assert sample.name == name
    assert np.array_equal(sample.frames.permute(0, 2, 3, 1).numpy(), frames)
    assert (sample.frames.dtype, sample.tracks.dtype) == (torch.uint8, torch.float32)
    assert torch.equal(sample.visibility, torch.from_numpy(~video["occluded"]))
    expected = video["points"].astype(np.float64) * [frames.shape[2], frames.shape[1]] - 0.5
    np.testing.assert_allclose(sample.tracks.numpy(), expected, atol=1e-5)


def test_davis(tmp_path: Path) -> None:
    videos = {"goat": make_video(0), "bike": make_video(1, frames=5)}
    samples = list(read_davis(write(tmp_path / "d.pkl", videos), size=None))
    assert len(samples) == 2
    for sample, (name, video) in zip(samples, videos.items(), strict=True):
        check(sample, name, video, video["video"])


def test_rgb_stacking(tmp_path: Path) -> None:
    videos = [make_video(0), make_video(1)]
    samples = list(read_rgb_stacking(write(tmp_path / "r.pkl", videos), size=None))
    for index, (sample, video) in enumerate(zip(samples, videos, strict=True)):
        check(sample, f"rgb_stacking_{index:03d}", video, video["video"])


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_kinetics_in_parts_and_as_jpeg_files(kind: Callable[[Any], Any], tmp_path: Path) -> None:
    videos = [make_video(seed) for seed in range(5)]
    stored: list[dict[str, Any]] = [video | {"video": kind([jpeg(f) for f in video["video"]])} for video in videos]
    stored[1] = videos[1]
    write(tmp_path / "0001_of_0002.pkl", {"abc": stored[3], "def": stored[4]})
    write(tmp_path / "0000_of_0002.pkl", stored[:3])
    write(tmp_path / "other.pkl", "not read")
    names = ["0000_of_0002_000", "0000_of_0002_001", "0000_of_0002_002", "abc", "def"]
    samples = list(read_kinetics(tmp_path, size=None))
    for sample, name, video in zip(samples, names, videos, strict=True):
        pixels = video["video"] if video is videos[1] else np.stack([decoded(jpeg(f)) for f in video["video"]])
        check(sample, name, video, pixels)


def test_gray_jpeg_files_get_three_channels(tmp_path: Path) -> None:
    video = make_video(0, frames=1)
    file = jpeg(video["video"][0, :, :, 0])
    [sample] = read_rgb_stacking(write(tmp_path / "r.pkl", [video | {"video": [file]}]), size=None)
    check(sample, "rgb_stacking_000", video, decoded(file)[None])


@pytest.mark.parametrize("files", [False, True])
def test_resized_as_the_benchmark_does(files: bool, tmp_path: Path) -> None:
    video = make_video(0)
    pixels, stored = video["video"], video
    if files:
        stored = video | {"video": [jpeg(frame) for frame in pixels]}
        pixels = np.stack([decoded(file) for file in stored["video"]])
    path = write(tmp_path / "r.pkl", [stored])
    for options, (height, width) in (({}, (256, 256)), ({"size": (30, 40)}, (30, 40))):
        resized = [Image.fromarray(f).resize((width, height), Image.Resampling.LANCZOS) for f in pixels]
        [sample] = read_rgb_stacking(path, **options)
        check(sample, "rgb_stacking_000", video, np.stack([np.asarray(frame) for frame in resized]))


@pytest.mark.parametrize("size", [None, (2 * HEIGHT, 3 * WIDTH), (256, 256)])
def test_a_point_at_the_center_of_a_pixel_stays_on_its_place(size: tuple[int, int] | None, tmp_path: Path) -> None:
    """Stored at (i + 0.5) / n, hence at i in the frames as stored; in resized ones where their pixels have gone."""
    row, column = 7, 13
    video = make_video(0)
    video["video"][:] = 0
    video["video"][:, row, column] = 255
    video["points"][:] = [(column + 0.5) / WIDTH, (row + 0.5) / HEIGHT]
    [sample] = read_rgb_stacking(write(tmp_path / "r.pkl", [video]), size=size)
    brightness = sample.frames[0, 0].double()
    brightness[brightness < 30] = 0
    ys, xs = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in brightness.shape), indexing="ij")
    center = [float((brightness * axis).sum() / brightness.sum()) for axis in (xs, ys)]
    assert sample.tracks[0, 0].tolist() == pytest.approx(center, abs=0.05)
    if size is None:
        assert sample.tracks[0, 0].tolist() == pytest.approx([column, row], abs=1e-5)


def test_places_of_occluded_points_may_be_unknown(tmp_path: Path) -> None:
    video = make_video(0)
    video["points"][video["occluded"]] = np.nan
    [sample] = read_davis(write(tmp_path / "d.pkl", {"a": video}))
    assert torch.equal(sample.tracks.isfinite().all(-1), sample.visibility)


def test_samples_are_made_one_at_a_time(tmp_path: Path) -> None:
    """What is wrong with the second video does not keep the first from being yielded."""
    path = write(tmp_path / "d.pkl", {"a": make_video(0), "b": {}})
    samples = read_davis(path)
    assert next(samples).name == "a"
    with pytest.raises(ConceptMapsError, match="video 'b' is a dict of nothing"):
        next(samples)


def read_first(reader: Callable[..., Iterator[TrackSample]], path: Path, **options: Any) -> None:
    next(reader(path, **options))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"points": np.zeros((4, 3))}, r"points are float64 of shape \(4, 3\); expected floats \[point, frame, 2\]"),
        ({"points": np.zeros((4, 3, 2), int)}, "points are int64 of shape"),
        ({"points": [1, 2]}, "points are list of 2; expected floats"),
        ({"points": np.full((4, 3, 2), np.nan)}, r"a visible point is nowhere \(not finite\)"),
        ({"occluded": np.zeros((4, 3))}, r"occluded is float64 of shape \(4, 3\); expected bool \(4, 3\), as points"),
        ({"occluded": np.zeros((3, 4), bool)}, r"occluded is bool of shape \(3, 4\); expected bool \(4, 3\)"),
        ({"occluded": None}, "occluded is NoneType; expected bool"),
        ({"video": np.zeros((3, 8, 8), np.uint8)}, r"video is uint8 of shape \(3, 8, 8\); expected uint8 \[frame"),
        ({"video": np.zeros((3, 8, 8, 3))}, r"video is float64 of shape \(3, 8, 8, 3\); expected uint8 \[frame"),
        ({"video": np.zeros((0, 8, 8, 3), np.uint8)}, r"video is uint8 of shape \(0, 8, 8, 3\); expected"),
        ({"video": []}, "video is list of 0; expected uint8"),
        ({"video": ["a", "b", "c"]}, "video is list of 3; expected uint8 .* or a JPEG file per frame"),
        ({"video": [b"a", b"b", b"c"]}, "frame 0 is no JPEG file"),
        ({"video": np.zeros((2, 8, 8, 3), np.uint8)}, "2 frames, and tracks of 3; expected as many"),
    ],
)
def test_damaged_videos_are_named(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "d.pkl", {"goat": make_video(0) | changed})
    with pytest.raises(ConceptMapsError, match=rf"d\.pkl', video 'goat': {message}"):
        read_first(read_davis, path)


def test_damaged_jpeg_files_are_named(tmp_path: Path) -> None:
    video = make_video(0)
    files = [jpeg(frame) for frame in video["video"]]
    cut = [files[0], files[1][: len(files[1]) // 2], files[2]]
    with pytest.raises(ConceptMapsError, match="video 'a': frame 1 is no JPEG file"):
        read_first(read_davis, write(tmp_path / "d.pkl", {"a": video | {"video": cut}}))
    sizes = [files[0], jpeg(video["video"][1, 1:]), files[2]]
    path = write(tmp_path / "d.pkl", {"a": video | {"video": sizes}})
    for size in (None, (256, 256)):
        with pytest.raises(ConceptMapsError, match="video 'a': frame 1 is not of the first one's size"):
            read_first(read_davis, path, size=size)


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    videos = [make_video(0)]
    message = r"d\.pkl' holds list of 1; expected a dict of videos, at least one"
    with pytest.raises(ConceptMapsError, match=message):
        read_first(read_davis, write(tmp_path / "d.pkl", videos))
    message = r"r\.pkl' holds a dict of a; expected a list of videos"
    with pytest.raises(ConceptMapsError, match=message):
        read_first(read_rgb_stacking, write(tmp_path / "r.pkl", {"a": videos[0]}))
    with pytest.raises(ConceptMapsError, match=r"holds list of 0; expected a list of videos"):
        read_first(read_rgb_stacking, write(tmp_path / "r.pkl", []))
    with pytest.raises(ConceptMapsError, match=r"video 'rgb_stacking_000' is str; expected a dict of video, points"):
        read_first(read_rgb_stacking, write(tmp_path / "r.pkl", ["a"]))
    (tmp_path / "d.pkl").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(ConceptMapsError, match=r"holds the global posix.system"):
        read_first(read_davis, tmp_path / "d.pkl")


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConceptMapsError, match="has no file such as 0000_of_0010.pkl; expected what TAP-Vid's"):
        read_first(read_kinetics, tmp_path)
    for number in (0, 1, 3):
        write(tmp_path / f"{number:04}_of_0010.pkl", [make_video(0)])
    with pytest.raises(
        ConceptMapsError, match="lacks 0002_of_0010.pkl; expected every part of one run, without a gap"
    ):
        read_first(read_kinetics, tmp_path)


@pytest.mark.parametrize("size", [(0, 256), (256, -1)])
def test_a_size_below_one_pixel_is_refused(size: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(
        ConceptMapsValueError, match=r"size is \(.*\); expected height and width of at least one pixel"
    ):
        read_first(read_davis, tmp_path / "none.pkl", size=size)
