"""Every example runs as it stands, without a screen, and writes what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffusers_concept_maps as dcm

EXAMPLES = Path(__file__).parents[1] / "examples"
WRITES = {
    "01_quickstart.py": {"red.mp4", "blue.mp4", "background.mp4", "maps.safetensors"},
    "02_set_attn_processor.py": {*(f"frame_{i}.png" for i in range(6)), "maps.safetensors"},
}


def run(name: str, out: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), "--out", str(out), "--steps", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(WRITES)


@pytest.mark.parametrize("name", WRITES)
def test_example_runs(name: str, tmp_path: Path) -> None:
    printed = run(name, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == WRITES[name]
    assert "written to" in printed
    maps = dcm.load(tmp_path / "out" / "maps.safetensors")
    assert bool(maps.get().isfinite().all())


def test_three_added_lines_change_no_frame(tmp_path: Path) -> None:
    run("02_set_attn_processor.py", tmp_path)
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
        with Image.open(tmp_path / f"frame_{index}.png") as written:
            assert np.array_equal(np.asarray(written), np.asarray(frame))
