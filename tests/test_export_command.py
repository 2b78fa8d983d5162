"""`concept-maps export`: from a file, and from a video that it makes itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import tiny_wan
from exported import decoded, detail_file, entries, facts, gray_png, manifest, restored, scores
from safetensors.torch import load_file

import diffusers_concept_maps as dcm
from diffusers_concept_maps import cli
from diffusers_concept_maps.commands import export, generate
from diffusers_concept_maps.shapes.captions import TEXT_LENGTH
from diffusers_concept_maps.shapes.model import GUIDANCE_SCALE

WAN = {
    "num_inference_steps": 3, "guidance_scale": 4.0, "max_sequence_length": 12, **tiny_wan.SIZE
}  # fmt: skip
PROMPT = "a red dog"


def command(*arguments: str | Path) -> int:
    return cli.main(["export", *map(str, arguments)])


def embedded(concepts: list[str] | None, **options: Any) -> tuple[dcm.ConceptMaps, np.ndarray]:
    """What the command makes in two steps: maps with kept axes, and frames."""
    pipe = dcm.load_shapes_pipeline()
    pipe.set_progress_bar_config(disable=True)
    target = "prompt" if concepts is None else "concepts"
    with dcm.trace(pipe, concepts, methods=["cross_attention"], target=target, **options) as maps:
        output = pipe(
            generate.DEFAULT_PROMPT,
            generator=torch.Generator().manual_seed(generate.DEFAULT_SEED),
            num_inference_steps=2,
            guidance_scale=GUIDANCE_SCALE,
            max_sequence_length=TEXT_LENGTH,
        )
    return maps, output.frames[0]


def check(folder: Path, entry: dict[str, Any], expected: torch.Tensor) -> None:
    """The scores of a gray video in FFV1, to a half of a level."""
    low, high = entry["scale"]
    found = restored(decoded(folder / entry["path"], "gray16le", 1)[..., 0], entry["scale"])
    assert np.abs(found - expected.numpy()).max() <= (high - low) / 65535 * 0.51 + 1e-6


def test_words_of_a_wan_prompt_layer_by_layer_and_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "load_pipeline", lambda *_: (tiny_wan.make_pipeline(), dict(WAN)))
    out = tmp_path / "out"
    given = ["--prompt", PROMPT, "--model", "Wan", "--per", "layer", "step", "--make", "clips", "grid", "sharpening"]
    assert command(*given, "--format", "ffv1", "--columns", "layer", "--out", out, "--keep-maps") == 0
    pipe = tiny_wan.make_pipeline()
    generator = torch.Generator().manual_seed(0)
    with dcm.trace(pipe, methods=["cross_attention"], target="prompt", detail=("layer", "step")) as maps:
        pipe(PROMPT, generator=generator, **WAN)
    assert maps.concepts == ("a", "red", "dog")
    detail = maps.detail()[:, :, 0]
    assert torch.equal(load_file(out / "words.safetensors")["cond.cross_attention"][:, :, 0], detail)
    words = out / "words"
    assert len(entries(words, kind="clip")) == 3 * 3 * 3
    for layer, step, word in np.ndindex(3, 3, 3):
        (entry,) = entries(words, kind="clip", concept=maps.concepts[word], layer=layer, step=step)
        check(words, entry, detail[layer, step, word])
    for word, entry in enumerate(entries(words, kind="sharpening")):
        check(words, entry, detail.double().mean(0)[:, word, tiny_wan.GRID[0] // 2])
    (grid,) = entries(words, kind="grid")
    assert (grid["rows"], grid["columns"], grid["frames"]) == (["a", "red", "dog"], {"layer": [0, 1, 2]}, 3)
    assert manifest(words)["source"]["metadata"]["transformer"] == "WanTransformer3DModel"
    assert facts(out / "video.mp4")["source_size"] == (80, 48)
    assert {path.name for path in out.iterdir()} == {"video.mp4", "words", "words.safetensors"}


def test_words_and_concepts_of_the_embedded_model(tmp_path: Path) -> None:
    """All layers, where they are told apart; the size of the video."""
    out = tmp_path / "out"
    given = ["--words", "--concepts", "red", "blue", "--per", "layer", "--steps", "2", "--size", "video"]
    assert command(*given, "--format", "ffv1", "--out", out) == 0
    assert {path.name for path in out.iterdir()} == {"video.mp4", "words", "concepts"}
    for folder, concepts in (("words", None), ("concepts", ["red", "blue"])):
        maps, frames = embedded(concepts, layers=range(5), detail=("layer",))
        said = manifest(out / folder)
        assert said["concepts"] == list(maps.concepts)
        assert said["size"] == [frames[0].height, frames[0].width]
        assert said["source"]["metadata"]["frames_per_latent"] == maps.metadata["frames_per_latent"]
        assert len(said["files"]) == 5 * len(maps.concepts)
        size = (frames[0].height, frames[0].width)
        for layer, concept in np.ndindex(5, len(maps.concepts)):
            (entry,) = entries(out / folder, concept=maps.concepts[concept], layer=layer)
            (expected,) = maps.detail()[layer, :, concept]
            check(out / folder, entry, torch.nn.functional.interpolate(expected[:, None], size, mode="bilinear")[:, 0])


def test_every_token_of_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "load_pipeline", lambda *_: (tiny_wan.make_pipeline(), dict(WAN)))
    out = tmp_path / "out"
    prompt = "a  red dog and a &amp; dog"
    given = ["--prompt", prompt, "--model", "Wan", "--format", "ffv1", "--tokens"]
    assert command(*given, "--out", out) == 0
    pipe = tiny_wan.make_pipeline()
    clean = "a red dog and a & dog"
    names = {f"{number} {text}": [number] for number, text in enumerate(clean.split())}
    options = {"methods": ["cross_attention"], "target": "prompt", "prompt_tokens": names}
    with dcm.trace(pipe, **options) as maps:
        pipe(clean, generator=torch.Generator().manual_seed(0), **WAN)
    assert manifest(out / "tokens")["concepts"] == list(names)
    for token, entry in enumerate(entries(out / "tokens")):
        assert entry["path"].startswith(f"{token:02d}_{token}")
        check(out / "tokens", entry, maps.get()[0, token])
    assert {path.name for path in out.iterdir()} == {"video.mp4", "tokens"}


def test_tokens_need_a_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Unknown(type(tiny_wan.make_pipeline())):  # type: ignore[misc]
        def __call__(self, prompt: str) -> None:
            raise AssertionError("it is called")

    pipe = Unknown(**tiny_wan.make_pipeline().components)
    monkeypatch.setattr(export, "load_pipeline", lambda *_: (pipe, {}))
    assert command("--prompt", PROMPT, "--model", "Wan", "--tokens", "--out", tmp_path / "out") == 2
    assert "Unknown does not tell how many tokens it takes; use --words" in capsys.readouterr().err


def test_maps_without_axes_keep_the_preset(tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--concepts", "red", "blue", "--steps", "2", "--method", "cross_attention", "--keep-maps"]
    assert command(*given, "--out", out) == 0
    maps, _ = embedded(["red", "blue"])
    assert torch.equal(dcm.load(out / "concepts.safetensors").get(), maps.get())
    for concept, entry in enumerate(entries(out / "concepts")):
        assert entry["path"] == f"{concept:02d}_{maps.concepts[concept]}/mean"
        low, high = entry["scale"]
        found = restored(gray_png(out / "concepts" / entry["path"]), entry["scale"])
        assert np.abs(found - maps.get()[0, concept].numpy()).max() <= (high - low) / 65535 * 0.51 + 1e-6


def test_a_file_with_every_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = scores(2, 3, videos=2)
    file = detail_file(tmp_path / "maps", values, layer=[1, 5], step=[0, 2, 7])
    given = [
        "--concepts", "sky", "--index", "1", "--per", "layer", "step", "--only-layers", "5", "--only-steps", "2", "7",
        "--make", "clips", "sharpening", "grid", "--columns", "step", "--most-columns", "2", "--frame", "0",
        "--format", "ffv1", "--scale", "file", "--size", "10x14", "--blocks", "--fps", "24", "--method", "imap",
    ]  # fmt: skip
    assert command(file, *given, "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'out'}; manifest.json says what each file is\n"
    clips = entries(tmp_path / "out", kind="clip")
    assert [(entry["layer"], entry["step"]) for entry in clips] == [(5, 2), (5, 7)]
    for step, entry in zip((1, 2), clips, strict=True):
        expected = torch.from_numpy(values[1, step, 1, 1].repeat(2, 1).repeat(2, 2))
        check(tmp_path / "out", entry, expected)
        assert facts(tmp_path / "out" / entry["path"])["fps"] == 24
    (sharpening,) = entries(tmp_path / "out", kind="sharpening")
    assert (sharpening["steps"], sharpening["token_frame"]) == ([2, 7], 0)
    (grid,) = entries(tmp_path / "out", kind="grid")
    assert (grid["rows"], grid["columns"]) == (["sky"], {"step": [2, 7]})


def test_size_of_a_video_beside_the_maps(tmp_path: Path) -> None:
    file = detail_file(tmp_path / "maps", scores(1), layer=[0])
    assert command(file, "--size", "20x28", "--format", "h264", "--out", tmp_path / "a") == 0
    video = tmp_path / "a" / "00_dog" / "mean.mp4"
    assert command(file, "--size", "video", "--video", video, "--out", tmp_path / "b") == 0
    assert (manifest(tmp_path / "b")["size"], manifest(tmp_path / "b")["token_frames"]) == ([20, 28], [0, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["maps", "--words", "--keep-maps"], "--words, --keep-maps is for a video that is generated"),
        (["maps", "--prompt", "a dog"], "--prompt is for a video that is generated; leave it out with FILE"),
        (["--branch", "uncond"], "--branch is for a FILE; leave it out where a video is generated"),
        (["--video", "maps"], "--video is for a FILE"),
        (["maps", "--per", "head"], "head cannot be told apart in these maps"),
        (["maps", "--format", "gif"], "file_format is 'gif'; expected one of png"),
        (["no-such-file"], "cannot read 'no-such-file' as concept maps"),
        (["--model", "somewhere"], "needs a --prompt"),
        (["--concepts", "dog", "--steps", "1"], "concept 'dog' has no word that the tokenizer knows"),
        (["--method", "gradcam", "--steps", "1"], "unknown method 'gradcam'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    detail_file(tmp_path / "maps", scores(1), layer=[0])
    monkeypatch.chdir(tmp_path)
    assert command(*arguments, "--out", "deep/out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("concept-maps: ")
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["maps"]


@pytest.mark.parametrize("size", ["480", "0x5", "5x", "480x832x3", "big"])
def test_sizes_that_are_none(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command("maps", "--size", size)
    assert f"'{size}'; expected token, video or HEIGHTxWIDTH such as 480x832" in capsys.readouterr().err


@pytest.mark.parametrize("mistake", ["out", "extra", "format"])
def test_what_would_fail_in_the_end_fails_before_generating(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*arguments: Any) -> None:
        raise AssertionError("the pipeline is loaded")

    monkeypatch.setattr(export, "load_pipeline", load)
    out = tmp_path / "out"
    if mistake == "out":
        out.write_text("a file", encoding="utf-8")
    elif mistake == "extra":
        monkeypatch.setitem(sys.modules, "OpenEXR", None)
    arguments = ["--look", "matte", "--format", "h264"] if mistake == "format" else ["--format", "exr"]
    assert command(*arguments, "--out", out) == 2
    message = {
        "out": "is there already and not empty",
        "extra": 'pip install "diffusers-concept-maps[export]"',
        "format": "h264 has no alpha",
    }[mistake]
    assert message in capsys.readouterr().err
