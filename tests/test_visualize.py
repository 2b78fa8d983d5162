"""Pictures show exactly what they are given: every frame, one scale per clip, nothing half-written."""

from __future__ import annotations

import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.maps import ConceptMap
from diffusers_concept_maps.upsample import upsample_map
from diffusers_concept_maps.visualize.colors import score_labels
from diffusers_concept_maps.visualize.figure import contact_sheet
from diffusers_concept_maps.visualize.overlay import as_pictures, enlarge, overlay
from diffusers_concept_maps.visualize.video import write_image, write_video

FRAMES, HEIGHT, WIDTH = 5, 15, 21


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture
def concept_map() -> torch.Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def read_video(path: Path) -> np.ndarray:
    """Frames of a video file `[frame, height, width, 3]`."""
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_overlay_is_the_blend_of_frame_and_color(pixels: np.ndarray, concept_map: torch.Tensor) -> None:
    opacity = 0.7
    shown = overlay(pixels, concept_map, opacity=opacity)
    scores = concept_map.double().numpy()
    scores = (scores - scores.min()) / (scores.max() - scores.min())
    scores = upsample_map(torch.from_numpy(scores), (HEIGHT, WIDTH), FRAMES).numpy()
    color = colormaps["inferno"](scores)[..., :3]
    alpha = opacity * scores[..., None]
    expected = pixels / 255 * (1 - alpha) + color * alpha
    assert shown.shape == pixels.shape
    np.testing.assert_allclose(shown / 255, expected, atol=1.2 / 255)


def test_one_scale_for_the_whole_clip(pixels: np.ndarray) -> None:
    """A frame in which the concept is absent shows the video alone, however the other frames score."""
    concept_map = torch.zeros(FRAMES, 4, 6)
    concept_map[2] = 10.0
    shown = [np.asarray(picture) for picture in overlay(pixels, concept_map)]
    assert all(np.array_equal(shown[i], pixels[i]) for i in (0, 1, 3, 4))
    assert np.abs(shown[2].astype(int) - pixels[2]).mean() > 20


def test_constant_map_shows_the_video_alone(pixels: np.ndarray) -> None:
    shown = overlay(pixels, torch.full((FRAMES, 4, 6), 3.0))
    assert all(np.array_equal(np.asarray(picture), frame) for picture, frame in zip(shown, pixels, strict=True))


def test_single_image_is_one_frame(pixels: np.ndarray) -> None:
    assert [np.asarray(p).tolist() for p in as_pictures(Image.fromarray(pixels[0]))] == [pixels[0].tolist()]


@pytest.mark.parametrize(
    "frames",
    [
        [],
        ["x"],
        np.zeros((4, 4)),
        np.zeros((0, 4, 4, 3)),
        np.zeros((2, 4, 4, 5)),
        np.zeros((0, 4, 4, 4)),
        torch.zeros(4),
        torch.zeros(2, 5, 4, 3),
        torch.zeros(2, 3, 4, 4, dtype=torch.bool),
    ],
)
def test_other_frames_are_refused(frames: object) -> None:
    with pytest.raises(ConceptMapsValueError, match="^frames are .*; expected"):
        as_pictures(frames)
    with pytest.raises(ConceptMapsValueError, match="^frames are .*; expected"):
        overlay(frames, torch.rand(2, 4, 4))


@pytest.mark.parametrize(
    ("frames", "given"),
    [
        (torch.full((2, 3, 4, 4), -0.5), r"float32 from -0\.5 to -0\.5"),
        (np.full((2, 4, 4, 3), 1.5), r"float64 from 1\.5 to 1\.5"),
        (np.full((2, 4, 4, 3), np.nan), "float64 from nan to nan"),
        (np.full((2, 4, 4, 3), 1), "of type int64; expected uint8"),
    ],
)
def test_values_that_are_no_pixels_are_refused(frames: np.ndarray | torch.Tensor, given: str) -> None:
    """Latents, and integers whose scale is unknown, would give a wrong picture without a word."""
    with pytest.raises(ConceptMapsValueError, match=given):
        as_pictures(frames)


def test_frames_of_different_sizes_are_refused() -> None:
    with pytest.raises(ConceptMapsValueError, match=r"^frame 1 is 8 x 9 pixels .* expected one size"):
        as_pictures([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))])


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(score: float, pixels: np.ndarray, concept_map: torch.Tensor) -> None:
    concept_map[1, 2, 3] = score
    with pytest.raises(ConceptMapsValueError, match="infinite or not a number"):
        overlay(pixels, concept_map)
    with pytest.raises(ConceptMapsValueError, match="infinite or not a number"):
        contact_sheet(pixels, concept_map[None], ["dog"])


def test_wrong_map_and_opacity_are_refused(pixels: np.ndarray, concept_map: torch.Tensor) -> None:
    with pytest.raises(ConceptMapsValueError, match=r"map has shape \(1, 3, 4, 6\)"):
        overlay(pixels, concept_map[None])
    with pytest.raises(ConceptMapsValueError, match=r"opacity is 1\.5"):
        overlay(pixels, concept_map, opacity=1.5)


@pytest.mark.parametrize("index", [-1, 1])
def test_a_map_that_the_batch_has_not_is_refused(index: int, pixels: np.ndarray, concept_map: torch.Tensor) -> None:
    with pytest.raises(ConceptMapsValueError, match=rf"^index is {index}; expected a map of the batch, 0 to 0$"):
        ConceptMap("red", concept_map[None]).overlay(pixels, index=index)


def test_enlarge_repeats_pixels(pixels: np.ndarray) -> None:
    large = enlarge([Image.fromarray(frame) for frame in pixels], 50)
    assert np.array_equal(np.asarray(large[1]), pixels[1].repeat(3, 0).repeat(3, 1))


def test_video_keeps_every_frame_and_pads_odd_sizes(tmp_path: Path) -> None:
    shades = [30, 90, 150, 210]
    write_video(tmp_path / "clip.mp4", [Image.new("RGB", (33, 17), (shade,) * 3) for shade in shades], fps=4)
    video = read_video(tmp_path / "clip.mp4")
    assert video.shape == (4, 18, 34, 3)
    np.testing.assert_allclose(video.mean((1, 2, 3)), shades, atol=4)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_map_to_video(tmp_path: Path, pixels: np.ndarray, concept_map: torch.Tensor) -> None:
    ConceptMap("dog", concept_map[None]).to_video(tmp_path / "dog.mp4", pixels)
    assert read_video(tmp_path / "dog.mp4").shape == (FRAMES, HEIGHT + 1, WIDTH + 1, 3)


def test_failed_writes_leave_the_older_file_alone(tmp_path: Path) -> None:
    """Frames of different sizes and an unknown picture format fail; nothing partial stays behind."""
    for name in ("clip.mp4", "sheet.unknown"):
        (tmp_path / name).write_text("older", encoding="utf-8")
    frames = [Image.new("RGB", (32, 32)), Image.new("RGB", (64, 64))]
    with pytest.raises(ConceptMapsValueError, match=r"frame 1 is 64 x 64.*32 x 32"):
        write_video(tmp_path / "clip.mp4", frames)
    with pytest.raises(ValueError, match="unknown file extension"):
        write_image(tmp_path / "sheet.unknown", frames[0])
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {
        "clip.mp4": "older",
        "sheet.unknown": "older",
    }


def test_encoder_that_fails_midway_leaves_the_older_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: the encoder takes every frame, writes a part and says so only when it ends."""
    encoder = tmp_path / "encoder"
    encoder.write_text(
        '#!/bin/sh\ncat > /dev/null\nfor last; do :; done\necho part > "$last"\necho "No space left" >&2\nexit 1\n'
    )
    encoder.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(encoder))
    clip = tmp_path / "videos" / "clip.mp4"
    clip.parent.mkdir()
    clip.write_text("older", encoding="utf-8")
    with pytest.raises(ConceptMapsError, match="no video could be written to .*videos.*No space left"):
        write_video(clip, [Image.new("RGB", (32, 32))])
    assert [path.name for path in clip.parent.iterdir()] == ["clip.mp4"]
    assert clip.read_text(encoding="utf-8") == "older"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32))
    for write in (
        lambda: write_video(tmp_path / "missing" / "clip.mp4", [picture]),
        lambda: write_image(tmp_path / "missing" / "sheet.png", picture),
    ):
        with pytest.raises(ConceptMapsError, match=r"there is no folder '.*missing'; make it first"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_video_name_is_never_read_as_an_option_or_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-y.mp4", "pipe:1.mp4", "clip_%03d.mp4"):
        write_video(name, [Image.new("RGB", (32, 32))])
        assert read_video(tmp_path / name).shape == (1, 32, 32, 3)


def test_video_without_frames_or_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConceptMapsValueError, match="no frames"):
        write_video(tmp_path / "clip.mp4", [])
    with pytest.raises(ConceptMapsValueError, match=r"clip\.avi' is no name of a video"):
        write_video(tmp_path / "clip.avi", [Image.new("RGB", (32, 32))])


@pytest.mark.parametrize("missing", ["matplotlib", "imageio_ffmpeg"])
def test_missing_extra_is_named(
    missing: str, tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name == missing or name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    pictures = as_pictures(pixels)

    def show() -> None:
        overlay(pictures, torch.rand(FRAMES, 4, 6))

    def sheet() -> None:
        contact_sheet(pictures, torch.rand(1, FRAMES, 4, 6), ["dog"])

    def video() -> None:
        write_video(tmp_path / "clip.mp4", pictures)

    for action in {"matplotlib": (show, sheet), "imageio_ffmpeg": (video,)}[missing]:
        with pytest.raises(ConceptMapsError, match=r'pip install "diffusers-concept-maps\[viz\]"'):
            action()


def _distinct(sheet: Image.Image, color: tuple[int, int, int]) -> int:
    """Pixels of a sheet that have exactly that color."""
    return int((np.asarray(sheet) == np.array(color)).all(-1).sum())


def test_contact_sheet_has_a_row_per_concept_and_one_scale_each() -> None:
    """Each concept has one bright frame; the brightest and darkest colors appear once per row and frame."""
    frames = [Image.new("RGB", (20, 10), (10, 200, 10))] * 4
    maps = torch.zeros(3, 4, 2, 4)
    for concept in range(3):
        maps[concept, concept] = 10.0**concept  # scales differ by a factor of 100
    sheet = contact_sheet(frames, maps, ["one", "two", "three"])
    bright, dark = (colormaps["inferno"](value, bytes=True)[:3] for value in (1.0, 0.0))
    cell = _distinct(sheet, (10, 200, 10)) / 4
    # 3 cells of the highest and 9 of the lowest score, and a little of both in the legends.
    assert _distinct(sheet, tuple(bright)) / cell == pytest.approx(3, abs=0.2)
    assert _distinct(sheet, tuple(dark)) / cell == pytest.approx(9, abs=0.5)


def test_contact_sheet_shows_evenly_spaced_frames_of_a_long_clip() -> None:
    frames = [Image.new("RGB", (8, 8), (0, 10 + 5 * i, 255)) for i in range(33)]
    sheet = contact_sheet(frames, torch.rand(1, 33, 4, 4), ["dog"], columns=5)
    shown = [i for i in range(33) if _distinct(sheet, (0, 10 + 5 * i, 255)) > 100]
    assert shown == [0, 8, 16, 24, 32]


def test_contact_sheet_takes_any_concept_text() -> None:
    """Text is text: no mathematics, no markup, and a long label changes no cell."""
    frames = [Image.new("RGB", (8, 8), (1, 2, 3))] * 2
    plain = contact_sheet(frames, torch.rand(1, 2, 4, 4), ["dog"])
    for text in (r"$\frac{1}{0}$", "<b>&amp;", "word " * 80, "ein Wort\nund noch eins", "$"):
        odd = contact_sheet(frames, torch.rand(1, 2, 4, 4), [text])
        assert odd.size == plain.size
        assert _distinct(odd, (1, 2, 3)) == _distinct(plain, (1, 2, 3))


def test_contact_sheet_title_is_wrapped_and_never_cut() -> None:
    """Every word of a long title has its room: the sheet grows by whole lines, and the right margin stays empty."""
    frames = [Image.new("RGB", (8, 8))] * 3
    short, long = (
        np.asarray(contact_sheet(frames, torch.rand(1, 3, 4, 4), ["dog"], title="word " * count)) for count in (1, 60)
    )
    assert long.shape[1] == short.shape[1]
    grown = long.shape[0] - short.shape[0]
    assert grown > 40
    assert (long[:grown, -5:] == 255).all()
    assert (long[:grown] != 255).any()


def test_contact_sheet_of_a_constant_map_is_flat() -> None:
    """Every cell has the color of the lowest score, the last one too, and the legend shows that color alone."""
    frames = [Image.new("RGB", (20, 10), (10, 200, 10))] * 4
    sheet = contact_sheet(frames, torch.full((1, 4, 2, 4), 0.25), ["dog"])
    is_dark = (np.asarray(sheet) == np.array(colormaps["inferno"](0.0, bytes=True)[:3])).all(-1)
    edges = np.flatnonzero(np.diff(is_dark.any(0).astype(int)))
    widths = edges[1::2] - edges[::2]
    assert len(widths) == 5  # four cells and the legend
    np.testing.assert_allclose(widths[:4], 116, atol=2)
    assert is_dark[:, edges[8] + 1 : edges[9] + 1].sum() > 200


def test_contact_sheet_legend_tells_close_scores_apart() -> None:
    assert score_labels([0.0756, 0.5983]) == ["0.0756", "0.598"]
    assert score_labels([0.33333, 0.33334]) == ["0.33333", "0.33334"]
    assert score_labels([0.25]) == ["0.25"]


def test_contact_sheet_labels_stay_in_their_row() -> None:
    """Also where frames are flat: beside a concept whose name is blank nothing is written."""
    frames = [Image.new("RGB", (200, 20), (10, 200, 10))] * 2
    maps = torch.zeros(3, 2, 2, 20)
    maps[1] = torch.arange(20) / 19
    sheet = contact_sheet(frames, maps, ["a long name " * 9, " ", "a long name " * 9])
    pixels = np.asarray(sheet).astype(int)
    is_bright = (pixels == np.array(colormaps["inferno"](1.0, bytes=True)[:3])).all(-1)
    rows = np.flatnonzero(is_bright[:, : sheet.width * 2 // 3].any(1))
    assert (pixels[rows[0] - 5 : rows[-1] + 5, :140] == 255).all()


def test_contact_sheet_labels_never_cover_a_cell() -> None:
    frames = [Image.new("RGB", (8, 8))] * 2
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, 0] = 1.0  # the cell beside the label
    bright = tuple(colormaps["inferno"](1.0, bytes=True)[:3])
    narrow, wide = (_distinct(contact_sheet(frames, maps, [text]), bright) for text in ("i", "W" * 60))
    assert narrow == wide


def test_contact_sheet_refuses_no_columns() -> None:
    with pytest.raises(ConceptMapsValueError, match="columns is 0; expected at least 1"):
        contact_sheet([Image.new("RGB", (8, 8))] * 3, torch.rand(1, 3, 4, 4), ["dog"], columns=0)


def test_contact_sheet_refuses_more_columns_than_can_be_drawn() -> None:
    frames = np.zeros((501, 2, 2, 3), np.uint8)
    with pytest.raises(ConceptMapsValueError, match="a sheet of 501 columns; expected at most 500"):
        contact_sheet(frames, torch.rand(1, 501, 2, 2), ["dog"], columns=None)


def test_contact_sheet_refuses_other_numbers_of_names() -> None:
    with pytest.raises(ConceptMapsValueError, match=r"maps of shape \(2, 3, 4, 4\) for 1 concepts"):
        contact_sheet([Image.new("RGB", (8, 8))] * 3, torch.rand(2, 3, 4, 4), ["dog"])
