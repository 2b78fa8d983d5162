"""Every kernel compiles for every target without a GPU, in a process of its own, where nothing is interpreted."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "kernels" / "benchmarks"
PACKAGE = ROOT / "kernels" / "torch-ext" / "concept_map_kernels"
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
ONE = ["--one", "--dtypes", "bf16", "--head-widths", "64", "--text-rows", "8"]


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import compile_matrix

    return compile_matrix


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script with Triton as a compiler, unless the environment says otherwise."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / "compile_matrix.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True)


def test_one_launch_of_every_kernel_compiles_for_every_target(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    result = run(*ONE, "--jobs", "2", "--state", str(tmp_path / "state"), "--table", str(table))
    assert result.returncode == 0, result.stdout + result.stderr
    names = {
        name for path in PACKAGE.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    cells: dict[tuple[str, str], list[str]] = {}
    with table.open() as file:
        for row in csv.DictReader(file):
            for target in TARGETS:
                cells.setdefault((row["kernel"], target), []).extend([row[target]] if row[target] else [])
    assert set(cells) == {(name, target) for name in names for target in TARGETS}
    for (_, target), found in cells.items():
        assert len(found) == 1
        registers, _, local = map(int, found[0].split("/"))
        assert 0 < registers <= 255 or target == "gfx942"
        assert local == 0 or target != "sm_90"
    assert {f"| `{name}`" for name in names} == set(re.findall(r"^\| `\w+`", result.stdout, re.M))

    again = run(*ONE, "--ops", "concept_attention", "--targets", "sm_90", "--state", str(tmp_path / "state"))
    assert re.search(r"^(\d+) compilations, \1 of them known$", again.stdout, re.M)  # nothing is compiled twice


def test_the_committed_table_is_of_today_s_launches() -> None:
    result = run("--check", "docs/kernels/compile_matrix.csv")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_table_that_is_stale_or_spills_is_refused(
    matrix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix.Launch, "describe", lambda launch: "num_warps=4")
    launch = matrix.Launch("module", "a_kernel", "cuda", (), (), (), ())
    use = matrix.Use(ops=["similarity"], dtypes=["bf16"], head_widths=[64])
    table = tmp_path / "table.csv"
    matrix.write_table(table, {launch: use}, {(launch, "sm_90"): matrix.Compiled(255, 1024, 0)})
    matrix.check_table(table, {launch: use})
    with pytest.raises(SystemExit, match="stale in 1 lines, such as a_kernel similarity bf16 64 num_warps=4; write"):
        matrix.check_table(table, {})
    matrix.write_table(table, {launch: use}, {(launch, "sm_90"): matrix.Compiled(255, 1024, 8)})
    with pytest.raises(SystemExit, match="a_kernel similarity bf16 64 num_warps=4 on sm_90: 8 bytes of local memory"):
        matrix.check_table(table, {launch: use})


def test_float32_compiles_for_amd(tmp_path: Path) -> None:
    options = ["--dtypes", "fp32", "--head-widths", "64", "--text-rows", "8", "--targets", "gfx942"]
    result = run("--one", *options, "--ops", "similarity", "--state", str(tmp_path / "state"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^all [1-9]\d* compilations are as they must be$", result.stdout, re.M)


def test_every_operation_is_in_the_matrix(matrix: Any) -> None:
    assert set(matrix.OPS.values()) == {path.stem for path in PACKAGE.glob("[!_]*.py")}


def test_the_interpreter_compiles_nothing(tmp_path: Path) -> None:
    result = run(*ONE, "--state", str(tmp_path / "state"), TRITON_INTERPRET="1")
    assert result.returncode == 1
    assert "TRITON_INTERPRET is set" in result.stderr


@pytest.mark.parametrize(
    ("values", "target", "dtype", "violation"),
    [
        ({"registers": 200, "shared": 90_000}, "sm_89", "bf16", ""),
        ({"shared": 110_000}, "sm_89", "bf16", "110000 bytes of shared memory, at most 101376"),
        ({"shared": 110_000}, "sm_90", "bf16", ""),
        ({"shared": 70_000}, "gfx942", "fp32", "70000 bytes of shared memory, at most 65536"),
        ({"local": 8}, "sm_90", "fp16", "8 bytes of local memory, expected none"),
        ({"local": 8}, "sm_90", "bf16", "8 bytes of local memory, expected none"),
        ({"local": 8}, "sm_90", "fp32", ""),
        ({"local": 8}, "sm_80", "bf16", ""),
        ({"error": "it does not compile"}, "sm_80", "fp32", "it does not compile"),
    ],
)
def test_violations(matrix: Any, values: dict[str, Any], target: str, dtype: str, violation: str) -> None:
    assert matrix.Compiled(**values).violation(target, matrix.Use(dtypes=["fp32", dtype])) == violation


def test_failures_are_tried_again(matrix: Any, tmp_path: Path) -> None:
    results = matrix.Results(tmp_path / "folder" / "state")
    results.add("one", matrix.Compiled(40, 1024, 8))
    results.add("two", matrix.Compiled(error="out of memory"))
    assert matrix.Results(tmp_path / "folder" / "state").compiled == {"one": matrix.Compiled(40, 1024, 8)}
    assert results.compiled["two"].error == "out of memory"
