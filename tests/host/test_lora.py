"""LoRA by PEFT: frames are those of stock with the same LoRA, maps those of a model that has it in its weights."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones._oracle import kept_state
from host._families import CONCEPTS, Case, run, same_maps, traced
from host._features import Blank, cells
from host._lora import add_lora
from peft.utils import get_peft_model_state_dict

import diffusers_concept_maps as dcm

TOLERANCE = 1e-4
"""Of the largest value: float32 rounds the product with a sum otherwise than a sum of products; measured 2e-5."""


def frozen(case: Case) -> Any:
    """A stock pipeline without LoRA, frozen as PEFT leaves it: PyTorch then rounds some products otherwise."""
    pipe = case.pipeline()
    pipe.transformer.requires_grad_(False)
    return pipe


def with_lora(case: Case) -> Any:
    pipe = frozen(case)
    add_lora(pipe.transformer)
    return pipe


def merged(case: Case, pipe: Any, scale: float = 1.0) -> Any:
    """A stock pipeline whose weights have the LoRA of another one in them."""
    result = frozen(case)
    for name, module in result.transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            layer = pipe.transformer.get_submodule(name)
            up, down = (part["default"].weight.detach().double() for part in (layer.lora_B, layer.lora_A))
            module.weight.data = (module.weight.double() + scale * up @ down).float()
    return result


def write_lora(case: Case, folder: Path) -> None:
    transformer = with_lora(case).transformer
    layers = get_peft_model_state_dict(transformer)
    assert any(layer.any() for layer in layers.values())
    type(case.pipeline()).save_lora_weights(folder, transformer_lora_layers=layers)


def expect_same(case: Case, pipe: Any, reference: Any, **options: Any) -> None:
    """Frames are unchanged by a capture, and frames and maps are those of the reference."""
    off = run(case, pipe, **options)
    before = kept_state(pipe.transformer)
    on, maps = traced(case, pipe, **options)
    assert torch.equal(on, off)
    assert kept_state(pipe.transformer) == before
    assert torch.equal(run(case, pipe, **options), off)
    plain, expected = traced(case, reference)
    torch.testing.assert_close(off, plain, rtol=0, atol=TOLERANCE * float(plain.abs().max()))
    same_maps(case, maps, expected, TOLERANCE)


@pytest.mark.parametrize(("case", "blank"), cells("lora"))
def test_weights_from_a_file(case: Case, blank: Blank | None, tmp_path: Path) -> None:
    write_lora(case, tmp_path)
    pipe, adapted, stock = frozen(case), with_lora(case), frozen(case)
    pipe.load_lora_weights(tmp_path)
    off, expected = run(case, adapted), traced(case, adapted)[1]
    assert torch.equal(run(case, pipe), off)
    assert not torch.equal(run(case, stock), off)
    expect_same(case, pipe, merged(case, adapted))

    during = frozen(case)
    with dcm.trace(during, CONCEPTS, methods=case.methods) as maps:
        during.load_lora_weights(tmp_path)
        assert torch.equal(run(case, during), off)
        same_maps(case, maps, expected, 0.0)
        during.unload_lora_weights()
        assert torch.equal(run(case, during), run(case, stock))
    same_maps(case, maps, traced(case, stock)[1], 0.0)


@pytest.mark.parametrize(("case", "blank"), cells("lora scale"))
def test_a_scale_for_one_run(case: Case, blank: Blank | None) -> None:
    """Concepts enter the model under the scale too, which diffusers sets within the forward pass."""
    pipe = with_lora(case)
    (kwargs,) = {"attention_kwargs", "joint_attention_kwargs"} & set(inspect.signature(type(pipe).__call__).parameters)
    expect_same(case, pipe, merged(case, pipe, 0.5), **{kwargs: {"scale": 0.5}})
    expect_same(case, pipe, merged(case, pipe))


@pytest.mark.parametrize(("case", "blank"), cells("adapters"))
def test_adapters_come_and_go_while_attached(case: Case, blank: Blank | None) -> None:
    """In the same capture; the maps are those of the run that was last."""
    pipe = frozen(case)
    transformer = pipe.transformer
    adapted = with_lora(case)
    off, expected = run(case, adapted), traced(case, adapted)[1]
    stock, plain = traced(case, frozen(case))
    with dcm.trace(pipe, CONCEPTS, methods=case.methods) as maps:
        add_lora(transformer)
        assert torch.equal(run(case, pipe), off)
        same_maps(case, maps, expected, 0.0)
        transformer.disable_adapters()
        assert torch.equal(run(case, pipe), stock)
        same_maps(case, maps, plain, 0.0)
        transformer.enable_adapters()
        assert torch.equal(run(case, pipe), off)
        same_maps(case, maps, expected, 0.0)
        transformer.delete_adapters("default")
        assert torch.equal(run(case, pipe), stock)
    same_maps(case, maps, plain, 0.0)


@pytest.mark.parametrize(("case", "blank"), cells("fuse lora"))
def test_fused_weights(case: Case, blank: Blank | None) -> None:
    pipe, during = with_lora(case), with_lora(case)
    pipe.fuse_lora()
    expect_same(case, pipe, merged(case, pipe))
    off, expected = traced(case, pipe)
    with dcm.trace(during, CONCEPTS, methods=case.methods) as maps:
        during.fuse_lora()
        assert torch.equal(run(case, during), off)
        same_maps(case, maps, expected, 0.0)
        during.unfuse_lora()
        pipe.unfuse_lora()
        assert torch.equal(run(case, during), run(case, pipe))
    same_maps(case, maps, traced(case, pipe)[1], 0.0)
