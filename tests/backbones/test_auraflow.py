"""AuraFlow: encoder, words of the prompt, timesteps, guidance, fused projections, register tokens."""

from __future__ import annotations

import pytest
import torch
from backbones import tiny_auraflow as tiny
from backbones._case import call_for_images, seeded
from backbones._runs import METHODS, check_run
from diffusers import AuraFlowPipeline

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones.auraflow import BACKBONE

CONCEPTS = ["dog", "red rock", "sky"]
EMBEDS = seeded(3, tiny.WIDTH, seed=5)


@pytest.fixture(scope="module")
def pipe() -> AuraFlowPipeline:
    return tiny.make_pipeline()


@pytest.mark.parametrize("start", [True, False])
def test_concepts_are_encoded_without_marks(start: bool) -> None:
    pipe = tiny.make_pipeline(start)
    states, counts = BACKBONE.encode(pipe, CONCEPTS, None)
    assert counts == [1, 2, 1]
    for text, state, count in zip(CONCEPTS, states, counts, strict=True):
        ids = pipe.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = pipe.text_encoder(ids).last_hidden_state[0, start : start + count]
        torch.testing.assert_close(state[:count], expected, rtol=0, atol=1e-5)
    assert BACKBONE.encode(pipe, ["dog " * 20], 16)[1] == [16 - start - 1]


def test_unknown_and_long_concepts(pipe: AuraFlowPipeline) -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match="'zebra' has no word that the tokenizer knows"):
        BACKBONE.encode(pipe, ["zebra"], None)
    with pytest.raises(dcm.ConceptMapsValueError, match="has 255 tokens; expected at most 254"):
        BACKBONE.encode(pipe, ["dog " * 255], None)


def test_words_of_the_prompt_stand_behind_the_register_tokens(pipe: AuraFlowPipeline) -> None:
    """Positions are those in the prompt."""
    prompt, positions = "a red dog on the beach", {"dog": [3], "red": [2]}
    with dcm.trace(pipe, ["dog", "red"], target="prompt", methods=METHODS) as maps:
        call_for_images(pipe, [prompt])
    with dcm.trace(pipe, target="prompt", prompt_tokens=positions, methods=METHODS) as expected:
        call_for_images(pipe, [prompt])
    for method in METHODS:
        assert torch.equal(maps.get(method), expected.get(method))


def test_maps_of_prompt_tokens() -> None:
    """The prompt's first token equals the only other one, so that both have the map of any of them."""
    transformer, inputs = tiny.make_transformer(), tiny.inputs(1, 3, 1)
    words = inputs["encoder_hidden_states"]
    words[:, 2] = words[:, 0]
    tokens = {"first": [0], "second": [1], "third": [2]}
    with torch.no_grad(), dcm.trace(transformer, target="prompt", prompt_tokens=tokens, normalize="none") as maps:
        transformer(**inputs)
    torch.testing.assert_close(maps["first"].tensor, maps["third"].tensor, rtol=0, atol=1e-4)
    assert (maps["first"].tensor - maps["second"].tensor).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("branch", "rows"), [("cond", slice(2, 4)), ("uncond", slice(0, 2))])
def test_text_to_image(branch: str, rows: slice, dtype: torch.dtype) -> None:
    """The pipeline writes down no timestep, and hands over a rounded copy."""
    pipe = tiny.make_pipeline().to(dtype)
    places = [(step, rows) for step in range(3)]
    prompts = ["a red dog", "the sky"]
    check_run(pipe, lambda: call_for_images(pipe, prompts), EMBEDS, (1, 5, 3), places, passes=3, branch=branch)


def test_without_guidance(pipe: AuraFlowPipeline) -> None:
    places = [(step, slice(None)) for step in range(3)]
    run = lambda: call_for_images(pipe, ["a red dog", "the sky"], guidance_scale=1.0)  # noqa: E731
    check_run(pipe, run, EMBEDS, (1, 5, 3), places, passes=3)


def test_fused_before_the_capture_and_unfused_again() -> None:
    pipe = tiny.make_pipeline()
    places = [(step, slice(1, 2)) for step in range(3)]
    pipe.transformer.fuse_qkv_projections()
    check_run(pipe, lambda: call_for_images(pipe, ["a red dog"]), EMBEDS, (1, 5, 3), places, passes=3)
    pipe.transformer.unfuse_qkv_projections()
    check_run(pipe, lambda: call_for_images(pipe, ["a red dog"]), EMBEDS, (1, 5, 3), places, passes=3)


def test_a_pass_of_somebody_else_is_not_recorded(pipe: AuraFlowPipeline) -> None:
    with dcm.trace(pipe, concept_embeds=EMBEDS, methods=METHODS) as expected:
        call_for_images(pipe, ["a red dog"])
    with dcm.trace(pipe, concept_embeds=EMBEDS, methods=METHODS) as maps:
        call_for_images(pipe, ["a red dog"])
        with torch.no_grad():
            pipe.transformer(**tiny.inputs(2, 5, 1) | {"timestep": torch.full((2,), 0.0123)})
    for method in METHODS:
        assert torch.equal(maps.get(method), expected.get(method))


def test_register_tokens_are_as_many_as_the_model_has() -> None:
    transformer, inputs = tiny.make_transformer(), tiny.inputs(1, 5, 1)
    block = transformer.single_transformer_blocks[0]
    counted = BACKBONE.text_tokens(block, {}, inputs)
    assert counted == transformer.register_tokens.shape[1] + 5
