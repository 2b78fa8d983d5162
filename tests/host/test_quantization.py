"""Weights in int8: frames are those of the same model without a capture."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from backbones._oracle import kept_state
from diffusers import TorchAoConfig
from host._families import Case, pipeline_of, run, same_maps, traced
from host._features import Blank, cells
from torchao.quantization import Int8WeightOnlyConfig

from diffusers_concept_maps.backbones import find_backbone


@pytest.mark.parametrize(("case", "blank"), cells("torchao"))
def test_torchao(case: Case, blank: Blank | None, tmp_path: Path) -> None:
    """Maps are those of a model with the rounded weights, as near as one product more per output is.

    Those of the unrounded ones are no reference: here every step and layer adds to what rounding changes.
    """
    pipe, rounded = case.pipeline(), case.pipeline()
    pipe.transformer.save_pretrained(tmp_path)
    options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "dtype": torch.float32}
    pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path, **options)
    for site in find_backbone(pipe.transformer).sites(pipe.transformer):
        assert type(site.attention.to_q.weight) is not torch.nn.Parameter
    for name, module in rounded.transformer.named_modules():
        weight = getattr(pipe.transformer.get_submodule(name), "weight", None)
        if isinstance(module, torch.nn.Linear) and type(weight) is not torch.nn.Parameter:
            module.weight.data = weight.dequantize()
    off = run(case, pipe)
    before = kept_state(pipe.transformer)
    on, maps = traced(case, pipe)
    assert torch.equal(on, off)
    assert kept_state(pipe.transformer) == before
    assert torch.equal(run(case, pipe), off)
    assert not torch.equal(off, run(case, pipeline_of(case)))
    plain, expected = traced(case, rounded)
    torch.testing.assert_close(off, plain, rtol=0, atol=1e-4 * float(plain.abs().max()))
    same_maps(case, maps, expected, 1e-4)  # measured 2e-5


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
