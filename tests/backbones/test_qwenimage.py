"""Qwen-Image: encoder, words of the prompt, editing and other pipelines, guidance, given images, positions."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from backbones import tiny_qwenimage as tiny
from backbones._case import randomize, seeded
from backbones._runs import METHODS, check_run, recorded_passes
from diffusers import (
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
    QwenImagePipeline,
)
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones.qwenimage import BACKBONE

CONCEPTS = ["dog", "red rock", "sky"]
EMBEDS = seeded(3, tiny.WIDTH, seed=5)
COND = [(2 * step, slice(None)) for step in range(3)]
UNCOND = [(2 * step + 1, slice(None)) for step in range(3)]


@pytest.fixture(scope="module")
def pipe() -> QwenImagePipeline:
    return tiny.make_pipeline()


@pytest.fixture(scope="module")
def edit() -> QwenImageEditPipeline:
    return tiny.set_up(QwenImageEditPipeline(**tiny.make_components(), processor=None))


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8))


def states_of(pipe: Any, text: str) -> torch.Tensor:
    """States of one text in the template without an image, from behind the template's beginning."""
    template = pipe.prompt_template_encode.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
    ids = pipe.tokenizer(template.format(text), return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-1][0]
    return states[len(pipe.tokenizer(template.split("{}")[0]).input_ids) :]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("edits", [False, True])
def test_concepts_are_encoded_in_the_template(
    edits: bool, side: str, pipe: QwenImagePipeline, edit: QwenImageEditPipeline
) -> None:
    chosen = edit if edits else pipe
    chosen.tokenizer.padding_side = side
    try:
        states, counts = BACKBONE.encode(chosen, CONCEPTS, None)
    finally:
        chosen.tokenizer.padding_side = "right"
    assert counts == [1, 2, 1]
    for text, state, count in zip(CONCEPTS, states, counts, strict=True):
        torch.testing.assert_close(state[:count], states_of(chosen, text)[:count], rtol=0, atol=1e-5)
    if not edits:  # the beginning of what the pipeline itself makes of it
        own, _ = chosen.encode_prompt(["red rock"])
        torch.testing.assert_close(states[1], own[0, :2], rtol=0, atol=1e-5)


def test_a_concept_is_cut_where_a_length_is_given(pipe: QwenImagePipeline) -> None:
    states, counts = BACKBONE.encode(pipe, ["a red dog", "sky"], 2)
    assert counts == [2, 1]
    torch.testing.assert_close(states[0], states_of(pipe, "a red dog")[:2], rtol=0, atol=1e-5)


def test_unknown_and_long_concepts(pipe: QwenImagePipeline) -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match="'zebra' has no word that the tokenizer knows"):
        BACKBONE.encode(pipe, ["zebra"], None)
    with pytest.raises(dcm.ConceptMapsValueError, match="has 1024 tokens; expected at most 1023"):
        BACKBONE.encode(pipe, ["dog " * 1024], None)


def test_words_of_prompts_of_different_length(pipe: QwenImagePipeline) -> None:
    prompts, rows = ["a red dog on the beach", "dog red"], [{"dog": [2], "red": [1]}, {"dog": [0], "red": [1]}]
    with dcm.trace(pipe, ["dog", "red"], target="prompt", methods=METHODS) as maps:
        tiny.call(pipe, prompts)
    for row, positions in enumerate(rows):
        with dcm.trace(pipe, target="prompt", prompt_tokens=positions, methods=METHODS) as expected:
            tiny.call(pipe, prompts)
        for method in METHODS:
            assert torch.equal(maps.get(method)[row], expected.get(method)[row])


def test_the_template_is_no_word_of_the_prompt(pipe: QwenImagePipeline) -> None:
    prompt = "user image assistant sky"  # of which the template has all but the last
    spans = BACKBONE.token_spans(pipe, prompt, 20)
    assert spans == [(0, 4), (5, 10), (11, 20), (21, 24)] + [(0, 0)] * (len(spans) - 4)
    assert len(spans) > 4
    assert BACKBONE.token_spans(pipe, prompt, 2) == spans[:2]


def test_words_beside_images_need_positions(edit: QwenImageEditPipeline) -> None:
    with pytest.raises(dcm.ConceptMapsError, match="QwenImageEditPipeline begin with those of images"):
        BACKBONE.token_spans(edit, "a red dog", 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("branch", "places"), [("cond", COND), ("uncond", UNCOND)])
def test_text_to_image(branch: str, places: Any, dtype: torch.dtype) -> None:
    """The pipeline hands over rounded thousandths of its timesteps."""
    pipe = tiny.make_pipeline().to(dtype)
    run = lambda: tiny.call(pipe, ["a red dog", "the sky"])  # noqa: E731
    check_run(pipe, run, EMBEDS, (1, 5, 3), places, passes=6, branch=branch)


def test_timesteps_are_those_that_the_pipeline_hands_over() -> None:
    pipe = tiny.make_pipeline().to(torch.bfloat16)
    with recorded_passes(pipe.transformer) as passes:
        tiny.call(pipe, ["a red dog"], negative_prompt=None, num_inference_steps=20)
    handed = torch.cat([seen["timestep"] for seen in passes])
    scheduled = pipe.scheduler.timesteps
    assert torch.equal(BACKBONE.timesteps(scheduled, torch.bfloat16), handed)
    assert not torch.equal((scheduled / 1000).to(torch.bfloat16), handed)


def test_without_guidance(pipe: QwenImagePipeline) -> None:
    places = [(step, slice(None)) for step in range(3)]
    run = lambda: tiny.call(pipe, ["a red dog"], negative_prompt=None)  # noqa: E731
    check_run(pipe, run, EMBEDS, (1, 5, 3), places, passes=3)


@pytest.mark.parametrize("kind", ["image to image", "inpainting"])
def test_from_an_image(kind: str) -> None:
    inpaints = kind == "inpainting"
    pipe = tiny.set_up((QwenImageInpaintPipeline if inpaints else QwenImageImg2ImgPipeline)(**tiny.make_components()))
    options: dict[str, Any] = {"image": picture(), "strength": 0.5}  # two of the three steps
    options |= {"mask_image": picture().convert("L")} if inpaints else {}
    run = lambda: tiny.call(pipe, ["a red dog"], **options)  # noqa: E731
    check_run(pipe, run, EMBEDS, (1, 5, 3), COND[:2], passes=4)


def test_with_a_control_net() -> None:
    components = tiny.make_components()
    config = {name: value for name, value in tiny.SETTINGS.items() if name != "num_layers"}
    control = randomize(QwenImageControlNetModel(**config, num_layers=2))
    pipe = tiny.set_up(QwenImageControlNetPipeline(**components, controlnet=control))
    run = lambda: tiny.call(pipe, ["a red dog"], control_image=picture())  # noqa: E731
    assert not torch.equal(run(), tiny.call(tiny.make_pipeline(), ["a red dog"]))
    check_run(pipe, run, EMBEDS, (1, 5, 3), COND, passes=6)


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("plus", [False, True])
def test_given_images_are_left_out(plus: bool, zero_cond_t: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock pipelines bring given images to a megapixel, which is too much here."""
    name = "pipeline_qwenimage_edit_plus" if plus else "pipeline_qwenimage_edit"
    module = importlib.import_module(f"diffusers.pipelines.qwenimage.{name}")
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (16, 32) if plus else (16, 32, None))
    components = tiny.make_components(zero_cond_t=zero_cond_t)
    cls = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    pipe = tiny.set_up(cls(**components, processor=None))
    options = {
        "image": [picture(), picture()] if plus else picture(),
        "prompt_embeds": seeded(1, 7, tiny.WIDTH, seed=8),
        "negative_prompt": None,
        "negative_prompt_embeds": seeded(1, 5, tiny.WIDTH, seed=9),
    }
    run = lambda: tiny.call(pipe, None, **options)  # noqa: E731
    check_run(pipe, run, EMBEDS, (1, 5, 3), COND, passes=6)


def test_layers_are_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("diffusers.pipelines.qwenimage.pipeline_qwenimage_layered")
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (24, 40))
    components = tiny.make_components(channels=8, colors=4, use_layer3d_rope=True, use_additional_t_cond=True)
    pipe = tiny.set_up(QwenImageLayeredPipeline(**components, processor=None))
    options = {
        "image": picture().convert("RGBA"),
        "layers": 2,
        "prompt": "a red dog",
        "negative_prompt": "the rock",
        "num_inference_steps": 3,
        "true_cfg_scale": 4.0,
        "output_type": "pt",
    }
    run = lambda: pipe(**options, generator=torch.Generator().manual_seed(0)).images[0]  # noqa: E731
    assert run().shape[0] == 2
    check_run(pipe, run, EMBEDS, (2, 5, 3), COND, passes=6)


@pytest.mark.parametrize("name", ["text", "edit"])
def test_the_order_of_concepts_does_not_matter(name: str) -> None:
    transformer = tiny.make_edit_plus() if name == "edit" else tiny.make_transformer()
    inputs = tiny.edit_inputs(2, 5, 1) if name == "edit" else tiny.padded_inputs(2, 5, 1)
    order = [2, 0, 1]
    maps = []
    for embeds in (EMBEDS, EMBEDS[order]):
        with torch.no_grad(), dcm.trace(transformer, concept_embeds=embeds, methods=METHODS) as traced:
            transformer(**inputs)
        maps.append(traced)
    for method in METHODS:
        torch.testing.assert_close(maps[1].get(method), maps[0].get(method)[:, order], rtol=0, atol=1e-4)


def test_the_mask_of_the_prompt_does_not_touch_concepts() -> None:
    """Padding that the image cannot see leaves the maps as they are without it."""
    transformer, inputs = tiny.make_transformer(), tiny.inputs(1, 4, 1)
    padding = torch.zeros(1, 3, tiny.WIDTH)
    padded = inputs | {
        "encoder_hidden_states": torch.cat([inputs["encoder_hidden_states"], padding], 1),
        "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 0, 0, 0]]),
    }
    maps = []
    for arguments in (inputs, padded):
        with torch.no_grad(), dcm.trace(transformer, concept_embeds=EMBEDS, methods=METHODS) as traced:
            transformer(**arguments)
        maps.append(traced)
    for method in METHODS:
        torch.testing.assert_close(maps[1].get(method), maps[0].get(method), rtol=0, atol=1e-4)
