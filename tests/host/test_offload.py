"""Weights that are elsewhere, or of another type, until they are needed: frames and maps are those of stock."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from backbones._oracle import kept_state
from host._families import CONCEPTS, Case, pipeline_of, run, same_maps, traced
from host._features import Blank, cells

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones import find_backbone

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


@pytest.mark.parametrize(("case", "blank"), cells("quantized"))
def test_quantized_linears(case: Case, blank: Blank | None) -> None:
    """Linear layers of another class, whose weights are no tensors."""
    pipe = case.pipeline()
    with warnings.catch_warnings(action="ignore"):
        for site in find_backbone(pipe.transformer).sites(pipe.transformer):
            torch.ao.quantization.quantize_dynamic(site.block, {torch.nn.Linear}, torch.qint8, inplace=True)
    assert not isinstance(site.attention.to_q.weight, torch.Tensor)
    off = run(case, pipe)
    on, maps = traced(case, pipe)
    plain, expected = traced(case, pipeline_of(case))
    assert torch.equal(on, off)
    assert not torch.equal(off, plain)
    assert all(maps.get(method).isfinite().all() for method in case.methods)
    assert torch.equal(maps.coverage["imap"], expected.coverage["imap"])


class LowRank(torch.nn.Module):
    """A linear layer and a product of two thin ones, as PEFT wraps it."""

    def __init__(self, base_layer: torch.nn.Linear, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base_layer = base_layer
        self.down = torch.nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base_layer.out_features, bias=False)
        for layer in (self.down, self.up):
            layer.weight.data.normal_(0, 0.3, generator=generator)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.base_layer(states) + self.up(self.down(states))


def adapt(pipe: Any) -> None:
    """Wrap every linear layer of the blocks."""
    for layer, site in enumerate(find_backbone(pipe.transformer).sites(pipe.transformer)):
        linears = [name for name, module in site.block.named_modules() if isinstance(module, torch.nn.Linear)]
        for index, name in enumerate(linears):
            site.block.set_submodule(name, LowRank(site.block.get_submodule(name), 100 * layer + index))


@pytest.mark.parametrize(("case", "blank"), cells("low rank"))
def test_low_rank_adapters(case: Case, blank: Blank | None) -> None:
    """Before a capture, and while it is attached."""
    pipe, other = case.pipeline(), case.pipeline()
    adapt(pipe)
    off, before = run(case, pipe), kept_state(pipe.transformer)
    on, expected = traced(case, pipe)
    assert torch.equal(on, off)
    assert kept_state(pipe.transformer) == before
    assert not torch.equal(off, run(case, other))
    with dcm.trace(other, CONCEPTS, methods=case.methods) as maps:
        adapt(other)
        assert torch.equal(run(case, other), off)
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
