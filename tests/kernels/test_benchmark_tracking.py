"""The benchmark of tracking, at its smallest: the gate holds, and is closed to wrong matches."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("benchmark_tracking")


def test_a_pair_and_the_result(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_tracking.py", "--small", "--pairs", "2"])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith(f"pair {number}: ") for number, line in enumerate(lines[3:5], 1)] == [True, True]
    assert lines[5].startswith("matches equal; median ratio ")


def test_wrong_matches_have_no_ratio(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = benchmark.Subject(benchmark.SMALL)
    stock = subject.tracked

    def tracked(**options: Any) -> tuple[float, Any]:
        seconds, out = stock(**options)
        out.tracks[3, 1, 0] += benchmark.STRIDE
        return seconds, out

    monkeypatch.setattr(subject, "tracked", tracked)
    with pytest.raises(SystemExit, match="no ratio is reported"):
        subject.check()
