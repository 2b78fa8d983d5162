"""Sana-Video: images, the instruction in front of prompts, encoding, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from inspect import signature
from typing import Any

import pytest
import torch
from backbones import test_contract
from backbones import tiny_sana_video as tiny
from backbones._case import Case
from backbones._oracle import embeds_of
from diffusers import FlowMatchEulerDiscreteScheduler, SanaImageToVideoPipeline, SanaVideoPipeline
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones.sana_video import BACKBONE

METHODS = ("cross_attention", "gramcol", "imap")
INSTRUCTION = signature(SanaVideoPipeline.__call__).parameters["complex_human_instruction"].default


@cache
def pipeline() -> Any:
    return tiny.make_pipeline()


@cache
def image_pipeline() -> Any:
    return tiny.make_pipeline(SanaImageToVideoPipeline, FlowMatchEulerDiscreteScheduler())


def picture() -> Image.Image:
    pixels = torch.randint(0, 256, (96, 160, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_image_to_video() -> None:
    """The image is the first frame of the grid; its timestep is zero."""
    case = replace(tiny.CASES[0], name="image", pipeline=image_pipeline, call=partial(tiny.call, image=picture()))
    checks = test_contract.TestPipeline()
    checks.test_frames_are_unchanged(case)
    checks.test_steps_and_branches(case)
    (_, given), *_ = test_contract.recorded_calls(case, image_pipeline(), ["a red dog", "the sky"])
    assert given["timestep"].shape == (4, 1, 3, 3, 5)


def test_without_norms() -> None:
    checks = test_contract.TestTransformer()
    checks.test_the_output_is_unchanged_and_the_undo_exact(tiny.PLAIN, 2)
    checks.test_maps_are_those_of_the_oracle(tiny.PLAIN)


@pytest.mark.parametrize("case", [*tiny.CASES, tiny.PLAIN], ids=str)
def test_text_without_a_mask(case: Case) -> None:
    transformer, inputs = case.make(), case.inputs(2, 5, 1) | {"encoder_attention_mask": None}
    with torch.no_grad():
        off = transformer(**inputs, return_dict=False)[0]
        with dcm.trace(transformer, concept_embeds=embeds_of(case), methods=METHODS):
            assert torch.equal(transformer(**inputs, return_dict=False)[0], off)


def test_a_concept_that_is_a_text_token_has_its_map() -> None:
    """The key of a concept is that of a text row with the same states, mask or no mask."""
    transformer, inputs = tiny.make_transformer(), tiny.inputs(1, 5, 1)
    options: dict[str, Any] = {"methods": METHODS, "normalize": "none"}
    with torch.no_grad():
        with dcm.trace(transformer, target="prompt", prompt_tokens={"first": [0], "masked": [4]}, **options) as words:
            transformer(**inputs)
        with dcm.trace(transformer, concept_embeds=inputs["encoder_hidden_states"][0, [0, 4]], **options) as concepts:
            transformer(**inputs)
    for method in METHODS:
        torch.testing.assert_close(words.get(method), concepts.get(method), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", ["a red dog on the beach", "  The RED İ dog "])
def test_rows_of_the_prompt(prompt: str) -> None:
    """Every text row that stands for characters of the prompt has the states of their token behind the instruction."""
    pipe = pipeline()
    spans = BACKBONE.token_spans(pipe, prompt, 12)
    assert len(spans) == 12
    covered = [prompt[start:stop] for start, stop in spans if stop > start]
    assert [word.strip().lower() for word in covered] == prompt.lower().split()
    rows = [row for row, (start, stop) in enumerate(spans) if stop > start]
    instruction = "\n".join(INSTRUCTION)
    ids = pipe.tokenizer(instruction + prompt.lower().strip(), return_tensors="pt").input_ids
    with torch.no_grad():
        states, *_ = pipe.encode_prompt(prompt, False, max_sequence_length=12, complex_human_instruction=INSTRUCTION)
        expected = pipe.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(states[0, rows], expected[0, -len(rows) :], rtol=1e-4, atol=1e-5)


def test_words_of_the_prompt() -> None:
    pipe = pipeline()
    with dcm.trace(pipe, ["dog", "Red"], methods=METHODS, target="prompt") as words:
        off = tiny.call(pipe, ["the Red dog"])
    with dcm.trace(pipe, methods=METHODS, target="prompt", prompt_tokens={"dog": [3], "Red": [2]}) as positions:
        assert torch.equal(tiny.call(pipe, ["the Red dog"]), off)
    for method in METHODS:
        assert torch.equal(words.get(method), positions.get(method))


def test_words_are_not_looked_for_behind_another_instruction() -> None:
    with (
        pytest.raises(dcm.ConceptMapsError, match="^complex_human_instruction gives the text of this run"),
        dcm.trace(pipeline(), ["dog"], methods=METHODS, target="prompt"),
    ):
        tiny.call(pipeline(), ["the red dog"], complex_human_instruction=["the sky"])


def test_no_instruction() -> None:
    """Where a pipeline has none by default, the prompt stands right behind the start mark."""

    class Plain(SanaVideoPipeline):
        def __call__(self, *args: Any, complex_human_instruction: Any = None, **options: Any) -> Any:
            return super().__call__(*args, complex_human_instruction=complex_human_instruction, **options)

    pipe = Plain(**pipeline().components)
    assert BACKBONE.token_spans(pipe, "a dog", 6) == [(0, 0), (0, 1), (1, 5), (0, 0), (0, 0), (0, 0)]
    states, counts = BACKBONE.encode(pipe, ["dog", "red dog"], 6)
    assert counts == [1, 2]
    with torch.no_grad():
        expected = pipe.text_encoder(pipe.tokenizer("red dog", return_tensors="pt").input_ids).last_hidden_state
    torch.testing.assert_close(states[1, :2], expected[0, 1:], rtol=1e-4, atol=1e-5)


def test_encode() -> None:
    """States of the words behind the default instruction; that the word before is another one, changes them."""
    pipe, random = pipeline(), torch.get_rng_state()
    states, counts = BACKBONE.encode(pipe, ["Red dog", "sky"], None)
    assert torch.equal(torch.get_rng_state(), random)
    assert counts == [2, 1]
    for text, own, count in zip(["red dog", "sky"], states, counts, strict=True):
        ids = pipe.tokenizer("\n".join(INSTRUCTION) + text, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = pipe.text_encoder(ids).last_hidden_state[0, -count:]
        torch.testing.assert_close(own[:count], expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_encoded() -> None:
    pipe = pipeline()
    with pytest.raises(dcm.ConceptMapsError, match="has 13 tokens; expected at most 10"):
        BACKBONE.encode(pipe, ["a dog " * 6 + "sky"], 12)
    with pytest.raises(dcm.ConceptMapsError, match="no word that the tokenizer knows"):
        dcm.trace(pipe, ["zebra"], methods=METHODS).__enter__()
    bare = SanaVideoPipeline(**(pipe.components | {"tokenizer": None, "text_encoder": None}))
    with pytest.raises(dcm.ConceptMapsError, match="SanaVideoPipeline has no tokenizer or text encoder"):
        dcm.trace(bare, ["dog"], methods=METHODS).__enter__()


def test_geometry() -> None:
    with dcm.trace(pipeline(), ["dog"], methods=METHODS) as maps:
        tiny.call(pipeline(), ["a red dog"])
    assert maps.metadata["frames_per_latent"] == pipeline().vae_scale_factor_temporal
    assert maps.upsample((96, 160), 9).shape == (1, 1, 9, 96, 160)
    ltx2 = tiny.make_transformer(in_channels=128)
    assert BACKBONE.geometry(ltx2) == {"frames_per_latent": 8, "latents_per_token": 1}
