"""LTX-Video: images and conditions, words of the prompt, encoding, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from backbones import test_contract
from backbones import tiny_ltx as tiny
from backbones._case import Case
from backbones._oracle import embeds_of
from diffusers import LTXConditionPipeline, LTXImageToVideoPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones.ltx import BACKBONE

METHODS = ("cross_attention", "gramcol", "imap")
PROMPTS = ["a red dog", "the sky"]


@cache
def pipeline(cls: Any = tiny.LTXPipeline) -> Any:
    return tiny.make_pipeline(cls)


def picture(seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (96, 160, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def variant(name: str, cls: Any, **options: Any) -> Case:
    """Another pipeline around the first of the tiny transformers; conditions are those of one video."""

    def call(pipe: Any, prompts: list[str]) -> torch.Tensor:
        return tiny.call(pipe, prompts[:1] if "conditions" in options else prompts, **options)

    return replace(tiny.CASES[0], name=name, pipeline=lambda: pipeline(cls), call=call)


def condition(frame: int, pictures: int = 1) -> LTXVideoCondition:
    """A picture at a frame, or a video that begins there."""
    if pictures == 1:
        return LTXVideoCondition(image=picture(), frame_index=frame, strength=0.9)
    return LTXVideoCondition(video=[picture(seed) for seed in range(pictures)], frame_index=frame)


VARIANTS = {
    variant("image to video", LTXImageToVideoPipeline, image=picture()): 45,
    variant("no conditions", LTXConditionPipeline): 45,
    variant("first frame", LTXConditionPipeline, conditions=[condition(0)]): 45,
    variant("later frame", LTXConditionPipeline, conditions=[condition(8)]): 60,
    # Of a video at a later frame two latent frames stand in front of the grid, whatever follows is part of it.
    variant("later video", LTXConditionPipeline, conditions=[condition(0), condition(8, pictures=9)]): 75,
}
"""Numbers of video tokens, those in front of the grid included."""


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_pipelines(case: Case) -> None:
    checks = test_contract.TestPipeline()
    checks.test_frames_are_unchanged(case)
    checks.test_steps_and_branches(case)
    (_, given), *_ = test_contract.recorded_calls(case, test_contract.pipeline_of(case), PROMPTS)
    assert given["hidden_states"].shape[1] == VARIANTS[case]


@pytest.mark.parametrize("case", tiny.CASES, ids=str)
def test_text_without_a_mask(case: Case) -> None:
    transformer, inputs = case.make(), case.inputs(2, 5, 1) | {"encoder_attention_mask": None}
    with torch.no_grad():
        off = transformer(**inputs, return_dict=False)[0]
        with dcm.trace(transformer, concept_embeds=embeds_of(case), methods=METHODS):
            assert torch.equal(transformer(**inputs, return_dict=False)[0], off)


def test_the_grid_is_read_from_coordinates() -> None:
    case = tiny.CASES[1]
    grid = BACKBONE.grid(case.make(), case.inputs(1, 5, 1))
    assert (grid.frames, grid.height, grid.width, grid.start) == (3, 3, 5, 30)


def test_windows_are_refused() -> None:
    transformer, inputs = tiny.make_transformer(), tiny.conditioned(1, 5, 1)
    windowed = inputs | {"num_frames": 1, "height": 1, "width": 1}
    with (
        dcm.trace(transformer, concept_embeds=embeds_of(tiny.CASES[0]), methods=METHODS),
        pytest.raises(dcm.ConceptMapsError, match="given 75 tokens, but its other arguments tell of 1"),
    ):
        transformer(**windowed)


def test_words_of_the_prompt() -> None:
    """A word has the map of the text rows that are its tokens."""
    pipe, prompt = pipeline(), "the red dog"
    with dcm.trace(pipe, ["dog", "red"], methods=METHODS, target="prompt") as words:
        off = tiny.call(pipe, [prompt])
    with dcm.trace(pipe, methods=METHODS, target="prompt", prompt_tokens={"dog": [2], "red": [1]}) as positions:
        assert torch.equal(tiny.call(pipe, [prompt]), off)
    for method in METHODS:
        assert torch.equal(words.get(method), positions.get(method))


def test_a_concept_that_is_a_text_token_has_its_map() -> None:
    """The key of a concept is that of a text row with the same states, mask or no mask."""
    transformer, inputs = tiny.make_transformer(), tiny.inputs(1, 5, 1)
    tokens = {"first": [0], "masked": [4]}
    options: dict[str, Any] = {"methods": METHODS, "normalize": "none"}
    embeds = inputs["encoder_hidden_states"][0, [0, 4]]
    with torch.no_grad():
        with dcm.trace(transformer, target="prompt", prompt_tokens=tokens, **options) as words:
            transformer(**inputs)
        with dcm.trace(transformer, concept_embeds=embeds, **options) as concepts:
            transformer(**inputs)
    for method in METHODS:
        torch.testing.assert_close(words.get(method), concepts.get(method), rtol=1e-4, atol=1e-4)


def test_encode() -> None:
    pipe = pipeline()
    random = torch.get_rng_state()
    states, counts = BACKBONE.encode(pipe, ["red dog", "sky"], None)
    assert torch.equal(torch.get_rng_state(), random)
    assert counts == [2, 1]
    ids = torch.zeros(2, 128, dtype=torch.long)
    ids[0, :3], ids[1, :2] = torch.tensor([8, 4, 1]), torch.tensor([6, 1])
    with torch.no_grad():
        expected = pipe.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(states, expected)


def test_what_cannot_be_encoded() -> None:
    pipe = pipeline()
    with pytest.raises(dcm.ConceptMapsError, match="has 13 tokens; expected at most 11"):
        BACKBONE.encode(pipe, ["a dog " * 6 + "sky"], 12)
    with pytest.raises(dcm.ConceptMapsError, match="no word that the tokenizer knows"):
        dcm.trace(pipe, ["zebra"], methods=METHODS).__enter__()
    bare = tiny.LTXPipeline(pipe.scheduler, pipe.vae, None, None, pipe.transformer)
    with pytest.raises(dcm.ConceptMapsError, match="LTXPipeline has no tokenizer or text encoder"):
        dcm.trace(bare, ["dog"], methods=METHODS).__enter__()


def test_methods_of_joint_attention_are_refused() -> None:
    with pytest.raises(dcm.ConceptMapsError, match="text reads nothing in LTXVideoTransformer3DModel"):
        dcm.trace(pipeline(), ["dog"]).__enter__()


def test_geometry() -> None:
    with dcm.trace(pipeline(), ["dog"], methods=METHODS) as maps:
        tiny.call(pipeline(), ["a red dog"])
    assert maps.metadata["frames_per_latent"] == pipeline().vae.temporal_compression_ratio
    assert maps.upsample((96, 160), 17).shape == (1, 1, 17, 96, 160)
