"""Every example runs as it stands, without a screen, and writes what it says."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps.correspondence.output import TrackOutput
from diffusers_concept_maps.media import read_frames

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, out: Path, *options: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), "--out", str(out), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"written to {out}" in result.stdout
    return result.stdout


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def shown(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def number(pattern: str, printed: str) -> float:
    found = re.search(pattern, printed)
    assert found, printed
    return float(found[1])


def test_every_example_is_tested_and_listed() -> None:
    here, index = Path(__file__).read_text(encoding="utf-8"), (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("[0-9]*.py"):
        assert f'run("{path.name}"' in here
        assert f"[{path.name}]({path.name})" in index


def test_quickstart(tmp_path: Path) -> None:
    run("01_quickstart.py", tmp_path, "--steps", "2")
    assert names(tmp_path) == {"red.mp4", "blue.mp4", "background.mp4", "maps.safetensors"}
    maps = dcm.load(tmp_path / "maps.safetensors")
    assert all(bool(maps.get(method).isfinite().all()) for method in ("concept_attention", "imap"))


def test_three_added_lines_change_no_frame(tmp_path: Path) -> None:
    run("02_set_attn_processor.py", tmp_path, "--steps", "2")
    assert names(tmp_path) == {*(f"frame_{i}.png" for i in range(6)), "maps.safetensors"}
    assert dcm.load(tmp_path / "maps.safetensors").concepts == ("green", "yellow")
    source = (EXAMPLES / "02_set_attn_processor.py").read_text(encoding="utf-8")
    assert source.count("# added: line") == 3
    pipe = dcm.load_shapes_pipeline()
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        "a green triangle moving up and a yellow circle moving left on dark background",
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(2),
        max_sequence_length=20,
    ).frames[0]
    for index, frame in enumerate(frames):
        assert np.array_equal(shown(tmp_path / f"frame_{index}.png"), np.asarray(frame))


def test_masks_are_the_segmentation(tmp_path: Path) -> None:
    run("03_masks_from_a_generation.py", tmp_path, "--steps", "2")
    assert names(tmp_path) == {*(f"mask_{i:03}.png" for i in range(6)), "maps.safetensors", "segmentation.mp4"}
    maps = dcm.load(tmp_path / "maps.safetensors")
    tokens = maps.get()[0].argmax(0).numpy()  # [frame, height, width]; 4 x 4 pixels each, and a frame for each
    for index, labels in enumerate(tokens):
        assert np.array_equal(shown(tmp_path / f"mask_{index:03}.png"), np.kron(labels, np.ones((4, 4), int)))
    assert read_frames(tmp_path / "segmentation.mp4").frames.shape == (6, 3, 320, 320)


def test_concepts_of_a_file_are_found(tmp_path: Path) -> None:
    printed = run("04_real_video.py", tmp_path)
    assert names(tmp_path) == {"clip.mp4", "blue.mp4", "red.mp4", "background.mp4", "maps.safetensors"}
    assert number(r"IoU of blue: ([\d.]+)", printed) > 0.4  # a sixth of the pixels are an object's
    assert number(r"IoU of red: ([\d.]+)", printed) > 0.4
    assert number(r"IoU of background: ([\d.]+)", printed) > 0.6
    clip, overlay = (read_frames(tmp_path / name).frames for name in ("clip.mp4", "red.mp4"))
    assert clip.shape == overlay.shape == (6, 3, 256, 256)
    assert dcm.load(tmp_path / "maps.safetensors").metadata["noise_levels"] == [0.5, 0.6]


def test_points_are_followed(tmp_path: Path) -> None:
    printed = run("05_tracking.py", tmp_path)
    assert names(tmp_path) == {"clip.mp4", "tracks.mp4", "tracks.npz"}
    assert number(r"moving: 4 points, ([\d.]+) pixels", printed) < 8  # a pixel of the drawing
    out = TrackOutput.load(tmp_path / "tracks.npz")
    assert out.tracks.shape == (16, 6, 2)
    assert read_frames(tmp_path / "tracks.mp4").frames.shape == (6, 3, 256, 256)


def test_guidance_is_beside_the_pipeline_alone(tmp_path: Path) -> None:
    printed = run("06_guidance.py", tmp_path, "--steps", "4")
    assert names(tmp_path) == {"without_and_with.mp4"}
    assert number(r"differ by ([\d.]+)", printed) > 1
    assert read_frames(tmp_path / "without_and_with.mp4").frames.shape == (6, 3, 256, 512)


def test_every_cell_is_scored(tmp_path: Path) -> None:
    run("07_research_sweep.py", tmp_path, "--clips", "2", "--steps", "3")
    assert names(tmp_path) == {"sweep.csv", "correspondence.csv"}
    tables = {}
    for name in ("sweep", "correspondence"):
        with (tmp_path / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            tables[name] = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    cells = {(row["layer"], row["step"], row["head"]) for row in tables["sweep"]}
    assert len(cells) == len(tables["sweep"]) == 5 * 3 * 4
    best = max(tables["sweep"], key=lambda row: row["average_precision"])
    assert 0.5 < best["average_precision"] <= 1
    assert {(row["layer"], row["step"]) for row in tables["correspondence"]} == {
        (layer, step) for layer in range(5) for step in range(3)
    }
    assert all(0 <= row["accuracy_percent"] <= 100 for row in tables["correspondence"])
    last = {row["layer"]: row["accuracy_percent"] for row in tables["correspondence"] if row["step"] == 2}
    assert max(last, key=last.__getitem__) == 3  # the layer that `track` reads


@pytest.mark.parametrize("words", [("a", "dog", "running"), ("two", "red", "rocks")], ids=" ".join)
def test_every_word_has_footage(tmp_path: Path, words: tuple[str, ...]) -> None:
    printed = run("08_art_export_wan.py", tmp_path, "--steps", "2", "--prompt", " ".join(words))
    assert f"attention of {', '.join(words)}:" in printed
    folders = {f"{index:02}_{word}" for index, word in enumerate(words)}
    sequences = {path.parent.relative_to(tmp_path / "sequences").as_posix() for path in tmp_path.rglob("00000.png")}
    assert sequences == {
        f"{folder}/layer-{layer:02}_step-{step:03}" for folder in folders for layer in range(4) for step in range(2)
    }
    assert names(tmp_path / "videos") == {
        "manifest.json", "grid_layer.mp4", *(f"sharpening/{folder}.mp4" for folder in folders)
    }  # fmt: skip
    manifest = json.loads((tmp_path / "sequences" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["concepts"] == list(words)
    assert read_frames(tmp_path / "videos" / "sharpening" / f"01_{words[1]}.mp4").frames.shape[0] == 2
