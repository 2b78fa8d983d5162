"""The command line: what it writes, what it prints, and what it says when something is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest
import torch
from backbones import tiny_cogvideox
from PIL import Image
from safetensors.torch import save_file

import diffusers_concept_maps as dcm
from diffusers_concept_maps import cli
from diffusers_concept_maps.commands import _common, generate, load_commands
from diffusers_concept_maps.maps import StoredMaps
from diffusers_concept_maps.shapes.captions import TEXT_LENGTH
from diffusers_concept_maps.shapes.model import GUIDANCE_SCALE
from diffusers_concept_maps.visualize import figure

FILES = {"video.mp4", "contact_sheet.png", "maps.safetensors"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes without any argument but the number of steps."""
    out = tmp_path_factory.mktemp("cli") / "demo"
    assert cli.main(["generate", "--steps", "2", "--out", str(out)]) == 0
    return out


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_default_run_writes_every_file(folder: Path) -> None:
    overlays = {f"overlay_{i}_{concept}.mp4" for i, concept in enumerate(generate.DEFAULT_CONCEPTS)}
    assert names(folder) == FILES | overlays
    for name in ("video.mp4", *overlays):
        count, _ = imageio_ffmpeg.count_frames_and_secs(str(folder / name))
        assert count == 6
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.width > 600


def test_default_maps_are_those_of_trace(folder: Path) -> None:
    pipe = dcm.load_shapes_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with dcm.trace(pipe, generate.DEFAULT_CONCEPTS) as expected:
        pipe(
            generate.DEFAULT_PROMPT,
            generator=torch.Generator().manual_seed(generate.DEFAULT_SEED),
            num_inference_steps=2,
            guidance_scale=GUIDANCE_SCALE,
            max_sequence_length=TEXT_LENGTH,
        )
    maps = dcm.load(folder / "maps.safetensors")
    assert maps.concepts == generate.DEFAULT_CONCEPTS
    assert torch.equal(maps.get(), expected.get())


def test_table_has_a_line_per_concept_and_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["a red circle moving up", "--concepts", "red", "circle", "--methods", "cross_attention", "imap"]
    assert cli.main(["generate", *arguments, "--steps", "1", "--seed", "3", "--out", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    maps = dcm.load(tmp_path / "maps.safetensors")
    for method in ("cross_attention", "imap"):
        for i, concept in enumerate(("red", "circle")):
            (line,) = [line for line in lines if line[:2] == [concept, method]]
            scores = maps.get(method)[0, i]
            assert [float(value) for value in line[2:5]] == [
                pytest.approx(float(value), abs=6e-4) for value in (scores.min(), scores.mean(), scores.max())
            ]
            assert int(line[5]) == int(scores.mean((1, 2)).argmax())


@pytest.mark.parametrize("rope", [True, False])
def test_model_of_your_own(rope: bool, tmp_path: Path) -> None:
    """Sin-cos positions need the text length that the model was built for."""
    tiny_cogvideox.make_pipeline(rope=rope).save_pretrained(tmp_path / "model")
    arguments = ["a dog", "--concepts", "dog", "--model", str(tmp_path / "model"), "--steps", "1"]
    assert cli.main(["generate", *arguments, "--out", str(tmp_path / "out")]) == 0
    assert dcm.load(tmp_path / "out" / "maps.safetensors").get().shape == (1, 1, *tiny_cogvideox.GRID)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "gradcam"], "unknown method 'gradcam'"),
        (["--concepts", "dog"], "concept 'dog' has no word that the tokenizer knows"),
        (["--concepts", "red", "red"], "concept 'red' is there twice"),
        (["a dog", "--model", "somewhere"], "needs a prompt and --concepts"),
        (["a dog", "--concepts", "dog", "--model", "./no/such/folder"], "no/such/folder"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", *arguments, "--steps", "1", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("concept-maps: ")
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [["--steps", "0"], ["--steps", "-3"], ["--seed", "-1"], ["--seed", "9" * 20]])
def test_numbers_out_of_range_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", *option])
    assert f"argument {option[0]}: '{option[1]}'; expected a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("mistake", ["out", "extra"])
def test_what_would_fail_in_the_end_fails_before_generating(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*arguments: Any) -> None:
        raise AssertionError("the pipeline is loaded")

    monkeypatch.setattr(generate, "load_pipeline", load)
    out = tmp_path / "out"
    if mistake == "out":
        out.write_text("a file", encoding="utf-8")
    else:
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert cli.main(["generate", "--out", str(out)]) == 2
    message = {"out": "which is a file; expected a folder", "extra": 'pip install "diffusers-concept-maps[viz]"'}[
        mistake
    ]
    assert message in capsys.readouterr().err


def test_failure_while_writing_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "video.mp4").write_text("older", encoding="utf-8")
    (tmp_path / "empty").mkdir()

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(figure, "contact_sheet", fail)
    for name in ("old", "empty", "new"):
        assert cli.main(["generate", "--steps", "1", "--out", str(tmp_path / name)]) == 2
    assert names(tmp_path) == {"old", "empty"}
    assert names(tmp_path / "empty") == set()
    assert names(tmp_path / "old") == {"video.mp4"}
    assert (tmp_path / "old" / "video.mp4").read_text(encoding="utf-8") == "older"


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert cli.main(["generate", "--steps", "1", "--concepts", "red", "--fps", "3", "--out", str(tmp_path)]) == 0
    assert names(tmp_path) == FILES | {"notes.txt", "overlay_0_red.mp4"}
    for name in ("video.mp4", "overlay_0_red.mp4"):
        assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / name)) == (6, pytest.approx(2, abs=0.1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("/absolute", "absolute"),
        ("<b>bold</b>", "b-bold-b"),
        ("$x$", "x"),
        ("naïve Café", "naive-cafe"),
        ("猫", "concept"),
        ("..", "concept"),
        ("CON", "con"),
        ("a" * 300, "a" * 40),
        ("x\x1b[31m\n\0y", "x-31m-y"),
    ],
)
def test_slug(text: str, expected: str) -> None:
    assert _common.slug(text) == expected


def test_concept_text_never_becomes_a_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded tokenizer splits at punctuation: these have a word it knows, and everything else that hurts."""
    concepts = ["../../red", "<b>red</b>", "$red$ \x1b[31m", "red " + "/" * 15]
    out = tmp_path / "inner" / "out"
    arguments = ["generate", "--steps", "1", "--out", str(out), "--concepts", *concepts]
    assert cli.main(arguments) == 0
    stems = ["overlay_0_red", "overlay_1_b-red-b", "overlay_2_red-31m", "overlay_3_red"]
    assert names(out) == FILES | {f"{stem}.mp4" for stem in stems}
    assert names(tmp_path) == {"inner"}
    assert "\x1b" not in capsys.readouterr().out
    assert dcm.load(out / "maps.safetensors").concepts == tuple(concepts)


def test_info(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(folder / "maps.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "concepts  red, blue, background" in out
    assert "concept_attention  1 x 6 frames of 8 x 8 tokens" in out
    assert "CogVideoXTransformer3DModel" in out


def test_info_prints_nothing_that_steers_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"m": torch.zeros(1, 1, 1, 2, 2), "coverage.m": torch.ones(1, 1, dtype=torch.bool)}
    maps = dcm.ConceptMaps(StoredMaps(("a\x1b[31m",), tensors, {"model": "b\x1b[0m"}), ["m"])
    maps.save(tmp_path / "maps.safetensors")
    assert cli.main(["info", str(tmp_path / "maps.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "a?[31m" in out
    assert "b?[0m" in out


def test_errors_hold_nothing_that_steers_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Decoders repeat the name of the file in their own messages."""
    file = tmp_path / "a\x1b[31m.mp4"
    file.write_text("no video", encoding="utf-8")
    assert cli.main(["encode", str(file), "--concepts", "red", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert "as a picture or a video" in error


def test_info_of_what_is_no_file_of_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "damaged").write_bytes(b"\x00" * 64)
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    for name, message in {"missing": "missing", "damaged": "damaged", "foreign": "without concept maps"}.items():
        assert cli.main(["info", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_every_command_is_a_file_and_every_file_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(path.stem for path in Path(generate.__file__).parent.glob("[!_]*.py"))
    assert [command.__name__.rsplit(".", 1)[1] for command in load_commands()] == files
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    listed = re.findall(r"^    (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    assert listed == files


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys, contextlib\n"
        "from diffusers_concept_maps import cli\n"
        "from diffusers_concept_maps.commands import load_commands\n"
        "for command in [[], *([module.__name__.rsplit('.', 1)[1]] for module in load_commands())]:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        cli.main([*command, '--help'])\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--concepts" in result.stdout


def test_attention_is_passed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "maps"
    assert cli.main(["generate", "--steps", "1", "--attention", "two_pass", "--out", str(out)]) == 2
    assert "unknown attention 'two_pass'; expected one of exact, one_pass" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main(["generate", "--steps", "1", "--attention", "one_pass", "--out", str(out)]) == 0
    assert dcm.load(out / "maps.safetensors").metadata["attention"] == "one_pass"
