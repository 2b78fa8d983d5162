"""Weights that are elsewhere, or of another type, until they are needed: frames and maps are those of stock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from backbones._oracle import kept_state
from host._families import Case, pipeline_of, run, same_maps, traced
from host._features import Blank, cells

CPU = torch.device("cpu")


def expect_same(case: Case, pipe: Any) -> None:
    """Frames are unchanged by a capture, and frames and maps are those of a pipeline whose weights stay in memory."""
    off = run(case, pipe)
    before = kept_state(pipe.transformer)
    on, maps = traced(case, pipe)
    assert torch.equal(on, off)
    assert kept_state(pipe.transformer) == before
    assert torch.equal(run(case, pipe), off)
    plain, expected = traced(case, pipeline_of(case))
    assert torch.equal(off, plain)
    same_maps(case, maps, expected, 0.0)


@pytest.mark.parametrize(("case", "blank"), cells("group offload, blocks"))
def test_group_offload_of_blocks(case: Case, blank: Blank | None) -> None:
    pipe = case.pipeline()
    pipe.transformer.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)
    expect_same(case, pipe)


@pytest.mark.parametrize(("case", "blank"), cells("group offload, leaves"))
def test_group_offload_of_leaves(case: Case, blank: Blank | None) -> None:
    pipe = case.pipeline()
    pipe.transformer.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    expect_same(case, pipe)


@pytest.mark.parametrize(("case", "blank"), cells("group offload, disk"))
def test_group_offload_to_disk(case: Case, blank: Blank | None, tmp_path: Path) -> None:
    """Weights are out of memory but while a module runs."""
    pipe = case.pipeline()
    options = {"offload_type": "block_level", "num_blocks_per_group": 1, "offload_to_disk_path": str(tmp_path)}
    pipe.transformer.enable_group_offload(CPU, CPU, **options)
    assert list(tmp_path.glob("*.safetensors"))
    expect_same(case, pipe)


@pytest.mark.parametrize(("case", "blank"), cells("model offload"))
def test_model_offload(case: Case, blank: Blank | None) -> None:
    pipe = case.pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    assert pipe.transformer._hf_hook is not None
    expect_same(case, pipe)


@pytest.mark.parametrize(("case", "blank"), cells("sequential offload"))
def test_sequential_offload(case: Case, blank: Blank | None) -> None:
    """What `enable_sequential_cpu_offload` does to each model."""
    pipe = case.pipeline()
    accelerate.cpu_offload(pipe.transformer, execution_device=CPU)
    assert next(pipe.transformer.parameters()).is_meta
    expect_same(case, pipe)


@pytest.mark.parametrize(("case", "blank"), cells("casting"))
def test_layerwise_casting(case: Case, blank: Blank | None) -> None:
    """Maps are those of a model whose weights have been rounded to what they are stored as."""
    pipe, rounded = case.pipeline(), case.pipeline()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name for name, weight in pipe.transformer.named_parameters() if weight.dtype == torch.float8_e4m3fn}
    assert stored
    for name, weight in rounded.transformer.named_parameters():
        if name in stored:
            weight.data = weight.data.to(torch.float8_e4m3fn).float()
    off = run(case, pipe)
    on, maps = traced(case, pipe)
    plain, expected = traced(case, rounded)
    assert torch.equal(on, off)
    assert torch.equal(off, plain)
    same_maps(case, maps, expected, 0.0)


@pytest.mark.parametrize(("case", "blank"), cells("tiling"))
def test_vae_tiling(case: Case, blank: Blank | None) -> None:
    pipe = case.pipeline()
    pipe.vae.enable_tiling()
    options = {"output_type": "pt"}
    off = run(case, pipe, **options)
    on, maps = traced(case, pipe, **options)
    assert torch.equal(on, off)
    same_maps(case, maps, traced(case, pipeline_of(case))[1], 0.0)
