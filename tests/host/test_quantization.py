"""Weights in int8: frames are those of the same model without a capture."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones._oracle import kept_state
from diffusers import TorchAoConfig
from host._families import Case, pipeline_of, run, same_maps, traced
from host._features import Blank, cells
from host._lora import add_lora
from torchao.quantization import Int8WeightOnlyConfig

from diffusers_concept_maps.backbones import find_backbone


def in_int8(case: Case, folder: Path) -> Any:
    """A pipeline whose transformer torchao has quantized while it was loaded."""
    pipe = case.pipeline()
    pipe.transformer.save_pretrained(folder)
    options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "dtype": torch.float32}
    pipe.transformer = type(pipe.transformer).from_pretrained(folder, **options)
    for site in find_backbone(pipe.transformer).sites(pipe.transformer):
        assert is_int8(site.attention.to_q)
    return pipe


def is_int8(module: Any) -> bool:
    """Also where diffusers keeps some linear layers as they are."""
    return isinstance(module, torch.nn.Linear) and type(module.weight) is not torch.nn.Parameter


def rounded(case: Case, pipe: Any) -> Any:
    """A stock pipeline with the weights that the integers of another one stand for."""
    result = case.pipeline()
    for name, module in result.transformer.named_modules():
        layer = pipe.transformer.get_submodule(name)
        if is_int8(layer):
            module.weight.data = layer.weight.dequantize()
    return result


def expect_same(case: Case, pipe: Any, reference: Any) -> None:
    """Frames are unchanged by a capture, and frames and maps are those of the reference.

    Those of weights that are not rounded are none: every step and layer adds to what rounding changes. The tolerance
    is for scales that are multiplied after the sum instead of before it; measured 2e-5.
    """
    off = run(case, pipe)
    before = kept_state(pipe.transformer)
    on, maps = traced(case, pipe)
    assert torch.equal(on, off)
    assert kept_state(pipe.transformer) == before
    assert torch.equal(run(case, pipe), off)
    plain, expected = traced(case, reference)
    torch.testing.assert_close(off, plain, rtol=0, atol=1e-4 * float(plain.abs().max()))
    same_maps(case, maps, expected, 1e-4)


@pytest.mark.parametrize(("case", "blank"), cells("torchao"))
def test_torchao(case: Case, blank: Blank | None, tmp_path: Path) -> None:
    pipe = in_int8(case, tmp_path)
    assert not torch.equal(run(case, pipe), run(case, pipeline_of(case)))
    expect_same(case, pipe, rounded(case, pipe))


@pytest.mark.parametrize(("case", "blank"), cells("torchao and lora"))
def test_lora_on_torchao(case: Case, blank: Blank | None, tmp_path: Path) -> None:
    pipe = in_int8(case, tmp_path)
    reference = rounded(case, pipe)
    off = run(case, pipe)
    for changed in (pipe, reference):
        add_lora(changed.transformer)
    assert not torch.equal(run(case, pipe), off)
    expect_same(case, pipe, reference)


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
