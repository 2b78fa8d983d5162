"""The benchmark of guidance runs, and refuses a wrong prediction."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_concept_maps.correspondence import guidance

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("benchmark_guidance")


def test_small_size(benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_guidance.py", "--small", "--pairs", "2"])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert "guided layers (5, 6, 8)" in lines[1]
    assert lines[-1].startswith("off the formula by ")
    assert "in 2 pairs; at most 1.35 is wanted" in lines[-1]


def test_layers_are_those_of_the_preset(benchmark: Any) -> None:
    assert benchmark.guided_layers(benchmark.Size(13, 30, 45, 30, 64, 30, 226, 4096)) == (13, 17, 21)


def test_no_pairs(benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_guidance.py", "--small", "--pairs", "0"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "--pairs is 0; expected at least 1" in capsys.readouterr().err


def test_a_wrong_prediction_is_not_measured(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **place: Any) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    subject = benchmark.Subject(benchmark.SMALL)
    assert subject.check() < benchmark.TOLERANCE
    monkeypatch.setattr(guidance, "within_frames", attend)
    with pytest.raises(SystemExit, match="^the guided prediction is off by .*: no ratio is reported$"):
        subject.check()


def test_a_scale_of_zero_has_to_be_stock(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = benchmark.Subject(benchmark.SMALL)
    step = subject.step

    def shifted(scale: float | None) -> Any:
        seconds, prediction, call = step(scale)
        return seconds, prediction + (scale == 0), call

    monkeypatch.setattr(subject, "step", shifted)
    with pytest.raises(SystemExit, match="^a scale of 0 is not stock: no ratio is reported$"):
        subject.check()
