"""A sample of the full matrix, and that it can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import full_matrix
from backbones.full_matrix import FAMILIES, Row, check, report, rows

ROOT = Path(__file__).parents[2]


def test_a_sample_of_every_family_holds() -> None:
    sample: dict[tuple[str, bool], Row] = {}
    for row in rows():
        sample.setdefault((row.family, row.fused), row)
    assert {family for family, _ in sample} == set(FAMILIES)
    assert {row: check(row) for row in sample.values()} == dict.fromkeys(sample.values(), "")


def test_a_changed_output_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = iter(range(10))
    monkeypatch.setattr(full_matrix, "_output", lambda *_: torch.tensor([float(next(outputs))]))
    monkeypatch.setattr(full_matrix.dcm, "trace", _Nothing)
    assert check(next(rows())) == "concept_attention changes the output by 1.0e+00"


class _Nothing:
    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def get(self) -> torch.Tensor:
        return torch.zeros(1)


def test_the_committed_result_is_of_today_s_models() -> None:
    page = (ROOT / "docs" / "contract_matrix.md").read_text()
    expected = report(dict.fromkeys(rows(), ""))
    kept = [line for line in expected.splitlines() if line.startswith("| ")]
    assert [line for line in page.splitlines() if line.startswith("| ")] == kept
