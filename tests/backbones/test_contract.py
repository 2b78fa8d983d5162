"""What holds for every backbone: unchanged outputs, exact undo, maps of a float64 oracle, steps and branches."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from backbones._case import Case, Inputs, cast_inputs, find_cases
from backbones._oracle import embeds_of, kept_state, layer_taps
from backbones._runs import check_training
from naive import all_heads, best_heads, saliency

import diffusers_concept_maps as dcm

CASES = find_cases()
PIPELINES = [case for case in CASES if case.pipeline is not None]
NORMALIZATIONS = {"concept_attention": "softmax", "cross_attention": "softmax", "gramcol": "zscore", "imap": "zscore"}
CONCEPTS = ["dog", "sky", "red"]


@cache
def transformer_of(case: Case) -> Any:
    return case.make()


@cache
def pipeline_of(case: Case) -> Any:
    assert case.pipeline is not None
    return case.pipeline()


def output_of(transformer: Any, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=tolerance * expected.abs().max().item()
    )


@pytest.mark.parametrize("case", CASES, ids=str)
class TestTransformer:
    @pytest.mark.parametrize("batch", [1, 2])
    def test_the_output_is_unchanged_and_the_undo_exact(self, case: Case, batch: int) -> None:
        transformer = transformer_of(case)
        for length in case.text_lengths:
            inputs = case.inputs(batch, length, 1)
            before, off, random = kept_state(transformer), output_of(transformer, inputs), torch.get_rng_state()
            with dcm.trace(transformer, concept_embeds=embeds_of(case), methods=case.methods) as maps:
                on = output_of(transformer, inputs)
            assert off.isfinite().all()
            assert torch.equal(on, off)
            assert torch.equal(output_of(transformer, inputs), off)
            assert torch.equal(torch.get_rng_state(), random)
            assert kept_state(transformer) == before
            for method in case.methods:
                assert maps.get(method).shape == (batch, 3, *case.grid)
                assert maps.get(method).isfinite().all()
                assert (maps.get(method).flatten(2).std(-1) > 1e-6).all() or not case.has_maps(length)

    def test_an_exception_in_a_layer_undoes_as_well(self, case: Case) -> None:
        transformer, inputs = transformer_of(case), case.inputs(1, case.text_lengths[-1], 1)
        off = output_of(transformer, inputs)
        last = [module for module in transformer.modules() if hasattr(module, "processor")][-1]
        hook = last.register_forward_hook(lambda *_: 1 // 0)
        before = kept_state(transformer)
        capture = dcm.trace(transformer, concept_embeds=embeds_of(case), methods=case.methods)
        with pytest.raises(ZeroDivisionError), capture:
            output_of(transformer, inputs)
        assert kept_state(transformer) == before
        hook.remove()
        assert torch.equal(output_of(transformer, inputs), off)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, case: Case, dtype: torch.dtype) -> None:
        transformer, inputs = case.make().to(dtype), cast_inputs(case.inputs(2, case.text_lengths[-1], 1), dtype)
        off = output_of(transformer, inputs)
        with dcm.trace(transformer, concept_embeds=embeds_of(case), methods=case.methods) as maps:
            on = output_of(transformer, inputs)
        assert off.isfinite().all()
        assert torch.equal(on, off)
        assert all(maps.get(method).isfinite().all() for method in case.methods)

    def test_training_with_checkpoints_is_unchanged(self, case: Case) -> None:
        check_training(case.make, case.inputs(2, case.text_lengths[-1], 1), embeds_of(case), case.methods)

    def test_idle_processors_are_the_stock_ones(self, case: Case) -> None:
        transformer, inputs = case.make(), case.inputs(2, case.text_lengths[-1], 1)
        off = output_of(transformer, inputs)
        for name, processor in dcm.concept_attn_processors(transformer).items():
            transformer.get_submodule(name.removesuffix(".processor")).processor = processor
        assert torch.equal(output_of(transformer, inputs), off)
        with dcm.trace(transformer, concept_embeds=embeds_of(case), methods=case.methods) as adopted:
            assert torch.equal(output_of(transformer, inputs), off)
        with dcm.trace(transformer_of(case), concept_embeds=embeds_of(case), methods=case.methods) as swapped:
            output_of(transformer_of(case), inputs)
        assert all(torch.equal(adopted.get(method), swapped.get(method)) for method in case.methods)

    def test_maps_are_those_of_the_oracle(self, case: Case) -> None:
        for length in filter(case.has_maps, case.text_lengths):
            inputs, embeds = case.inputs(2, length, 3), embeds_of(case)
            taps = layer_taps(case, inputs, embeds)
            for method in case.methods:
                chosen = dcm.HeadSelection(top_k=2) if method == "imap" else None
                with dcm.trace(transformer_of(case), concept_embeds=embeds, methods=[method], heads=chosen) as maps:
                    output_of(transformer_of(case), inputs)
                rule = best_heads(2) if method == "imap" and case.grid[0] > 1 else all_heads
                close(maps.get(), saliency([taps], method, NORMALIZATIONS[method], case.grid, rule))


@pytest.mark.parametrize("case", PIPELINES, ids=str)
class TestPipeline:
    def test_frames_are_unchanged(self, case: Case) -> None:
        pipe = pipeline_of(case)
        off = case.call(pipe, ["a red dog"])
        with dcm.trace(pipe, CONCEPTS, methods=case.methods) as maps:
            on = case.call(pipe, ["a red dog"])
        assert torch.equal(on, off)
        assert torch.equal(case.call(pipe, ["a red dog"]), off)
        assert maps.coverage[case.methods[0]].any(1).tolist() == [True] * 3

    def test_encoding_draws_no_random_numbers(self, case: Case) -> None:
        pipe, random = pipeline_of(case), torch.get_rng_state()
        pipe.text_encoder.train()
        try:
            with dcm.trace(pipe, CONCEPTS, methods=case.methods):
                pass
        finally:
            pipe.text_encoder.eval()
        assert torch.equal(torch.get_rng_state(), random)

    @pytest.mark.parametrize("missing", ["tokenizer", "text_encoder"])
    def test_without_an_encoder_concepts_are_refused(
        self, case: Case, missing: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipe = pipeline_of(case)
        monkeypatch.setattr(pipe, missing, None)
        capture = dcm.trace(pipe, CONCEPTS, methods=case.methods)
        with pytest.raises(dcm.ConceptMapsError, match="has no tokenizer or text encoder"), capture:
            pass

    def test_steps_and_branches(self, case: Case) -> None:
        """Maps of a branch and step are those of a bare transformer with what it was given then."""
        pipe, embeds = pipeline_of(case), embeds_of(case)
        calls = recorded_calls(case, pipe, ["a red dog", "the sky"])
        branches = ("cond",) if case.guidance == "none" else ("cond", "uncond")
        for branch in branches:
            for step in (0, 2):
                with dcm.trace(pipe, concept_embeds=embeds, methods=case.methods, steps=[step], branch=branch) as maps:
                    case.call(pipe, ["a red dog", "the sky"])
                transformer, inputs, rows = call_of(case, calls, step, branch)
                with dcm.trace(transformer, concept_embeds=embeds, methods=case.methods) as expected:
                    output_of(transformer, inputs)
                for method in case.methods:
                    close(maps.get(method), expected.get(method)[rows], 1e-5)  # of another batch size

    def test_rows_are_videos(self, case: Case) -> None:
        """The rows of two prompts with two videos each are those of the transformer's own batch, in its order."""
        pipe, embeds, prompts = pipeline_of(case), embeds_of(case, 6), ["a red dog", "the sky"]
        options = {case.frames_per_prompt: 2}
        calls = recorded_calls(case, pipe, prompts, **options)
        own = embeds[:4, None].repeat(1, 2, 1)  # another pair of concepts for every row
        own[:, 1] = embeds[4]
        with dcm.trace(pipe, concept_embeds=own, methods=case.methods, steps=[1]) as maps:
            assert case.call(pipe, prompts, **options).shape[0] == 4
        transformer, inputs, rows = call_of(case, calls, 1, "cond")
        for row in range(4):
            with dcm.trace(transformer, concept_embeds=own[row], methods=case.methods) as expected:
                output_of(transformer, inputs)
            for method in case.methods:
                close(maps.get(method)[row], expected.get(method)[rows][row])


def recorded_calls(case: Case, pipe: Any, prompts: list[str], **options: Any) -> list[tuple[Any, Inputs]]:
    """Every forward pass of a run: the transformer and its arguments."""
    calls: list[tuple[Any, Inputs]] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        named = dict(zip(list(inspect.signature(type(module).forward).parameters)[1:], args, strict=False)) | kwargs
        named["hidden_states"] = named["hidden_states"].clone()  # some pipelines update their latents in place
        calls.append((module, {name: value for name, value in named.items() if name != "return_dict"}))

    transformers = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    hooks = [t.register_forward_pre_hook(note, with_kwargs=True) for t in transformers if t is not None]
    try:
        case.call(pipe, prompts, **options)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def call_of(case: Case, calls: list[tuple[Any, Inputs]], step: int, branch: str) -> tuple[Any, Inputs, slice]:
    """The forward pass of a step and branch, and the rows of its batch that belong to the branch."""
    if case.guidance == "two passes":
        transformer, inputs = calls[2 * step + (branch == "uncond")]
        return transformer, inputs, slice(None)
    transformer, inputs = calls[step]
    batch = inputs["hidden_states"].shape[0]
    if case.guidance == "none":
        return transformer, inputs, slice(None)
    return transformer, inputs, slice(batch // 2, None) if branch == "cond" else slice(0, batch // 2)
