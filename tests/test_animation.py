"""Files hold every frame they are given, at the rate asked for, with what alpha their format has."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image, ImageSequence

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.maps import ConceptMap
from diffusers_concept_maps.media import read_frames
from diffusers_concept_maps.visualize.animation import durations
from diffusers_concept_maps.visualize.video import write_video

FRAMES, HEIGHT, WIDTH = 7, 15, 21


def noise(channels: int) -> list[Image.Image]:
    """Frames of which the second and the third, and the last two, are equal."""
    pixels = np.random.default_rng(0).integers(0, 256, (FRAMES, HEIGHT, WIDTH, channels), dtype=np.uint8)
    pixels[2], pixels[-1] = pixels[1], pixels[-2]
    return [Image.fromarray(frame) for frame in pixels]


def smooth() -> list[Image.Image]:
    """Frames of one color each, half of them transparent in their left part."""
    pixels = np.zeros((FRAMES, 32, 48, 4), np.uint8)
    pixels[..., 3] = 255
    for index, frame in enumerate(pixels):
        frame[..., :3] = 30 * index, 200 - 20 * index, 90
        frame[:, :16, 3] = 255 * (index % 2)
    return [Image.fromarray(frame) for frame in pixels]


def on_white(frames: list[Image.Image]) -> np.ndarray:
    """Colors `[frame, height, width, 3]` of transparent frames in front of white."""
    rgba = np.stack([np.asarray(frame) for frame in frames]).astype(float)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def stored(path: Path) -> tuple[np.ndarray, list[int]]:
    """RGBA frames of an animation and how many milliseconds each lasts."""
    with Image.open(path) as file:
        frames = [
            (np.asarray(frame.convert("RGBA")), frame.info["duration"]) for frame in ImageSequence.Iterator(file)
        ]
    return np.stack([pixels for pixels, _ in frames]), [duration for _, duration in frames]


def decoded(path: Path, layout: str, channels: int, size: tuple[int, int]) -> np.ndarray:
    """Every stored frame of a video, its alpha decoded as well."""
    decoder = ("-c:v", "libvpx-vp9") if path.suffix == ".webm" else ()
    command = (imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *decoder, "-i", str(path), "-fps_mode", "passthrough")
    done = subprocess.run((*command, "-f", "rawvideo", "-pix_fmt", layout, "-"), capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, *size, channels)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("fps", [8, 30, 24000 / 1001, 0.5])
def test_lossless_webp_has_every_pixel_and_frame(channels: int, fps: float, tmp_path: Path) -> None:
    frames = noise(channels)
    write_video(tmp_path / "clip.webp", frames, fps=fps, lossless=True)
    pixels, times = stored(tmp_path / "clip.webp")
    assert np.array_equal(pixels, np.stack([np.asarray(frame.convert("RGBA")) for frame in frames]))
    assert times == np.diff(np.rint(np.arange(FRAMES + 1) * 1000 / fps)).astype(int).tolist()


def test_webp_is_near_and_smaller(tmp_path: Path) -> None:
    frames = smooth()
    for name, lossless in (("near.webp", False), ("exact.webp", True)):
        write_video(tmp_path / name, frames, fps=12, lossless=lossless)
    pixels, times = stored(tmp_path / "near.webp")
    expected = np.stack([np.asarray(frame) for frame in frames]).astype(float)
    seen = expected[..., 3] > 0
    assert pixels.shape == expected.shape
    assert np.array_equal(pixels[..., 3], expected[..., 3])
    assert np.abs(pixels[seen] - expected[seen]).mean() < 3
    assert sum(times) == round(FRAMES * 1000 / 12)
    write_video(tmp_path / "noise.webp", noise(3))
    write_video(tmp_path / "noise_exact.webp", noise(3), lossless=True)
    assert (tmp_path / "noise.webp").stat().st_size < (tmp_path / "noise_exact.webp").stat().st_size


def test_frames_that_look_alike_stay_apart(tmp_path: Path) -> None:
    for suffix in ("webp", "gif", "mp4", "webm"):
        write_video(tmp_path / f"still.{suffix}", [Image.new("RGB", (16, 16), (90, 20, 20))] * 5, fps=10)
        clip = read_frames(tmp_path / f"still.{suffix}")
        assert len(clip.frames) == 5, suffix
        assert clip.fps == pytest.approx(10), suffix


@pytest.mark.parametrize("fps", [10, 30, 50])
def test_gif(fps: int, tmp_path: Path) -> None:
    frames = smooth()
    write_video(tmp_path / "clip.gif", frames, fps=fps)
    pixels, times = stored(tmp_path / "clip.gif")
    expected = on_white(frames)
    assert pixels.shape == (*expected.shape[:3], 4)
    assert (pixels[..., 3] == 255).all()
    assert np.abs(pixels[..., :3] - expected).max() <= 8
    assert abs(sum(times) - 1000 * FRAMES / fps) <= 10
    with Image.open(tmp_path / "clip.gif") as file:
        assert file.info["loop"] == 0


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
@pytest.mark.parametrize("fps", [8, 0.5, 24000 / 1001, 240])
def test_video_at_any_rate(suffix: str, fps: float, tmp_path: Path) -> None:
    shades = [30, 90, 90, 150, 210]
    file = tmp_path / f"clip.{suffix}"
    write_video(file, [Image.new("RGB", (33, 17), (shade,) * 3) for shade in shades], fps=fps)
    video = decoded(file, "rgb24", 3, (18, 34))
    np.testing.assert_allclose(video.mean((1, 2, 3)), shades, atol=4)
    assert read_frames(file).fps == pytest.approx(fps, abs=0.006)


def test_webm_keeps_alpha_and_mp4_lays_on_white(tmp_path: Path) -> None:
    frames = smooth()
    rgba = np.stack([np.asarray(frame) for frame in frames]).astype(float)
    for name in ("clip.webm", "clip.mp4"):
        write_video(tmp_path / name, frames)
    kept = decoded(tmp_path / "clip.webm", "rgba", 4, (32, 48)).astype(float)
    assert np.abs(kept[..., 3] - rgba[..., 3]).mean() < 4
    assert np.abs(decoded(tmp_path / "clip.mp4", "rgb24", 3, (32, 48)) - on_white(frames)).mean() < 5


def test_durations_do_not_drift() -> None:
    times = list(durations(3000, Fraction(30000, 1001)))
    assert set(times) == {33, 34}
    assert sum(times) == round(3000 * 1001 / 30)


def test_layer_of_a_map_as_webp(tmp_path: Path) -> None:
    """What lies over other footage later: the map's colors, as opaque as its scores."""
    scores = torch.linspace(0, 2, FRAMES)[:, None, None].expand(FRAMES, 4, 6)
    clip = np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.float32)
    options = {"rgba": True, "opacity": 0.5, "colormap": "viridis", "lossless": True}
    ConceptMap("dog", scores[None]).to_video(tmp_path / "dog.webp", clip, fps=5, **options)  # type: ignore[arg-type]
    pixels, times = stored(tmp_path / "dog.webp")
    value = np.linspace(0, 1, FRAMES)
    expected = np.column_stack([colormaps["viridis"](value)[:, :3], 0.5 * value]) * 255
    assert np.abs(pixels - expected[:, None, None]).max() <= 1.01
    assert times == [200] * FRAMES


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip.avi", {}, r"clip\.avi' is no name of a video; let it end in \.mp4 \(or \.webm, \.webp, \.gif\)"),
        ("clip", {}, "is no name of a video"),
        ("clip.mp4", {"lossless": True}, r"lossless=True for .*clip\.mp4'; only a \.webp can be"),
        ("clip.mp4", {"fps": 0}, r"fps is 0; expected 0\.01 to 1000 frames per second in a \.mp4"),
        ("clip.webm", {"fps": float("nan")}, "fps is nan; expected"),
        ("clip.webp", {"fps": 1001}, r"fps is 1001; expected 0\.01 to 1000"),
        ("clip.gif", {"fps": 60}, r"fps is 60; expected 0\.01 to 50 frames per second in a \.gif"),
    ],
)
def test_what_a_format_has_not_is_refused(name: str, options: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConceptMapsValueError, match=message):
        write_video(tmp_path / name, noise(3), **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_frames_too_large_for_webp_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConceptMapsValueError, match=r"16384 x 2 pixels; expected at most 16383 on a side in a WebP"):
        write_video(tmp_path / "clip.webp", [Image.new("RGB", (16384, 2))])


def test_webp_needs_no_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    write_video(tmp_path / "clip.webp", noise(3))
    assert len(stored(tmp_path / "clip.webp")[0]) == FRAMES
    with pytest.raises(ConceptMapsError, match=r"diffusers-concept-maps\[viz\]"):
        write_video(tmp_path / "clip.gif", noise(3))


def test_webp_needs_its_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(ConceptMapsError, match="there is no folder"):
        write_video(tmp_path / "missing" / "clip.webp", noise(3))
    write_video(tmp_path / "clip.webp", noise(3))
    assert [path.name for path in tmp_path.iterdir()] == ["clip.webp"]
