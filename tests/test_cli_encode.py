"""`concept-maps encode`: files that a user may have, what is written and what is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from backbones import tiny_cogvideox
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps import cli
from diffusers_concept_maps.commands import encode as command
from diffusers_concept_maps.media import read_frames
from diffusers_concept_maps.visualize.frames import as_pictures
from diffusers_concept_maps.visualize.video import write_video

CONCEPTS = ["red", "blue"]
CAPTION = "a red circle moving right and a blue square moving left"


def pictures(frames: int, height: int = 33, width: int = 46) -> list[Image.Image]:
    """A red block that goes to the right, and a blue one that stays."""
    made = []
    for frame in range(frames):
        pixels = np.full((height, width, 3), 24, np.uint8)
        pixels[6:16, 3 + 4 * frame : 13 + 4 * frame] = (235, 30, 30)
        pixels[20:30, 30:40] = (38, 76, 247)
        made.append(Image.fromarray(pixels))
    return made


def make_file(folder: Path, kind: str, frames: int = 6) -> Path:
    path, made = folder / f"clip.{kind}", pictures(frames)
    if kind == "mp4":
        write_video(path, made, fps=5)
    elif kind == "gif":
        made[0].save(path, save_all=True, append_images=made[1:], duration=250)
    else:
        made[0].save(path)
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("kind", "size", "fps"), [("mp4", (34, 46), 5), ("gif", (33, 46), 4), ("png", (33, 46), None)]
)
def test_what_is_written(kind: str, size: tuple[int, int], fps: int | None, tmp_path: Path) -> None:
    """MP4 has an even number of rows and columns."""
    file, out = make_file(tmp_path, kind), tmp_path / "out"
    arguments = [str(file), "--concepts", *CONCEPTS, "--prompt", CAPTION]
    assert cli.main(["encode", *arguments, "--out", str(out)]) == 0
    suffix = "png" if kind == "png" else "mp4"
    overlays = [f"overlay_{index}_{concept}.{suffix}" for index, concept in enumerate(CONCEPTS)]
    assert names(out) == {"contact_sheet.png", "maps.safetensors", *overlays}
    frames, maps = read_frames(file).frames, dcm.load(out / "maps.safetensors")
    expected = dcm.encode(dcm.load_shapes_pipeline(), file, CONCEPTS, prompt=CAPTION)
    assert torch.equal(maps.get(), expected.get())
    assert maps.metadata == expected.metadata
    assert maps.upsample().shape == (1, 2, len(frames), *size)
    for concept, name in zip(CONCEPTS, overlays, strict=True):
        shown = read_frames(out / name)
        assert shown.frames.shape == (len(frames), 3, size[0] + size[0] % (1 if kind == "png" else 2), size[1])
        assert shown.fps == fps
        overlay = torch.stack([_tensor(picture) for picture in maps[concept].overlay(as_pictures(frames))])
        assert (shown.frames[:, :, : size[0]] - overlay).abs().mean() < (1e-6 if kind == "png" else 0.03)


def _tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = make_file(tmp_path, "gif", frames=7), tmp_path / "out"
    methods = ["cross_attention", "imap"]
    assert cli.main(["encode", str(file), "--concepts", *CONCEPTS, "--methods", *methods, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    fitted = "7 frames of 33 x 46 pixels (height x width), cut to the first 6, scaled to 24 x 32"
    assert lines[0] == f"{file}: {fitted}"
    maps = dcm.load(out / "maps.safetensors")
    for method in methods:
        for index, concept in enumerate(CONCEPTS):
            (line,) = [line.split() for line in lines if line.split()[:2] == [concept, method]]
            scores = maps.get(method)[0, index]
            for value, shown in zip((scores.min(), scores.mean(), scores.max()), line[2:5], strict=True):
                assert float(shown) == pytest.approx(float(value), abs=6e-4)
            assert line[6:] == ([f"overlay_{index}_{concept}.mp4"] if method == methods[0] else [])
    assert lines[-1] == f"written to {out}: overlays, contact_sheet.png, maps.safetensors"


def test_only_frames_that_the_model_has_seen_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip that was padded is shown at its own length, one that was cut at the length that is left."""
    from diffusers_concept_maps.visualize import figure

    tiny_cogvideox.make_pipeline().save_pretrained(tmp_path / "model")
    sheets: list[tuple[Any, torch.Tensor]] = []
    stock = figure.contact_sheet

    def contact_sheet(frames: Any, maps: torch.Tensor, *arguments: Any, **options: Any) -> Image.Image:
        sheets.append((frames, maps))
        return stock(frames, maps, *arguments, **options)

    monkeypatch.setattr(figure, "contact_sheet", contact_sheet)
    for frames, seen, tokens in ((6, 6, [0, 1, 1, 1, 1, 2]), (8, 5, [0, 1, 1, 1, 1])):
        file, out = make_file(tmp_path, "gif", frames), tmp_path / f"out {frames}"
        limit = [] if seen == frames else ["--num-frames", "7"]
        arguments = [str(file), "--concepts", "dog", "--model", str(tmp_path / "model"), *limit, "--size", "32", "48"]
        assert cli.main(["encode", *arguments, "--out", str(out)]) == 0
        count, _ = imageio_ffmpeg.count_frames_and_secs(str(out / "overlay_0_dog.mp4"))
        assert count == seen
        shown, spread = sheets.pop()
        assert len(shown) == seen
        maps = dcm.load(out / "maps.safetensors")
        assert torch.equal(spread, maps.get()[0][:, tokens])


def test_options_are_passed_on(tmp_path: Path) -> None:
    file, out = make_file(tmp_path, "mp4"), tmp_path / "out"
    given = {
        "--noise-level": ["0.2", "0.7"],
        "--layers": ["1", "3"],
        "--size": ["24", "32"],
        "--num-frames": ["4"],
        "--num-samples": ["2"],
        "--seed": ["9"],
        "--methods": ["gramcol"],
        "--fps": ["3"],
    }
    options = [text for name, values in given.items() for text in (name, *values)]
    assert cli.main(["encode", str(file), "--concepts", *CONCEPTS, *options, "--out", str(out)]) == 0
    expected = dcm.encode(
        dcm.load_shapes_pipeline(),
        file,
        CONCEPTS,
        noise_level=(0.2, 0.7),
        layers=[1, 3],
        size=(24, 32),
        num_frames=4,
        num_samples=2,
        seed=9,
        methods=["gramcol"],
    )
    maps = dcm.load(out / "maps.safetensors")
    assert maps.methods == ("gramcol",)
    assert torch.equal(maps.get(), expected.get())
    assert read_frames(out / "overlay_0_red.mp4").fps == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--noise-level", "2"], "noise_level is 2.0; expected a fraction of the training schedule in (0, 1]"),
        (["--size", "30", "32"], "size (30, 32) (height, width) is not what the model takes"),
        (["--layers", "99"], "99"),
        (["--model", "./no/such/folder"], "no/such/folder"),
        (["--concepts", "dog"], "concept 'dog' has no word that the tokenizer knows"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make_file(tmp_path, "png")
    assert cli.main(["encode", str(file), "--concepts", "red", *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("concept-maps: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_long_video_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that the model does not see cost no memory, and the fit still tells how many there are."""
    from diffusers_concept_maps import encoding, media

    read: list[int] = []

    def counted(source: Any, *, max_frames: int | None = None) -> media.Clip:
        clip = read_frames(source, max_frames=max_frames)
        read.append(len(clip.frames))
        return clip

    monkeypatch.setattr(media, "read_frames", counted)
    monkeypatch.setattr(encoding, "read_frames", counted)
    file, out = make_file(tmp_path, "mp4", frames=40), tmp_path / "out"
    assert cli.main(["encode", str(file), "--concepts", "red", "--out", str(out)]) == 0
    assert read == [1, 6, 6]
    fit = dcm.load(out / "maps.safetensors").fit
    assert fit is not None
    assert fit.source == (40, 34, 46)
    assert len(read_frames(out / "overlay_0_red.mp4").frames) == 6


def test_a_file_that_cannot_be_read_costs_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*arguments: Any) -> None:
        raise AssertionError("the pipeline is loaded")

    monkeypatch.setattr(command, "load_pipeline", load)
    (tmp_path / "text.mp4").write_text("no video", encoding="utf-8")
    for name, message in {"missing.mp4": "there is no file", "text.mp4": "as a picture or a video"}.items():
        assert cli.main(["encode", str(tmp_path / name), "--concepts", "red", "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert names(tmp_path) == {"text.mp4"}


def test_arguments_that_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (([], "required: FILE, --concepts"), (["a.mp4"], "required: --concepts")):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["encode", *arguments])
        assert message in capsys.readouterr().err
