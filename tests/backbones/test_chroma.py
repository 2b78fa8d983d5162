"""Chroma: its pipelines, the mask of its prompt, and its text."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from backbones import tiny_chroma as tiny
from backbones._runs import check_step, recorded_passes, word_maps
from backbones.tiny_flux import WIDTH, call

import diffusers_concept_maps as dcm
from diffusers_concept_maps.parity import FLUX_CONCEPT_ATTENTION

EMBEDS = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(99))
IMAGE = torch.rand(1, 3, 20, 12, generator=torch.Generator().manual_seed(5))
MASK = (torch.rand(1, 1, 20, 12, generator=torch.Generator().manual_seed(6)) > 0.5).float()


@cache
def pipeline(name: str = "ChromaPipeline", dtype: torch.dtype = torch.float32) -> Any:
    pipe = getattr(diffusers, name)(**tiny.components()).to(dtype)
    pipe.transformer.register_to_config(guidance_embeds=False)  # which the stock inpainting pipeline looks for
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"])
def test_pipelines_of_the_same_transformer(name: str, dtype: torch.dtype, scale: float) -> None:
    pipe, options = pipeline(name, dtype), {"guidance_scale": scale, "negative_prompt": "the cat"}
    if name != "ChromaPipeline":
        options |= {"image": IMAGE, "strength": 0.9, "num_inference_steps": 4}
    if name == "ChromaInpaintPipeline":
        options |= {"mask_image": MASK}
    passed = check_step(pipe, lambda: call(pipe, "a red dog", **options), EMBEDS, (1, 5, 3), 1 + (scale > 1))
    assert passed["attention_mask"].shape == (1, 12 + 15)
    assert passed["attention_mask"].min() == 0


@pytest.mark.parametrize("guided", [False, True])
def test_words_of_the_prompt(guided: bool) -> None:
    pipe, options = pipeline(), {"guidance_scale": 3.0 if guided else 1.0, "negative_prompt": "dog red sky"}
    with (
        dcm.trace(pipe, ["red", "dog"], target="prompt", steps=[0]) as maps,
        recorded_passes(pipe.transformer) as calls,
    ):
        call(pipe, "a red dog", **options)
    assert torch.equal(maps.get(), word_maps(pipe.transformer, {"red": [1], "dog": [2]}, calls[0]))


def test_concepts_are_encoded_with_a_mask() -> None:
    pipe = pipeline()
    states = []
    for text in ("red dog", "sky"):
        ids = pipe.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            states.append(pipe.text_encoder(ids).last_hidden_state[0, :-1].mean(0))
    maps = []
    for options in ({"concepts": ["red dog", "sky"]}, {"concept_embeds": torch.stack(states)}):
        with dcm.trace(pipe, **options) as captured:
            call(pipe, "a red dog")
        maps.append(captured.get())
    torch.testing.assert_close(*maps, rtol=1e-4, atol=1e-5)


def test_encoding_leaves_the_random_state_alone() -> None:
    pipe = tiny.make_pipeline()
    pipe.text_encoder.train()
    pipe.text_encoder.encoder.block[0].layer[0].dropout.p = 0.5
    before = torch.get_rng_state()
    with dcm.trace(pipe, ["dog"]):
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["text_encoder", "tokenizer"])
def test_a_pipeline_without_its_encoder(name: str) -> None:
    pipe = diffusers.ChromaPipeline(**(tiny.components() | {name: None}))
    with pytest.raises(dcm.ConceptMapsError, match="this ChromaPipeline has no tokenizer or text encoder"):
        dcm.capture.attach(pipe, ["dog"])


def test_there_is_no_pooled_vector_to_leave_out() -> None:
    transformer, given = tiny.make_transformer(), tiny.inputs(1, 5, 1)
    maps = []
    for parity in (FLUX_CONCEPT_ATTENTION, None):
        with torch.no_grad(), dcm.trace(transformer, concept_embeds=EMBEDS, parity=parity) as captured:
            transformer(**given)
        maps.append(captured.get())
    assert torch.equal(*maps)
