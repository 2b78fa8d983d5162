"""One `ConceptAttnProcessor` for all modules of a model, in every family whose modules tell what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones._case import Case, find_cases
from backbones._oracle import embeds_of, kept_state
from host._families import CONCEPTS, FLUX, SD3, WAN, run, same_maps, traced
from host._features import Blank, cells

import diffusers_concept_maps as dcm

# Modules of the host's one class for everything, in a structure that several families have, with other arithmetic.
UNKNOWN = ("AuraFlow", "Cosmos", "HunyuanVideo 1.5", "Mochi", "Qwen-Image", "Sana-Video")
CASES = [case for case in find_cases() if not case.name.startswith("Kandinsky")]


def output_of(transformer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def install(transformer: Any) -> None:
    """One router in all modules, also of models without `set_attn_processor`."""
    router = dcm.ConceptAttnProcessor()
    for module in transformer.modules():
        if hasattr(module, "processor"):
            module.processor = router


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_output_is_that_of_the_stock_processors_or_an_error(case: Case) -> None:
    transformer, inputs = case.make(), case.inputs(2, case.text_lengths[-1], 1)
    off = output_of(transformer, inputs)
    with dcm.trace(transformer, concept_embeds=embeds_of(case), methods=case.methods) as expected:
        output_of(transformer, inputs)
    install(transformer)
    if case.name.startswith(UNKNOWN):
        with pytest.raises(dcm.ConceptMapsError, match="is not known to ConceptAttnProcessor; use set_attn_processor"):
            output_of(transformer, inputs)
        return
    assert torch.equal(output_of(transformer, inputs), off)
    before = kept_state(transformer)
    with dcm.trace(transformer, concept_embeds=embeds_of(case), methods=case.methods) as maps:
        assert torch.equal(output_of(transformer, inputs), off)
    same_maps(case, maps, expected, 0.0)
    assert kept_state(transformer) == before


@pytest.mark.parametrize(("case", "blank"), cells("router"))
def test_a_router_in_a_pipeline(case: Case, blank: Blank | None) -> None:
    pipe = case.pipeline()
    off, expected = traced(case, pipe)
    pipe.transformer.set_attn_processor(dcm.ConceptAttnProcessor())
    assert torch.equal(run(case, pipe), off)
    on, maps = traced(case, pipe)
    assert torch.equal(on, off)
    same_maps(case, maps, expected, 0.0)


@pytest.mark.parametrize("case", [FLUX, SD3, WAN], ids=str)
def test_a_router_when_projections_are_fused(case: Case) -> None:
    pipe, fused = case.pipeline(), case.pipeline()
    fused.transformer.fuse_qkv_projections()
    off, expected = traced(case, fused)
    pipe.transformer.set_attn_processor(dcm.ConceptAttnProcessor())
    run(case, pipe)
    fuse = pipe.transformer.fuse_qkv_projections
    fuse()
    if case is SD3:  # which takes the router out
        pipe.transformer.set_attn_processor(dcm.ConceptAttnProcessor())
    on, maps = traced(case, pipe)
    assert torch.equal(on, off)
    same_maps(case, maps, expected, 0.0)


def test_a_router_passes_on_the_backend() -> None:
    pipe, stock = WAN.pipeline(), WAN.pipeline()
    before = dcm.ConceptAttnProcessor._attention_backend
    for other in (pipe, stock):
        if other is pipe:
            other.transformer.set_attn_processor(dcm.ConceptAttnProcessor())
        for processor in other.transformer.attn_processors.values():
            processor._attention_backend = "_native_math"
    with dcm.trace(pipe, CONCEPTS, methods=WAN.methods):
        assert torch.equal(run(WAN, pipe), run(WAN, stock))
    assert not torch.equal(run(WAN, pipe), run(WAN, WAN.pipeline()))
    assert dcm.ConceptAttnProcessor._attention_backend is before is None
