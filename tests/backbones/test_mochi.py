"""Mochi beyond the contract: half precision, words of padded prompts, concepts, setting processors, time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import tiny_mochi as tiny
from diffusers import MochiPipeline

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones import find_backbone

METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")


@pytest.fixture(scope="module")
def pipe() -> MochiPipeline:
    return tiny.make_pipeline()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_steps_are_told_though_the_pipeline_notes_another_number(dtype: torch.dtype, scale: float) -> None:
    pipe = tiny.make_pipeline().to(dtype)
    off = tiny.call(pipe, ["a red dog"], guidance_scale=scale)
    with dcm.trace(pipe, ["dog"], methods=["gramcol"]) as maps:
        assert torch.equal(tiny.call(pipe, ["a red dog"], guidance_scale=scale), off)
    assert maps.coverage["gramcol"].tolist() == [[True] * 3] * 3


@pytest.mark.parametrize("prompt", ["a red dog", "the red sky on the beach, a red rock"])
def test_words_of_the_prompt(pipe: MochiPipeline, prompt: str) -> None:
    words = prompt.replace(",", " ,").split()
    positions = {"red": [i for i, word in enumerate(words) if word == "red"], "a": [words.index("a")]}
    with dcm.trace(pipe, ["red", "a"], target="prompt", methods=METHODS) as found:
        off = tiny.call(pipe, [prompt])
    with dcm.trace(pipe, target="prompt", prompt_tokens=positions, methods=METHODS) as given:
        assert torch.equal(tiny.call(pipe, [prompt]), off)
    for method in METHODS:
        assert torch.equal(found.get(method), given.get(method))


def test_keys_of_words_are_those_of_their_rows(pipe: MochiPipeline) -> None:
    """Against the block's own projection: in the first block, text is the projected prompt."""
    transformer, inputs = pipe.transformer, tiny.inputs(2, 5, 1)
    with dcm.trace(
        transformer, target="prompt", prompt_tokens={"x": [1, 2]}, methods=["cross_attention"], normalize="none",
        layers=[0],
    ) as maps, torch.no_grad():  # fmt: skip
        transformer(**inputs)
    seen: list[dict[str, Any]] = []
    block = transformer.transformer_blocks[0]
    hook = block.register_forward_pre_hook(lambda _, args, call: seen.append(call), with_kwargs=True)
    with torch.no_grad():
        transformer(**inputs)
        hook.remove()
        normed, *_ = block.norm1(seen[0]["hidden_states"], seen[0]["temb"])
        query = block.attn1.norm_q(block.attn1.to_q(normed).unflatten(2, (4, 16)))
        cosine, sine = seen[0]["image_rotary_emb"]
        even, odd = query[..., 0::2], query[..., 1::2]
        query = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2)
        normed, *_ = block.norm1_context(seen[0]["encoder_hidden_states"], seen[0]["temb"])
        key = block.attn1.norm_added_k(block.attn1.add_k_proj(normed).unflatten(2, (4, 16)))[:, 1:3].mean(1)
    expected = torch.einsum("rnhd,rhd->rn", query, key) / 4 / 16**0.5
    actual = maps.get()[:, 0].flatten(1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("length", [None, 16])
def test_concepts_are_encoded_with_a_mask(pipe: MochiPipeline, length: int | None) -> None:
    random = torch.get_rng_state()
    states, counts = find_backbone(pipe.transformer).encode(pipe, ["dog", "the red rock"], length)
    assert counts == [1, 3]
    assert torch.equal(torch.get_rng_state(), random)
    for text, state, count in zip(["dog", "the red rock"], states, counts, strict=True):
        with torch.no_grad():
            expected = pipe.text_encoder(pipe.tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0]
        torch.testing.assert_close(state[:count], expected[:count], rtol=0, atol=1e-5)


def test_what_cannot_be_encoded() -> None:
    pipe = tiny.make_pipeline()
    backbone = find_backbone(pipe.transformer)
    with pytest.raises(dcm.ConceptMapsError, match="has 13 tokens; expected at most 11"):
        backbone.encode(pipe, ["dog " * 13], None)
    with pytest.raises(dcm.ConceptMapsError, match="'zebra' has no word that the tokenizer knows"):
        backbone.encode(pipe, ["zebra"], None)
    pipe.text_encoder = None
    with pytest.raises(dcm.ConceptMapsError, match="no tokenizer or text encoder"):
        backbone.encode(pipe, ["dog"], None)


def test_processors_are_set_by_the_pipeline(pipe: MochiPipeline) -> None:
    mixed = dcm.with_concept_maps(tiny.make_pipeline())
    processors = dcm.concept_attn_processors(mixed.transformer)
    assert list(processors) == [f"transformer_blocks.{layer}.attn1.processor" for layer in range(3)]
    mixed.set_attn_processor(processors)
    assert [block.attn1.processor for block in mixed.transformer.transformer_blocks] == list(processors.values())
    off = tiny.call(pipe, ["a red dog"])
    with dcm.trace(mixed, ["dog"]) as maps:
        assert torch.equal(tiny.call(mixed, ["a red dog"]), off)
    with dcm.trace(pipe, ["dog"]) as expected:
        tiny.call(pipe, ["a red dog"])
    assert torch.equal(maps.get(), expected.get())


def test_geometry(pipe: MochiPipeline) -> None:
    with dcm.trace(pipe, ["dog"]) as maps:
        tiny.call(pipe, ["a red dog"])
    assert maps.upsample((48, 80), 13).shape == (1, 1, 13, 48, 80)
