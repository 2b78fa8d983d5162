"""Tensors whose elements 32 bits cannot count, and problems of more blocks than some axes of a grid take."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

import op_arguments
import pytest
import torch

import concept_map_kernels

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"
AT_MOST_64_ROWS = {"attention_probabilities", "similarity_and_statistics"}
FarApart = Callable[[torch.Tensor, int], torch.Tensor]


@pytest.mark.parametrize("axis", [1, 2])  # heads or text rows, and tokens
@pytest.mark.parametrize("name", op_arguments.OPS)
def test_offsets_beyond_32_bits(
    name: str, axis: int, device: torch.device, far_apart: FarApart, poisoned: None
) -> None:
    """Each tensor in turn is laid out with gaps: it holds the same, so the result is the same."""
    function = getattr(concept_map_kernels, name)
    given = op_arguments.arguments(name, device, torch.float16)
    expected = op_arguments.results(function(*given), given)
    places = [n for n, one in enumerate(given) if isinstance(one, torch.Tensor) and one.ndim > axis + 1]
    assert places
    for place in places:
        given = op_arguments.arguments(name, device, torch.float16)
        given = *given[:place], far_apart(given[place], axis), *given[place + 1 :]
        assert concept_map_kernels.supports(name, *given)
        for found, near in zip(op_arguments.results(function(*given), given), expected, strict=True):
            assert torch.equal(found, near)


class Grids:
    """Stands in for a kernel and keeps the grids of its launches."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.seen.append(grid)
        return lambda *_, **__: None


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> dict[str, Grids]:
    """By the names of the kernels, none of which runs."""
    found: dict[str, Grids] = {}
    for info in pkgutil.iter_modules(concept_map_kernels.__path__, "concept_map_kernels."):
        module = importlib.import_module(info.name)
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, found.setdefault(name, Grids()))
    return found


@pytest.mark.parametrize(("frames", "lines"), [(1, 3630), (121, 30)], ids=["image", "video"])
def test_grids_of_large_problems(
    frames: int, lines: int, grids: dict[str, Grids], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU takes 2^31 - 1 blocks along the first axis of a grid, and 65535 along the others."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    inputs = importlib.import_module("kernel_inputs")
    for rows in (64, 512):
        sizes = inputs.Sizes(2, 48, frames, lines, 55, head_width=64, concepts=rows, text=512)  # 199,650 tokens
        for op in inputs.OPS if rows == 64 else set(inputs.OPS) - AT_MOST_64_ROWS:
            for call in inputs.calls(op, inputs.Inputs(sizes, torch.bfloat16, "meta")):
                getattr(concept_map_kernels, op)(**call.arguments)
    for name, kernel in grids.items():
        assert kernel.seen, name
        for first, *others in kernel.seen:
            assert 0 < first < 2**31, name
            assert all(0 < other <= 65535 for other in others), name
