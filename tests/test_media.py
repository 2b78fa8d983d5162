"""Frames from files and from memory, held to the pixels that were written."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps.media import Clip, read_frames

FRAMES, HEIGHT, WIDTH = 7, 20, 32
PIXELS = np.random.default_rng(0).integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
PICTURES = [Image.fromarray(frame) for frame in PIXELS]
SMOOTH = np.stack(
    [
        np.stack(np.broadcast_arrays(8 * y, 7 * np.arange(WIDTH), 120 + 10 * index), -1).astype(np.uint8)
        for index in range(FRAMES)
        for y in [np.arange(HEIGHT)[:, None]]
    ]
)


def expected(pixels: np.ndarray, largest: int = 255) -> torch.Tensor:
    """The definition, in float64."""
    return torch.from_numpy(np.moveaxis(pixels.astype(np.float64) / largest, -1, 1)).float()


def assert_clip(clip: Clip, frames: torch.Tensor, *, fps: float | None = None, is_image: bool = False) -> None:
    assert clip.frames.dtype == torch.float32
    assert torch.equal(clip.frames, frames)
    assert clip.fps == (None if fps is None else pytest.approx(fps, rel=1e-3))
    assert clip.is_image is is_image


def encode(path: Path, pixels: np.ndarray, *codec: str) -> Path:
    frames, height, width, _ = pixels.shape
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "12.5", "-i", "-")
    ffmpeg("-y", *source, *codec, str(path), input=pixels.tobytes())
    return path


def ffmpeg(*options: str, input: bytes | None = None) -> None:
    subprocess.run((imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *options), input=input, check=True)


def test_pixels_in_memory() -> None:
    frames = expected(PIXELS)
    channels_first = np.moveaxis(PIXELS, -1, 1).copy()
    for source in (
        PIXELS,
        PICTURES,
        tuple(PICTURES),
        torch.from_numpy(channels_first),
        frames,
        frames.double(),
        np.moveaxis(frames.numpy(), 1, -1),
        np.moveaxis(frames.double().numpy(), 1, -1).astype(">f8"),
    ):
        assert_clip(read_frames(source), frames)
        assert_clip(read_frames(source, max_frames=3), frames[:3])
    for source in (PIXELS[0], PICTURES[0], torch.from_numpy(channels_first[0]), frames[0].requires_grad_()):
        assert_clip(read_frames(source), frames[:1], is_image=True)
    half = frames.half()
    assert_clip(read_frames(half), half.float())
    assert_clip(read_frames(PIXELS[..., ::-1]), expected(PIXELS[..., ::-1]))
    assert_clip(read_frames(PICTURES[:1]), frames[:1])


def test_an_array_that_cannot_be_written_to() -> None:
    frames = np.frombuffer(PIXELS.tobytes(), np.uint8).reshape(PIXELS.shape)
    clip = read_frames(frames)
    clip.frames.zero_()
    assert np.array_equal(frames, PIXELS)
    floats = PIXELS / np.float32(255)
    read_frames(floats).frames.zero_()
    assert np.array_equal(floats, PIXELS / np.float32(255))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "ppm"])
def test_a_picture_without_loss(tmp_path: Path, suffix: str) -> None:
    PICTURES[0].save(tmp_path / f"a.{suffix}", lossless=True)
    assert_clip(read_frames(tmp_path / f"a.{suffix}"), expected(PIXELS[:1]), is_image=True)
    assert_clip(read_frames(str(tmp_path / f"a.{suffix}"), max_frames=1), expected(PIXELS[:1]), is_image=True)


def test_a_jpeg_is_near(tmp_path: Path) -> None:
    Image.fromarray(SMOOTH[0]).save(tmp_path / "a.jpg", quality=95)
    clip = read_frames(tmp_path / "a.jpg")
    torch.testing.assert_close(clip.frames, expected(SMOOTH[:1]), rtol=0, atol=8 / 255)


TURNS = {  # what an upright picture is to be turned by, of the one that is stored
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    PICTURES[0].save(tmp_path / f"a.{suffix}", exif=exif, lossless=True)
    upright = expected(TURNS[orientation](PIXELS[0])[None].copy())
    assert_clip(read_frames(tmp_path / f"a.{suffix}"), upright, is_image=True)
    with Image.open(tmp_path / f"a.{suffix}") as picture:
        assert_clip(read_frames(picture), upright, is_image=True)


def test_gray_palette_and_transparency(tmp_path: Path) -> None:
    gray = PIXELS[0, ..., 0]
    three = np.repeat(gray[..., None], 3, -1)
    alpha = PIXELS[1, ..., :1]
    palette = PICTURES[0].quantize(32)
    for name, picture, wanted in [
        ("gray", Image.fromarray(gray), three),
        ("bit", Image.fromarray(gray > 99), np.where(three > 99, 255, 0)),
        ("palette", palette, np.asarray(palette.convert("RGB"))),
    ]:
        picture.save(tmp_path / f"{name}.png")
        for source in (tmp_path / f"{name}.png", picture):
            assert_clip(read_frames(source), expected(wanted[None]), is_image=True)
    for color in (PIXELS[0], gray[..., None]):
        picture = Image.fromarray(np.concatenate([color, alpha], -1))
        picture.save(tmp_path / "alpha.png")
        on_white = np.broadcast_to(color * (alpha / 255) + 255 - alpha.astype(float), PIXELS[0].shape)
        for source in (tmp_path / "alpha.png", picture):
            frames = read_frames(source).frames
            torch.testing.assert_close(frames, expected(on_white[None]), rtol=0, atol=0.51 / 255)
    mask = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 32
    palette = Image.fromarray(mask.astype(np.uint8), "P")
    palette.putpalette(np.repeat(np.arange(32), 3).astype(np.uint8).tobytes())
    palette.save(tmp_path / "clear.png", transparency=5)
    wanted = np.repeat(np.where(mask == 5, 255, mask)[..., None], 3, -1)
    assert_clip(read_frames(tmp_path / "clear.png"), expected(wanted[None]), is_image=True)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_kept(tmp_path: Path, suffix: str) -> None:
    gray = np.random.default_rng(1).integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
    gray[0, :2] = 0, 65535
    Image.fromarray(gray).save(tmp_path / f"a.{suffix}")
    wanted = expected(np.repeat(gray[None, ..., None], 3, -1), 65535)
    assert_clip(read_frames(tmp_path / f"a.{suffix}"), wanted, is_image=True)
    assert_clip(read_frames([Image.fromarray(gray), PICTURES[0]]), torch.cat([wanted, expected(PIXELS[:1])]))


def test_a_float_picture(tmp_path: Path) -> None:
    gray = np.random.default_rng(1).random((HEIGHT, WIDTH), dtype=np.float32)
    Image.fromarray(gray).save(tmp_path / "a.tiff")
    assert_clip(read_frames(tmp_path / "a.tiff"), torch.from_numpy(gray).expand(1, 3, -1, -1), is_image=True)
    with pytest.raises(
        dcm.ConceptMapsValueError, match=r"^a picture of mode 'F' has values from .* to .*; expected 0\.\.1"
    ):
        read_frames(Image.fromarray(gray * 255))


@pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
def test_animations(tmp_path: Path, suffix: str) -> None:
    pictures = [picture.quantize(256) for picture in PICTURES] if suffix == "gif" else PICTURES
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    path = tmp_path / f"a.{suffix}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=80, lossless=True)
    assert_clip(read_frames(path), expected(pixels), fps=12.5)
    assert_clip(read_frames(path, max_frames=2), expected(pixels[:2]), fps=12.5)
    durations = [40, 120] * 3 + [80]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, lossless=True)
    assert_clip(read_frames(path), expected(pixels), fps=12.5)


def test_what_shows_without_animation_is_no_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PICTURES[0].save(path, save_all=True, append_images=PICTURES[1:], duration=100, default_image=True)
    assert_clip(read_frames(path), expected(PIXELS[1:]), fps=10)
    assert_clip(read_frames(path, max_frames=2), expected(PIXELS[1:3]), fps=10)


def test_pages_of_a_tiff(tmp_path: Path) -> None:
    PICTURES[0].save(tmp_path / "a.tiff", save_all=True, append_images=PICTURES[1:])
    assert_clip(read_frames(tmp_path / "a.tiff"), expected(PIXELS))


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mkv", ("ffv1", "bgr0")), ("a.avi", ("png", "rgb24")), ("a b%d-é.mov", ("qtrle", "rgb24"))],
)
def test_a_video_without_loss(tmp_path: Path, name: str, codec: tuple[str, str]) -> None:
    path = encode(tmp_path / name, PIXELS, "-c:v", codec[0], "-pix_fmt", codec[1])
    assert_clip(read_frames(path), expected(PIXELS), fps=12.5)
    assert_clip(read_frames(path, max_frames=3), expected(PIXELS[:3]), fps=12.5)


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.mpg"])
def test_a_video_is_near(tmp_path: Path, name: str) -> None:
    codec = ("-q:v", "1", "-r", "25") if name == "a.mpg" else ("-crf", "4", "-pix_fmt", "yuv420p")
    path = encode(tmp_path / name, SMOOTH, *codec)
    clip = read_frames(path)
    pixels = np.repeat(SMOOTH, 2, 0) if name == "a.mpg" else SMOOTH  # MPEG-2 knows a few rates only
    assert clip.fps == pytest.approx(12.5 * len(pixels) / FRAMES)
    assert not clip.is_image
    torch.testing.assert_close(clip.frames, expected(pixels), rtol=0, atol=16 / 255)
    assert float((clip.frames - expected(pixels)).abs().mean()) < 4 / 255


def test_a_turned_video(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mov", PIXELS, "-c:v", "qtrle", "-pix_fmt", "rgb24")
    ffmpeg("-display_rotation", "90", "-i", str(path), "-c", "copy", str(tmp_path / "turned.mov"))
    clip = read_frames(tmp_path / "turned.mov")
    assert_clip(clip, expected(np.rot90(PIXELS, 1, (1, 2)).copy()), fps=12.5)


def test_every_stored_frame_once(tmp_path: Path) -> None:
    """Frames that last differently are neither repeated nor dropped."""
    path = encode(
        tmp_path / "a.mkv", PIXELS, "-vf", "setpts=N*N/TB/10", "-fps_mode", "vfr", "-c:v", "ffv1", "-pix_fmt", "bgr0"
    )
    assert torch.equal(read_frames(path).frames, expected(PIXELS))


def test_a_folder_in_natural_order(tmp_path: Path) -> None:
    for index, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"frame{8 + index}.{('png', 'BMP')[index % 2]}")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".hidden.png").write_text("nor this")
    assert_clip(read_frames(tmp_path), expected(PIXELS))
    (tmp_path / "frame14.png").write_text("broken, and not read")
    assert_clip(read_frames(tmp_path, max_frames=4), expected(PIXELS[:4]))
    with pytest.raises(
        dcm.ConceptMapsError, match=r"frame14\.png' is no picture, as its name says; remove or replace"
    ):
        read_frames(tmp_path)


def test_folders_that_are_no_video(tmp_path: Path) -> None:
    with pytest.raises(
        dcm.ConceptMapsValueError, match=r"^the folder .* holds no picture; expected one file per frame"
    ):
        read_frames(tmp_path)
    PICTURES[0].save(tmp_path / "0.png")
    PICTURES[0].resize((8, 9)).save(tmp_path / "1.png")
    message = r"^frame 1 is 9 x 8 pixels \(height x width\) and the first 20 x 32; expected one size for a video"
    with pytest.raises(dcm.ConceptMapsValueError, match=message):
        read_frames(tmp_path)
    PICTURES[0].save(tmp_path / "1.png", save_all=True, append_images=PICTURES[1:])
    with pytest.raises(dcm.ConceptMapsValueError, match=r"1\.png' holds several frames; expected a folder of single"):
        read_frames(tmp_path)


def test_frames_of_different_sizes() -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match=r"^frame 2 is 5 x 4 pixels"):
        read_frames([PICTURES[0], PICTURES[1], PICTURES[2].resize((4, 5))])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.tiff"])
def test_broken_pictures(tmp_path: Path, name: str) -> None:
    PICTURES[0].save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(dcm.ConceptMapsError, match="^cannot read (the picture )?'.*" + name):
        read_frames(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"hello", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n"])
@pytest.mark.parametrize("name", ["a.mp4", "a.txt", "a.m3u8", "-i"])
def test_files_of_another_kind(tmp_path: Path, name: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(dcm.ConceptMapsError, match=f"^cannot read '{name}' as a picture or a video: "):
        read_frames(name)


def test_a_video_without_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = encode(tmp_path / "a.mkv", PIXELS, "-c:v", "ffv1", "-pix_fmt", "bgr0")
    path.write_bytes(path.read_bytes()[:-3000])
    clip = read_frames(path)
    count = len(clip.frames)
    assert 0 < count < FRAMES
    assert torch.equal(clip.frames[: count - 1], expected(PIXELS[: count - 1]))
    (message,) = caplog.messages
    assert message.endswith(f"{count} frames could be read. If some are missing, encode it anew.")
    assert "a.mkv' is damaged (" in message


def test_sound_is_no_video(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.1", str(tmp_path / "a.wav"))
    with pytest.raises(dcm.ConceptMapsError, match=r"a\.wav' as a picture or a video: it holds no pictures"):
        read_frames(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PIXELS[0, ..., 0], r"an array of shape \(20, 32\); expected \[frame, height, width, 3\], or one frame of it"),
        (np.moveaxis(PIXELS, -1, 1), r"an array of shape \(7, 3, 20, 32\); expected \[frame, height, width, 3\]"),
        (torch.from_numpy(PIXELS), r"a tensor of shape \(7, 20, 32, 3\); expected \[frame, 3, height, width\]"),
        (PIXELS[None], r"an array of shape \(1, 7, 20, 32, 3\); expected"),
        (PIXELS[:0], r"an array of shape \(0, 20, 32, 3\); expected .* with at least one frame and pixel"),
        (torch.zeros(3, 0, 4), r"a tensor of shape \(3, 0, 4\); expected .* with at least one frame and pixel"),
        (PIXELS.astype(np.int64), r"of type int64; expected uint8, or floats in 0\.\.1"),
        (torch.zeros(3, 4, 4, dtype=torch.bool), r"of type torch\.bool; expected uint8"),
        ([], r"list without an item; expected the path of a picture"),
        ([PIXELS[0]], r"list; expected the path of a picture"),
        (None, r"NoneType; expected the path of a picture"),
    ],
)
def test_what_holds_no_frames(source: Any, message: str) -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match="^frames are " + message):
        read_frames(source)


@pytest.mark.parametrize("value", [-0.1, 1.1, 255.0, float("nan"), float("inf")])
def test_values_outside_of_what_a_screen_shows(value: float) -> None:
    frames = torch.full((2, 3, 4, 5), 0.5)
    frames[1, 2, 3, 4] = value
    for source in (frames, frames.permute(0, 2, 3, 1).numpy(), frames[1]):
        with pytest.raises(dcm.ConceptMapsValueError, match=r"^frames are float32 from .* to .*; expected uint8"):
            read_frames(source)


def test_a_missing_file_and_no_frames(tmp_path: Path) -> None:
    with pytest.raises(
        dcm.ConceptMapsValueError, match=r"^there is no file '.*none\.mp4'; expected a picture, a video"
    ):
        read_frames(tmp_path / "none.mp4")
    with pytest.raises(dcm.ConceptMapsValueError, match="^max_frames is 0; expected at least 1, or None for all"):
        read_frames(PIXELS, max_frames=0)
