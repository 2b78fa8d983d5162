"""DiffTrack's folders become samples, each with the prompt of its number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.evaluation.difftrack_dataset import read_difftrack

FRAMES, POINTS, PROMPTS = 5, 7, 4


def content(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(number)
    tracks = (random.random((1, FRAMES, POINTS, 2)) * 720).astype(np.float32)
    return tracks, random.random((1, FRAMES, POINTS)) < 0.5, random.integers(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As published, with tracks for all prompts but the last."""
    for name in ("tracks", "visibility", "image"):
        (tmp_path / name).mkdir()
    (tmp_path / "prompt.txt").write_text("".join(f"prompt {i} \N{BULLET}\n" for i in range(PROMPTS)), encoding="utf-8")
    for number in range(PROMPTS - 1):
        tracks, visibility, image = content(number)
        np.save(tmp_path / "tracks" / f"{number:03d}.npy", tracks)
        np.save(tmp_path / "visibility" / f"{number:03d}.npy", visibility)
        Image.fromarray(image).save(tmp_path / "image" / f"{number:03d}.png")
    return tmp_path


def check(folder: Path, numbers: list[int], *, images: bool) -> None:
    samples = list(read_difftrack(folder))
    assert [sample.name for sample in samples] == [f"{number:03d}" for number in numbers]
    for sample, number in zip(samples, numbers, strict=True):
        tracks, visibility, image = content(number)
        assert sample.prompt == f"prompt {number} \N{BULLET}"
        assert (sample.tracks.dtype, sample.visibility.dtype) == (torch.float32, torch.bool)
        assert np.array_equal(sample.tracks.numpy(), np.stack([tracks[0, :, point] for point in range(POINTS)]))
        assert np.array_equal(sample.visibility.numpy(), np.stack([visibility[0, :, p] for p in range(POINTS)]))
        assert (sample.image is not None) == images
        if sample.image is not None:
            assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), image)


def test_samples_with_images_and_fewer_tracks_than_prompts(folder: Path) -> None:
    check(folder, [0, 1, 2], images=True)


def test_samples_without_images_and_with_a_gap(folder: Path) -> None:
    for path in (folder / "image").iterdir():
        path.unlink()
    (folder / "image").rmdir()
    (folder / "tracks" / "001.npy").unlink()
    (folder / "tracks" / "notes.npy").touch()
    check(folder, [0, 2], images=False)


def save(name: str, array: Any) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / name, array)


def put(name: str, content: bytes | None) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink() if content is None else (folder / name).write_bytes(content)


FIRST, SEEN = content(0)[:2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (put("prompt.txt", None), r"cannot read the prompts '.*prompt\.txt': .*No such file"),
        (put("prompt.txt", b"\xff\xfe\xff"), r"cannot read the prompts '.*prompt\.txt': .*decode"),
        (
            put("prompt.txt", b"one\ntwo\n"),
            r"002\.npy' has no prompt: '.*prompt\.txt' has 2 lines; expected",
        ),
        (put("prompt.txt", b"\ntwo\nthree\n"), r"000\.npy' has no prompt: '.*prompt\.txt' has 3 lines"),
        (put("visibility/001.npy", None), r"cannot read '.*visibility.001\.npy' as an array: .*No such file"),
        (put("tracks/000.npy", b""), r"cannot read '.*tracks.000\.npy' as an array"),
        (put("tracks/000.npy", b"not numpy's"), r"cannot read '.*tracks.000\.npy' as an array"),
        (save("tracks/000.npy", np.array([print], object)), "as an array: Object arrays cannot be loaded"),
        (save("tracks/000.npy", FIRST[0]), r"is float32 of shape \(5, 7, 2\); expected floats \[1, frame, point, 2\]"),
        (save("tracks/000.npy", FIRST.repeat(2, 0)), r"is float32 of shape \(2, 5, 7, 2\); expected floats"),
        (save("tracks/000.npy", FIRST.astype(int)), r"is int64 of shape \(1, 5, 7, 2\); expected floats"),
        (save("tracks/000.npy", FIRST * np.nan), r"000\.npy' has a visible point that is nowhere"),
        (save("visibility/000.npy", SEEN[:, 1:]), r"is bool of shape \(1, 4, 7\); expected bool of shape \(1, 5, 7\)"),
        (save("visibility/000.npy", SEEN.astype(np.float32)), r"is float32 of shape \(1, 5, 7\); expected bool"),
        (put("image/002.png", None), r"cannot read '.*image.002\.png' as a picture: .*No such file"),
        (put("image/002.png", b"no picture"), r"cannot read '.*image.002\.png' as a picture: cannot identify"),
    ],
)
def test_what_is_missing_or_damaged_is_named(damage: Callable[[Path], None], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ConceptMapsError, match=message):
        list(read_difftrack(folder))


def test_a_folder_without_tracks_is_named(folder: Path) -> None:
    for path in (folder / "tracks").iterdir():
        path.unlink()
    with pytest.raises(ConceptMapsError, match="has no tracks/000.npy; expected a folder <model>/<fg or bg>"):
        list(read_difftrack(folder))


def test_unknown_places_of_hidden_points_are_kept(folder: Path) -> None:
    np.save(folder / "tracks" / "000.npy", np.where(SEEN[..., None], FIRST, np.nan))
    sample = next(read_difftrack(folder))
    assert torch.equal(sample.tracks.isfinite().all(-1), sample.visibility)
