"""What is written in each file format is what a reader of another make finds there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import OpenEXR
import pytest
from exported import GRID, decoded, detail_file, entries, facts, gray_png, manifest, restored, scores
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.visualize.export import ExportSettings, export, ffmpeg
from diffusers_concept_maps.visualize.export._base import Picture
from diffusers_concept_maps.visualize.export.formats import FORMATS

VALUES = scores(2)
LOW, HIGH = (float(extreme) for extreme in (VALUES[:, 0, 0].min(), VALUES[:, 0, 0].max()))
RANGE = (VALUES[:, 0, 0].astype(np.float64) - LOW) / (HIGH - LOW)  # of the first concept `[layer, frame, row, column]`
INFERNO = np.asarray(matplotlib.colormaps["inferno"].colors)


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """Export the first concept by layer, and return the files of its two layers."""

    def make(name: str, **options: Any) -> list[Path]:
        file = detail_file(tmp_path / "maps.safetensors", VALUES, layer=[4, 6])
        folder = tmp_path / "out"
        export(file, folder, ExportSettings(per=["layer"], concepts=["dog"], file_format=name, **options))
        return [folder / entry["path"] for entry in entries(folder)]

    return make


def looked(look: str) -> np.ndarray:
    """The pixels of every layer, float `[layer, frame, height, width, channel]`."""
    colors = INFERNO[np.minimum(RANGE * 256, 255).astype(int)]
    alpha = RANGE[..., None]
    looks = {
        "gray": alpha,
        "color": colors,
        "overlay": np.concatenate([colors, alpha], -1),
        "matte": np.concatenate([np.ones_like(colors), alpha], -1),
    }
    return looks[look]


def test_png_restores_scores_to_a_half_of_a_level(made: Any, tmp_path: Path) -> None:
    for layer, folder in enumerate(made("png")):
        pixels = gray_png(folder)
        assert [file.name for file in sorted(folder.iterdir())] == ["00000.png", "00001.png", "00002.png"]
        error = np.abs(restored(pixels, manifest(tmp_path / "out")["files"][layer]["scale"]) - VALUES[layer, 0, 0])
        assert error.max() <= (HIGH - LOW) / 65535 * 0.5000001


@pytest.mark.parametrize(("look", "pixels"), [("color", "rgb48le"), ("overlay", "rgba64le"), ("matte", "rgba64le")])
@pytest.mark.parametrize("name", ["png", "ffv1"])
def test_lossless_colors_and_alpha(name: str, look: str, pixels: str, made: Any) -> None:
    expected = np.rint(looked(look) * 65535)
    for layer, path in enumerate(made(name, look=look)):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found = np.concatenate([decoded(file, pixels, expected.shape[-1]) for file in files])
        assert np.array_equal(found, expected[layer])


def test_pillow_reads_the_colors_of_png_too(made: Any) -> None:
    with Image.open(sorted(made("png", look="overlay")[1].iterdir())[2]) as picture:
        assert (picture.mode, picture.size) == ("RGBA", (7, 5))
        assert np.abs(np.asarray(picture) / 255 - looked("overlay")[1, 2]).max() < 1 / 255


def test_exr_holds_the_scores_themselves(made: Any) -> None:
    for layer, folder in enumerate(made("exr")):
        for frame, file in enumerate(sorted(folder.iterdir())):
            with OpenEXR.File(str(file)) as read:
                (pixels,) = (channel.pixels for channel in read.channels().values())
                assert list(read.channels()) == ["Y"]
                assert read.header()["framesPerSecond"] == 8
            assert pixels.dtype == np.float32
            assert np.array_equal(pixels, VALUES[layer, 0, 0, frame])


@pytest.mark.parametrize("look", ["color", "overlay", "matte"])
def test_exr_has_alpha_multiplied_in(look: str, made: Any) -> None:
    expected = looked(look).astype(np.float32)
    if expected.shape[-1] == 4:
        expected[..., :3] *= expected[..., 3:]
    for layer, folder in enumerate(made("exr", look=look)):
        for frame, file in enumerate(sorted(folder.iterdir())):
            with OpenEXR.File(str(file)) as read:
                (pixels,) = (channel.pixels for channel in read.channels().values())
            assert np.array_equal(pixels, expected[layer, frame])


def test_ffv1_is_lossless(made: Any) -> None:
    for layer, path in enumerate(made("ffv1", fps=12)):
        known = facts(path)
        assert (known["codec"], known["fps"], known["source_size"]) == ("ffv1", 12, (7, 5))
        assert known["pix_fmt"].startswith("gray16le")
        assert np.array_equal(decoded(path, "gray16le", 1), np.rint(looked("gray")[layer] * 65535))


@pytest.mark.parametrize(
    ("look", "pixels", "stored"),
    [("gray", "gray16le", "yuv444p1"), ("overlay", "rgba64le", "yuva444p1"), ("matte", "rgba64le", "yuva444p1")],
)
def test_prores_is_near(look: str, pixels: str, stored: str, made: Any) -> None:
    """Alpha is compressed without loss in 16 bits, of which ffmpeg keeps 10 on the way in."""
    expected = looked(look)
    for layer, path in enumerate(made("prores", look=look, fps=5, size=(40, 56), smooth=False)):
        known = facts(path)
        assert (known["codec"], known["fps"], known["source_size"]) == ("prores", 5, (56, 40))
        assert known["pix_fmt"].startswith(stored)
        assert "(tv, bt709, progressive)" in known["pix_fmt"]
        large = expected[layer].repeat(8, 1).repeat(8, 2)
        found = decoded(path, pixels, expected.shape[-1]) / 65535
        assert found.shape == large.shape
        assert np.abs(found[..., -1] - large[..., -1]).max() < (0.002 if large.shape[-1] == 4 else 0.02)
        assert np.abs(found - large).mean() < 0.01


@pytest.mark.parametrize(("look", "pixels"), [("gray", "gray16le"), ("color", "rgb48le")])
def test_h264_is_near_and_of_even_size(look: str, pixels: str, made: Any) -> None:
    expected = looked(look)
    for layer, path in enumerate(made("h264", look=look, size=(45, 63), smooth=False)):
        known = facts(path)
        assert (known["codec"], known["fps"], known["source_size"]) == ("h264", 8, (64, 46))
        assert known["pix_fmt"].startswith("yuv420p(tv, bt709, progressive)")
        large = np.pad(expected[layer].repeat(9, 1).repeat(9, 2), ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
        found = decoded(path, pixels, expected.shape[-1]) / 65535
        assert found.shape == large.shape
        assert np.abs(found - large).mean() < (0.01 if look == "gray" else 0.06)  # colors have half the resolution


@pytest.mark.parametrize("name", [name for name, entry in FORMATS.items() if not entry.alpha])
@pytest.mark.parametrize("look", ["overlay", "matte"])
def test_alpha_is_refused_where_there_is_none(name: str, look: str) -> None:
    with pytest.raises(ConceptMapsValueError, match=f"look is '{look}', and {name} has no alpha; .* png, exr, ffv1"):
        ExportSettings(file_format=name, look=look)


@pytest.mark.parametrize("side", [2, 2000])
def test_an_encoder_that_fails_is_told_of(side: int, tmp_path: Path) -> None:
    """At once, through a broken pipe, or at the end."""
    codecs = {1: ("-c:v", "no-such-codec")}

    def write_all() -> None:
        with ffmpeg.open_video(tmp_path / "a.mkv", Picture((side, side), 1, 8), codecs=codecs, even=False) as write:
            for _ in range(20):
                write(np.zeros((side, side, 1)))

    message = f"no video could be written to {re.escape(repr(str(tmp_path)))}: .*no-such-codec"
    with pytest.raises(ConceptMapsError, match=re.compile(message, re.DOTALL)):
        write_all()


def test_an_encoder_ends_with_what_fed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    def write_half() -> None:
        with FORMATS["ffv1"].open(tmp_path / "a.mkv", Picture(GRID[1:], 1, 8)) as write:
            write(np.zeros((*GRID[1:], 1)))
            assert started[0].poll() is None
            raise KeyboardInterrupt

    monkeypatch.setattr(ffmpeg.subprocess, "Popen", Noted)
    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert started[0].returncode is not None


@pytest.mark.parametrize(("name", "module"), [("exr", "OpenEXR"), ("ffv1", "imageio_ffmpeg")])
def test_a_missing_package_is_named_first(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = re.escape('pip install "diffusers-concept-maps[export]"')
    with pytest.raises(ConceptMapsError, match=f"need {module} .*{message}"):
        export(tmp_path / "no-such-file", tmp_path / "out", ExportSettings(file_format=name))
