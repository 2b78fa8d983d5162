"""`torch.compile(fullgraph=True)` of a whole transformer, of its blocks and of its attention, while it is traced."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backbones._case import find_cases
from backbones._oracle import embeds_of, kept_state
from host._families import COGVIDEOX, CONCEPTS, PROMPTS, SD3, TWO, WAN, Case, run, same_maps, traced
from host._features import Blank, cells, refused
from torch._dynamo.utils import counters

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones import find_backbone
from diffusers_concept_maps.processors import ConceptProcessor


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def whole(pipe: Any, backend: str) -> None:
    pipe.transformer.compile(fullgraph=True, backend=backend)


def wrapped(pipe: Any, backend: str) -> None:
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=backend)


def blocks(pipe: Any, backend: str) -> None:
    for site in find_backbone(pipe.transformer).sites(pipe.transformer):
        site.block.compile(fullgraph=True, backend=backend)


def wrapped_blocks(pipe: Any, backend: str) -> None:
    for name, child in pipe.transformer.named_children():
        if isinstance(child, torch.nn.ModuleList) and name.endswith("blocks"):
            for index, block in enumerate(child):
                child[index] = torch.compile(block, fullgraph=True, backend=backend)


def attentions(pipe: Any, backend: str) -> None:
    for site in find_backbone(pipe.transformer).sites(pipe.transformer):
        site.attention.compile(fullgraph=True, backend=backend)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def expect_same(case: Case, pipe: Any, how: Callable[[Any, str], None], backend: str = "eager") -> None:
    """Frames are those of the compiled stock, maps those of eager, and a second capture compiles nothing anew."""
    plain, expected = traced(case, pipe)
    how(pipe, backend)
    off, before = run(case, pipe), kept_state(pipe.transformer)
    first, maps = traced(case, pipe)
    count = graphs()
    again, anew = traced(case, pipe)
    torch.testing.assert_close(off, plain)
    assert torch.equal(first, off)
    assert torch.equal(again, off)
    same_maps(case, maps, expected)
    same_maps(case, anew, expected)
    assert graphs() == count > 0
    assert kept_state(pipe.transformer) == before
    assert torch.equal(run(case, pipe), off)
    assert graphs() == count


@pytest.mark.parametrize(("case", "blank"), cells("compile"))
def test_a_whole_transformer(case: Case, blank: Blank | None) -> None:
    expect_same(case, case.pipeline(), whole)


@pytest.mark.parametrize(("case", "blank"), cells("compile blocks"))
def test_every_block(case: Case, blank: Blank | None) -> None:
    expect_same(case, case.pipeline(), blocks)


@pytest.mark.parametrize(("case", "blank"), cells("compile repeated blocks"))
def test_repeated_blocks(case: Case, blank: Blank | None) -> None:
    def how(pipe: Any, backend: str) -> None:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)

    if not refused(blank, lambda: how(case.pipeline(), "eager")):
        expect_same(case, case.pipeline(), how)


@pytest.mark.parametrize("name", ["SD3", "AuraFlow", "Chroma"])
def test_texts_of_other_lengths_need_few_graphs(name: str) -> None:
    """Graphs become dynamic under a capture as well; single blocks of the last two are not told where text ends."""
    case = next(case for case in find_cases() if case.name == name)
    pipe, plain = SimpleNamespace(transformer=case.make()), case.make()
    blocks(pipe, "eager")
    counts = []
    for length in (5, 3, 7, 4, 6):
        inputs, traces = case.inputs(2, length, 1), []
        for transformer in (plain, pipe.transformer):
            with torch.no_grad(), dcm.trace(transformer, concept_embeds=embeds_of(case), methods=case.methods) as maps:
                transformer(**inputs)
            traces.append(maps)
        same_maps(case, traces[1], traces[0])
        counts.append(graphs())
    assert counts[1:] == counts[1:2] * 4


@pytest.mark.parametrize("how", [wrapped, wrapped_blocks, attentions])
def test_other_ways_to_compile(how: Callable[[Any, str], None]) -> None:
    expect_same(SD3, SD3.pipeline(), how)


def test_graphs_that_are_lowered() -> None:
    """Below Dynamo, too, no op is lost or moved."""
    expect_same(SD3, SD3.pipeline(), whole, "aot_eager")


def test_layers_and_steps_that_are_left_out_and_kept_axes() -> None:
    """A graph hands over what the deepest layer needs in every step; which steps are recorded compiles nothing."""
    pipe = SD3.pipeline()
    options = {"layers": [0, 1], "steps": [1], "detail": ("layer", "head"), "branch": "both"}
    with dcm.trace(pipe, CONCEPTS, **options) as expected:
        run(SD3, pipe)
    whole(pipe, "eager")
    with dcm.trace(pipe, CONCEPTS, layers=[0, 1]):
        run(SD3, pipe)
    count = graphs()
    with dcm.trace(pipe, CONCEPTS, **options) as maps:
        run(SD3, pipe)
    assert graphs() == count
    for branch in ("cond", "uncond"):
        assert torch.equal(maps[branch].coverage["concept_attention"], expected[branch].coverage["concept_attention"])
        torch.testing.assert_close(maps[branch].get(), expected[branch].get(), rtol=0, atol=1e-6)
        torch.testing.assert_close(maps[branch].detail(), expected[branch].detail(), rtol=0, atol=1e-6)


def test_prompt_words_and_installed_processors() -> None:
    pipe = SD3.pipeline()
    with dcm.trace(pipe, ["red"], target="prompt", methods=["cross_attention"]) as expected:
        SD3.call(pipe, ["a red dog"])
    pipe.transformer.set_attn_processor(dcm.concept_attn_processors(pipe.transformer))
    whole(pipe, "eager")
    off = SD3.call(pipe, ["a red dog"])
    with dcm.trace(pipe, ["red"], target="prompt", methods=["cross_attention"]) as maps:
        assert torch.equal(SD3.call(pipe, ["a red dog"]), off)
    torch.testing.assert_close(maps.get(), expected.get(), rtol=0, atol=1e-6)


def test_a_hook_that_raises_in_a_compiled_model_leaves_nothing() -> None:
    pipe = SD3.pipeline()
    whole(pipe, "eager")
    off, before = run(SD3, pipe), kept_state(pipe.transformer)
    with pytest.raises(dcm.ConceptMapsError, match="step 7 is out of range"), dcm.trace(pipe, CONCEPTS, steps=[7]):
        run(SD3, pipe)
    assert kept_state(pipe.transformer) == before
    assert torch.equal(run(SD3, pipe), off)


def test_a_forward_that_was_wrapped_meanwhile_goes_on_working() -> None:
    pipe = SD3.pipeline()
    blocks(pipe, "eager")
    off, block = run(SD3, pipe), pipe.transformer.transformer_blocks[0]
    with dcm.trace(pipe, CONCEPTS):
        inner = block.forward
        block.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert torch.equal(run(SD3, pipe), off)


@pytest.mark.parametrize("how", [whole, wrapped, blocks])
def test_compiling_within_a_capture_is_refused(how: Callable[[Any, str], None]) -> None:
    pipe = SD3.pipeline()
    with dcm.trace(pipe, CONCEPTS):
        how(pipe, "eager")
        with pytest.raises(torch._dynamo.exc.Unsupported, match="compiled during the capture; compile it before"):
            run(SD3, pipe)


@pytest.mark.parametrize("how", [whole, blocks])
def test_one_pass_refuses_graphs(how: Callable[[Any, str], None]) -> None:
    pipe = COGVIDEOX.pipeline()
    how(pipe, "eager")
    capture = dcm.trace(pipe, CONCEPTS, attention="one_pass")
    with pytest.raises(dcm.ConceptMapsError, match="does not work with torch.compile"), capture:
        pass


def test_cross_attention_that_does_not_say_how_it_projects_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = WAN.pipeline()
    whole(pipe, "eager")
    cross = type(dcm.concept_attn_processors(pipe.transformer)["blocks.0.attn2.processor"])
    monkeypatch.setattr(cross, "project_key", ConceptProcessor.project_key)
    message = "ConceptWanAttnProcessor has no `project_key`, so that a compiled model cannot be traced"
    with dcm.trace(pipe, CONCEPTS, methods=WAN.methods), pytest.raises(dcm.ConceptMapsError, match=message):
        run(WAN, pipe)


def test_two_compiled_transformers_in_one_pipeline() -> None:
    """Experts for high and low noise, of which each has graphs of its own."""
    pipe = TWO.pipeline()
    plain, expected = traced(TWO, pipe)
    pipe.transformer.compile(fullgraph=True, backend="eager")
    pipe.transformer_2 = torch.compile(pipe.transformer_2, fullgraph=True, backend="eager")
    off = run(TWO, pipe)
    on, maps = traced(TWO, pipe)
    assert torch.equal(on, off)
    same_maps(TWO, maps, expected)


def test_a_pipeline_that_returns_maps_around_a_compiled_transformer() -> None:
    pipe = SD3.pipeline()
    _, expected = traced(SD3, pipe)
    wrapped(pipe, "eager")
    off, mixed = run(SD3, pipe), dcm.with_concept_maps(pipe)
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 20, "width": 12, "output_type": "latent"}
    output = mixed(
        PROMPTS, concepts=CONCEPTS, max_sequence_length=12, generator=torch.Generator().manual_seed(0), **options
    )
    assert torch.equal(output.images, off)
    torch.testing.assert_close(output.concept_maps.get(), expected.get(), rtol=0, atol=1e-5)
