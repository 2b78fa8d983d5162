"""A tiny run of the training script: its files, what resuming continues, and the arithmetic it replaces."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_concept_maps.shapes import train
from diffusers_concept_maps.shapes.captions import TEXT_LENGTH
from diffusers_concept_maps.shapes.model import TEXT_HIDDEN, build_transformer

MODULE = "diffusers_concept_maps.shapes.train"


def progress(folder: Path) -> dict[str, int]:
    """Steps and clips of a checkpoint; its seconds are whatever they were."""
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        stored = json.loads(file.metadata()["progress"])
    assert stored.pop("seconds") >= 0
    return dict(stored)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "curve.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, started as a user would."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", MODULE, "--output", str(folder), "--clips", "8", "--batch", "2"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder


def train_on(folder: Path, *options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--output", str(folder), *options])
    train.main()


def test_files_of_a_run(first: Path) -> None:
    assert {path.name for path in first.iterdir()} == {"checkpoint.safetensors", "curve.csv", "pipeline"}
    assert progress(first) == {"step": 4, "clips": 8}
    assert (first / "checkpoint.safetensors").stat().st_size <= 7_000_000
    assert (first / "curve.csv").read_text() == (
        "step,clips,seconds,loss,loss_low_noise,loss_mid_noise,loss_high_noise,learning_rate\n"
    )
    stored = load_file(first / "checkpoint.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    weights = {name.removeprefix("weights.") for name in stored if name.startswith("weights.")}
    assert weights == {name.removeprefix("average.") for name in stored if name.startswith("average.")}
    assert all(bool(tensor.isfinite().all()) for tensor in stored.values())


def test_exported_pipeline_holds_the_average_and_runs(first: Path) -> None:
    pipe = CogVideoXPipeline.from_pretrained(first / "pipeline", dtype=torch.float32)
    stored = load_file(first / "checkpoint.safetensors")
    for part in ("transformer", "text_encoder"):
        for name, parameter in getattr(pipe, part).named_parameters():
            expected = stored[f"average.{part}.{name}"].float()
            torch.testing.assert_close(parameter.detach(), expected, atol=0, rtol=0)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe("a red circle", num_inference_steps=2, max_sequence_length=TEXT_LENGTH, output_type="pt").frames
    assert frames.shape == (1, 6, 3, 32, 32)
    assert bool(frames.isfinite().all())


def test_resume_continues_counts_and_curve(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "curve.csv").write_text((first / "curve.csv").read_text() + "2,4,1,0.9,0.9,0.9,0.9,2.00e-03\n")
    monkeypatch.setattr(train, "_LOG_EVERY", 2)
    checkpoint = str(first / "checkpoint.safetensors")
    train_on(tmp_path, "--clips", "12", "--batch", "3", "--resume", checkpoint, monkeypatch=monkeypatch)
    assert progress(tmp_path) == {"step": 8, "clips": 20}
    curve = rows(tmp_path)
    assert [(row["step"], row["clips"]) for row in curve] == [("2", "4"), ("6", "14"), ("8", "20")]
    for row in curve[1:]:
        low, mid, high = (float(row[f"loss_{level}_noise"]) for level in ("low", "mid", "high"))
        assert float(row["loss"]) == pytest.approx((low + mid + high) / 3, abs=2e-5)
        assert 0.1 < float(row["loss"]) < 2
    assert "step=8 clips=20" in capsys.readouterr().out


def test_resume_starts_from_the_stored_weights(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a learning rate of 0 the weights stay and the average closes in on them."""
    checkpoint = first / "checkpoint.safetensors"
    options = ["--clips", "6", "--batch", "2", "--learning-rate", "0", "--resume", str(checkpoint)]
    train_on(tmp_path, *options, monkeypatch=monkeypatch)
    before, after = load_file(checkpoint), load_file(tmp_path / "checkpoint.safetensors")
    moved = 0
    for name in before:
        kind, parameter = name.split(".", 1)
        weights, average = before[f"weights.{parameter}"].float(), before[f"average.{parameter}"].float()
        expected = weights if kind == "weights" else weights + 0.998**3 * (average - weights)
        torch.testing.assert_close(after[name].float(), expected, atol=1e-6, rtol=1e-3)
        moved += not torch.equal(before[f"weights.{parameter}"], before[f"average.{parameter}"])
    assert moved > 50  # the first run has trained, so that weights and average tell from each other


def test_run_ends_when_its_minutes_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_on(tmp_path, "--clips", "1000000", "--minutes", "0.0001", "--batch", "3", monkeypatch=monkeypatch)
    assert 1 <= progress(tmp_path)["step"] <= 3


def test_two_processes_share_a_run(tmp_path: Path) -> None:
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", MODULE]
    options = ["--output", str(tmp_path), "--clips", "8", "--batch", "2"]
    subprocess.run([sys.executable, "-m", *command, *options], check=True, capture_output=True, timeout=300)
    assert progress(tmp_path) == {"step": 2, "clips": 8}
    assert (tmp_path / "pipeline" / "model_index.json").exists()


def test_learning_rate_warms_up_holds_and_fades() -> None:
    def rate(step: int, fraction: float) -> float:
        return train._learning_rate(1.0, step, fraction)

    assert [rate(step, 0.0) for step in (0, 29, 59, 1000)] == pytest.approx([1 / 60, 0.5, 1, 1])
    assert [rate(1000, fraction) for fraction in (0.5, 0.75, 1.0)] == pytest.approx([1, 0.5, 0.02])


def test_plain_attention_is_the_stock_attention() -> None:
    torch.manual_seed(31)
    transformer = build_transformer()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    noisy, text = torch.randn(2, 6, 3, 32, 32), torch.randn(2, TEXT_LENGTH, TEXT_HIDDEN)
    with torch.no_grad():
        stock = transformer(noisy, text, torch.tensor([300, 800])).sample
        transformer.set_attn_processor(train._PlainAttnProcessor())
        plain = transformer(noisy, text, torch.tensor([300, 800])).sample
    assert float(stock.std()) > 0.1
    torch.testing.assert_close(plain, stock, atol=1e-4, rtol=1e-4)
