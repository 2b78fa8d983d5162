"""The spaces and reads of the ConceptAttention paper against the float64 reference."""

from __future__ import annotations

from functools import cache
from typing import Any

import naive
import naive_variants as variants
import pytest
import torch
from backbones import tiny_cogvideox as tiny
from diffusers import CogVideoXPipeline

import diffusers_concept_maps as dcm

CONCEPTS = ["dog", "red", "sky"]
PROMPTS = ["a red dog running on the beach", "the sky on a rock"]
METHODS = ["concept_attention", "cross_attention", "gramcol", "imap"]
SPACES = ["output", "value", "query_key"]
READS = ["both", "image", "concepts", "none"]
NORMALIZATIONS = ["none", "softmax", "zscore"]
pipeline = tiny.shaken_pipeline


def call(pipe: CogVideoXPipeline, prompt: Any = PROMPTS[0], **options: Any) -> torch.Tensor:
    """Two steps, with a seed that makes no near tie of anchors."""
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(6), **options}
    return tiny.call(pipe, prompt, **settings)


@cache
def embeds() -> torch.Tensor:
    """Text encoder states of the one-token concepts, by hand."""
    ids = pipeline().tokenizer(CONCEPTS, padding="max_length", max_length=tiny.TEXT_LENGTH, return_tensors="pt")
    with torch.no_grad():
        states: torch.Tensor = pipeline().text_encoder(ids.input_ids).last_hidden_state[:, 0]
    return states


def expected(
    pipe: CogVideoXPipeline,
    calls: list[dict[str, Any]],
    rows: slice,
    method: str,
    normalize: str,
    rule: naive.HeadRule = naive.all_heads,
    *,
    space: str = "output",
    reads: str = "both",
) -> torch.Tensor:
    model, maps = variants.VariantCogVideoX(pipe.transformer), []
    for step in calls:
        layers = model.layers(step, rows, embeds(), reads)
        seen = [variants.taps(layer, layer.concepts, space) for layer in layers]
        maps.append([naive.layer_map(method, normalize, taps, tiny.GRID[0], rule) for taps in seen])
    return variants.saliency(maps, tiny.GRID)


def test_the_reference_is_the_one_that_is_checked_against_the_host() -> None:
    pipe = pipeline()
    with tiny.recorded_calls(pipe.transformer) as calls:
        call(pipe, num_inference_steps=1)
    step, concepts = calls[0], embeds().expand(2, -1, -1)
    _, checked = naive.NaiveCogVideoX(pipe.transformer).forward(
        step["hidden_states"], step["encoder_hidden_states"], step["timestep"], step["image_rotary_emb"], concepts
    )
    layers = variants.VariantCogVideoX(pipe.transformer).layers(step, slice(0, 2), embeds())
    assert len(layers) == len(checked) == 3
    for layer, taps in zip(layers, checked, strict=True):
        torch.testing.assert_close(layer.image.query, taps.image_query, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer.image.output, taps.image_output, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer.concepts.key, taps.concept_key, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer.concepts.output, taps.concept_output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("normalize", "rope"), [("none", True), ("softmax", False), ("zscore", True)])
@pytest.mark.parametrize("space", SPACES)
def test_spaces(space: str, normalize: str, rope: bool) -> None:
    pipe = pipeline(rope)
    frames = call(pipe, PROMPTS)
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe, CONCEPTS, space=space, normalize=normalize, branch="both") as maps,
    ):
        traced = call(pipe, PROMPTS)
    assert torch.equal(traced, frames)
    for branch, rows in (("uncond", slice(0, 2)), ("cond", slice(2, 4))):
        reference = expected(pipe, calls, rows, "concept_attention", normalize, space=space)
        variants.assert_close(maps[branch].get(), reference)


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("space", SPACES)
def test_reads_in_every_space(space: str, reads: str) -> None:
    pipe = pipeline()
    methods = METHODS if space == "output" else METHODS[:1]
    frames = call(pipe)
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe, CONCEPTS, methods=methods, normalize="zscore", space=space, reads=reads) as maps,
    ):
        traced = call(pipe)
    assert torch.equal(traced, frames)
    for method in methods:  # the keys that the others compare depend on what concepts read, too
        rule = naive.best_heads(4) if False else naive.all_heads
        of_method = space if method == "concept_attention" else "output"
        reference = expected(pipe, calls, slice(1, 2), method, "zscore", rule, space=of_method, reads=reads)
        variants.assert_close(maps.get(method), reference)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("reads", READS)
def test_reads_and_normalization(reads: str, normalize: str) -> None:
    pipe = pipeline()
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe, CONCEPTS, reads=reads, normalize=normalize) as maps,
    ):
        call(pipe, guidance_scale=1.0)
    variants.assert_close(maps.get(), expected(pipe, calls, slice(0, 1), "concept_attention", normalize, reads=reads))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("heads", [(2,), (0, 3)])
def test_spaces_of_chosen_heads(heads: tuple[int, ...], space: str, normalize: str) -> None:
    pipe = pipeline()
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe, CONCEPTS, space=space, normalize=normalize, heads=heads) as maps,
    ):
        call(pipe, PROMPTS)
    rule = naive.listed_heads(heads)
    reference = expected(pipe, calls, slice(2, 4), "concept_attention", normalize, rule, space=space)
    variants.assert_close(maps.get(), reference)


@pytest.mark.parametrize("space", SPACES)
def test_motion_heads_are_chosen_by_outputs_in_every_space(space: str) -> None:
    pipe = pipeline()
    selection = dcm.HeadSelection(top_k=2)
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe, CONCEPTS, space=space, normalize="none", heads=selection) as maps,
    ):
        call(pipe)
    model, reference = variants.VariantCogVideoX(pipe.transformer), []
    for step in calls:
        of_step = []
        for layer in model.layers(step, slice(1, 2), embeds()):
            chosen = naive.best_heads(2)(variants.taps(layer, layer.concepts), tiny.GRID[0])
            scores = naive.head_maps("concept_attention", variants.taps(layer, layer.concepts, space), tiny.GRID[0])
            of_step.append((scores * chosen[:, :, None, None]).sum(1))
        reference.append(of_step)
    variants.assert_close(maps.get(), variants.saliency(reference, tiny.GRID))


def test_a_single_concept_reads_itself() -> None:
    """With "concepts" a lone concept's attention is on itself alone, which is what "none" gives."""
    tensors = []
    for reads in ("concepts", "none"):
        with dcm.trace(pipeline(), ["dog"], reads=reads) as maps:
            call(pipeline())
        tensors.append(maps.get())
    torch.testing.assert_close(*tensors)


def test_concepts_that_read_no_concepts_do_not_depend_on_each_other() -> None:
    for reads, independent in (("image", True), ("none", True), ("both", False), ("concepts", False)):
        alone, together = [], []
        for concepts, kept in ((["dog"], alone), (["dog", "sky"], together)):
            with dcm.trace(pipeline(), concepts, reads=reads, normalize="none") as maps:
                call(pipeline())
            kept.append(maps["dog"].tensor)
        scale = float(alone[0].abs().max())
        assert ((alone[0] - together[0]).abs().max() < 1e-5 * scale) == independent


def test_every_variant_is_different() -> None:
    tensors = []
    for space, reads in [(space, "both") for space in SPACES] + [("output", reads) for reads in READS[1:]]:
        with dcm.trace(pipeline(), CONCEPTS, space=space, reads=reads, normalize="zscore") as maps:
            call(pipeline())
        tensors.append(maps.get())
    for i, first in enumerate(tensors):
        for second in tensors[:i]:
            assert (first - second).abs().max() > 0.01


@pytest.mark.parametrize(("option", "value"), [("space", "keys"), ("reads", "prompt"), ("reads", "self")])
def test_unknown_choices(option: str, value: str) -> None:
    options: dict[str, Any] = {option: value}
    with (
        pytest.raises(dcm.ConceptMapsError, match=f"unknown {option} '{value}'; expected one of"),
        dcm.trace(pipeline(), CONCEPTS, **options),
    ):
        pass


def test_a_space_without_a_method_that_has_spaces_is_refused() -> None:
    with (
        pytest.raises(dcm.ConceptMapsError, match="space is 'value'"),
        dcm.trace(pipeline(), CONCEPTS, methods=["imap"], space="value"),
    ):
        pass
