"""The GPU benchmark, as far as it goes without a GPU: it runs, refuses wrong results, and makes no figure up."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import concept_map_kernels
import diffusers_concept_maps as dcm
from diffusers_concept_maps import dispatch

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a module of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark as a user does, who has not set TRITON_INTERPRET."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / "benchmark_kernels.py"), *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True)


def tables(text: str) -> dict[str, list[list[str]]]:
    """Rows of every Markdown table, by the first cell of its header."""
    found: dict[str, list[list[str]]] = {}
    name = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            name = None
        elif name is None:
            name = cells[0]
            found[name] = []
        elif cells[0] != "---":
            found[name].append(cells)
    return found


def test_dry_run(load: Callable[[str], Any]) -> None:
    result = run("--dry-run")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("Dry run: everything ran, nothing was measured.\n")
    assert "no kernel is enabled" not in result.stdout
    found = tables(result.stdout)
    assert {row[0].split(",")[0] for row in found["operation"]} == set(load("kernel_inputs").OPS)
    assert all(set(row[1:]) == {"not measured"} for row in found["operation"])
    assert [row[0] for row in found["backend"]] == [*load("benchmark_kernels").BACKENDS, "kernel, keys not joined"]
    assert all(re.match(r"not (measured|available)", row[1]) for row in found["backend"])
    modes = {row[0]: row[1:] for row in found["mode"]}
    assert modes.keys() >= {"exact", "official"}
    assert modes["exact"][0] == modes["official"][0] == "bit-identical"
    assert all(set(cells[1:]) <= {"not measured", "-"} for cells in modes.values())


def test_nothing_is_measured_without_a_gpu() -> None:
    result = run(CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert "there is no GPU to measure on" in result.stderr
    assert result.stdout == ""


def test_pairs_are_checked() -> None:
    result = run("--dry-run", "--pairs", "0")
    assert result.returncode == 2
    assert "--pairs is 0; expected at least 1" in result.stderr


def test_a_wrong_kernel_stops_the_benchmark(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load("benchmark_kernels")
    right = concept_map_kernels.similarity
    monkeypatch.setattr(benchmark, "OPS", {"similarity": "similarity"})
    inputs = load("kernel_inputs").Inputs(benchmark.SMALL_SIZES, torch.float32, "cpu")
    benchmark.check(inputs, interpreted=False)
    monkeypatch.setattr(concept_map_kernels, "similarity", lambda **arguments: right(**arguments) * 1.0001)
    with pytest.raises(SystemExit, match=r"similarity, none is 1\.0\de-04 from float64, at most .* no times"):
        benchmark.check(inputs, interpreted=False)


def test_a_changed_output_gets_no_ratio(load: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    outputs = {"stock": torch.ones(4), "exact": torch.ones(4) * 1.5, "one_pass": torch.ones(4) * 1.01}
    block = load("block_subject")

    class Subject:
        def modes(self) -> dict[str, torch.Tensor]:
            return outputs

        def run(self, mode: str) -> Any:
            return block.Run(3.0 if mode == "stock" else 3.06, 10.0, 1000, outputs[mode])

    load("benchmark_kernels").time_block(Subject(), 6)
    rows = {row[0]: row[1:] for row in tables(capsys.readouterr().out)["mode"]}
    assert rows["exact"] == ["differs by 5.0e-01", "no ratio: the output is another one", "-", "-", "-", "-"]
    assert rows["one_pass"] == [
        "differs by 1.0e-02", "1.020 (1.020 to 1.020, 6 pairs)", "met", "1.000", "0.00%", "met",
    ]  # fmt: skip


def test_paired_times(load: Callable[[str], Any]) -> None:
    clock = load("gpu_clock")
    calls: list[str] = []

    def timed(name: str, times: list[float]) -> Callable[[], float]:
        remaining = iter(times)

        def one() -> float:
            calls.append(name)
            return next(remaining)

        return one

    first = timed("a", [99.0, 2.0, 4.0, 6.0])
    second = timed("b", [99.0, 1.0, 1.0, 1.0])
    times = clock.paired(first, second, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert dataclasses.astuple(times) == (4.0, 1.0, 4.0, 2.0, 6.0, 3)


def test_floors(load: Callable[[str], Any]) -> None:
    inputs, floors = load("kernel_inputs"), load("kernel_floors")
    sizes = inputs.Sizes(2, 3, 4, 5, 6, 32, 7, 8)  # 120 image tokens
    image, rows = 2 * 3 * 120 * 32 * 2, 2 * 3 * 7 * 32 * 2  # bytes

    def cost(op: str, variant: str, *results: torch.Tensor) -> tuple[int, int]:
        made = inputs.calls(op, inputs.Inputs(sizes, torch.bfloat16, "meta"))
        (call,) = (call for call in made if call.variant == variant)
        return floors.bytes_moved(call, results), floors.operations(call, sizes)

    output = torch.empty(2, 3, 7, 32, dtype=torch.bfloat16, device="meta")
    assert cost("concept_attention", "", output) == (2 * image + 4 * rows, 4 * 6 * 7 * 127 * 32)
    maps = torch.empty(2, 7, 120, device="meta")
    weights, written = 2 * 3 * 4, 2 * 7 * 120 * 4
    assert cost("similarity", "none", maps) == (image + rows + weights + written, 2 * 6 * 7 * 120 * 32)
    assert cost("similarity", "clip", maps) == (2 * image + rows + weights + written, 2 * 6 * 7 * 120 * 32)
    assert cost("accumulate_similarity_", "", maps) == (image + rows + weights + 2 * written, 2 * 6 * 7 * 120 * 32)
    means, spread = 2 * 3 * 4 * 32 * 4, torch.empty(2, 3, 4, device="meta")
    assert cost("frame_spread", "", spread) == (image + image // 4 + means + 2 * 3 * 4 * 4, 0)
    tokens = 2 * 30 * 8
    one_way = (image + image // 4 + weights + tokens, 4 * 6 * 30 * 120 * 32)
    assert cost("temporal_matching", "forward") == cost("temporal_matching", "backward") == one_way
    both = (2 * (image + image // 4) + weights + tokens, 8 * 6 * 30 * 120 * 32)
    assert cost("temporal_matching", "both") == both
    assert load("gpu_clock").Ceilings(bandwidth=100.0, matmul=1000.0).floor(200, 5000) == 5.0
    assert load("gpu_clock").Ceilings(bandwidth=100.0, matmul=1000.0).floor(600, 5000) == 6.0


def test_the_official_algorithm_is_the_official_one(load: Callable[[str], Any]) -> None:
    block, official = load("block_subject"), load("official_block")
    size = dataclasses.replace(block.SMALL, text=block.CONCEPTS)  # no padding, which the maps of a capture leave out
    subject = block.BlockSubject(size, torch.float32, "cpu")
    with official.OfficialBlocks(subject.transformer, subject.concepts, size.frames) as plain:
        subject.pipe(**subject.inputs)
    embeds = {"concept_embeds": subject.concepts, "parity": "imap"}
    methods = ("concept_attention", "gramcol", "imap")
    with dispatch.use_backend("reference"), dcm.trace(subject.pipe, methods=methods, **embeds) as maps:
        subject.pipe(**subject.inputs)
    for method, layers in zip(methods, zip(*plain.maps, strict=True), strict=True):
        expected = torch.stack(layers).mean(0)
        assert torch.allclose(maps.get(method)[0].flatten(1), expected, rtol=1e-4, atol=1e-4), method
    assert all("forward" not in vars(module) for module in subject.transformer.transformer_blocks)
