"""SD3 and SD3.5: encoders, words of the prompt, other pipelines, guidance by skipped layers, golden tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import tiny_sd3 as tiny
from backbones._case import call_for_images, seeded
from backbones._oracle import kept_state
from backbones._runs import METHODS, check_run, check_training
from diffusers import (
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image
from safetensors.torch import load_file

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones.sd3 import BACKBONE
from diffusers_concept_maps.methods import LayerTaps
from diffusers_concept_maps.methods.concept_attention import ConceptAttention

CONCEPTS = ["dog", "red rock", "sky"]
EMBEDS = seeded(3, tiny.WIDTH, seed=5)
COND = slice(1, 2)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    return tiny.make_pipeline()


@pytest.fixture(scope="module")
def without_t5() -> StableDiffusion3Pipeline:
    return tiny.make_pipeline(t5=False)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 12, 3), np.uint8))


def t5_states(pipe: StableDiffusion3Pipeline, text: str, length: int) -> torch.Tensor:
    ids = pipe.tokenizer_3(text, padding="max_length", max_length=length, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder_3(ids).last_hidden_state[0]


def clip_states(pipe: StableDiffusion3Pipeline, text: str) -> torch.Tensor:
    """Both encoders side by side, then zeros up to the width of T5."""
    ids = pipe.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        encoders = (pipe.text_encoder, pipe.text_encoder_2)
        states = torch.cat([encoder(ids, output_hidden_states=True).hidden_states[-2][0] for encoder in encoders], 1)
    return torch.cat([states, torch.zeros(77, tiny.WIDTH - states.shape[1])], 1)


def test_concepts_are_encoded_by_t5(pipe: StableDiffusion3Pipeline) -> None:
    states, counts = BACKBONE.encode(pipe, CONCEPTS, None)
    assert counts == [1, 2, 1]
    expected = torch.stack([t5_states(pipe, text, 256) for text in CONCEPTS])
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)
    shorter, counts = BACKBONE.encode(pipe, [*CONCEPTS, "dog " * 20], 16)
    assert counts == [1, 2, 1, 15]
    torch.testing.assert_close(shorter[1], t5_states(pipe, "red rock", 16), rtol=0, atol=1e-6)


def test_without_t5_concepts_are_encoded_by_clip(without_t5: StableDiffusion3Pipeline) -> None:
    states, counts = BACKBONE.encode(without_t5, CONCEPTS, None)
    assert counts == [1, 2, 1]
    for text, state, count in zip(CONCEPTS, states, counts, strict=True):
        expected = clip_states(without_t5, text)[1 : 1 + count]  # behind the start mark
        torch.testing.assert_close(state[:count], expected, rtol=0, atol=1e-6)


def test_encoding_draws_no_random_numbers(pipe: StableDiffusion3Pipeline) -> None:
    random = torch.get_rng_state()
    pipe.text_encoder_2.train()
    try:
        BACKBONE.encode(pipe, CONCEPTS, None)
    finally:
        pipe.text_encoder_2.eval()
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("missing", ["tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3"])
def test_no_encoder(missing: str) -> None:
    bare = tiny.make_pipeline()
    setattr(bare, missing, None)
    with pytest.raises(dcm.ConceptMapsError, match="has no tokenizer or text encoder"), dcm.trace(bare, CONCEPTS):
        pass


def test_unknown_and_long_concepts(pipe: StableDiffusion3Pipeline, without_t5: StableDiffusion3Pipeline) -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match="'zebra' has no word that the tokenizer knows"):
        BACKBONE.encode(pipe, ["zebra"], None)
    with pytest.raises(dcm.ConceptMapsValueError, match="has 256 tokens; expected at most 255"):
        BACKBONE.encode(pipe, ["dog " * 256], None)
    with pytest.raises(dcm.ConceptMapsValueError, match="has 76 tokens; expected at most 75"):
        BACKBONE.encode(without_t5, ["dog " * 76], None)


@pytest.mark.parametrize("t5", [True, False])
def test_words_of_the_prompt_are_rows_of_every_encoder(
    t5: bool, pipe: StableDiffusion3Pipeline, without_t5: StableDiffusion3Pipeline
) -> None:
    traced = pipe if t5 else without_t5
    prompt = "a red dog on the beach"
    rows = {"dog": [3, 77 + 2], "red": [2, 77 + 1]} if t5 else {"dog": [3], "red": [2]}
    with dcm.trace(traced, list(rows), target="prompt", methods=METHODS) as maps:
        call_for_images(traced, [prompt])
    with dcm.trace(traced, target="prompt", prompt_tokens=rows, methods=METHODS) as expected:
        call_for_images(traced, [prompt])
    for method in METHODS:
        assert torch.equal(maps.get(method), expected.get(method))


@pytest.mark.parametrize("name", ["prompt_2", "prompt_3"])
def test_words_are_not_looked_for_where_encoders_have_other_prompts(name: str, pipe: StableDiffusion3Pipeline) -> None:
    with dcm.trace(pipe, ["dog"], target="prompt", methods=METHODS) as maps:
        call_for_images(pipe, ["a red dog"], **{name: ["a red dog"]})
    assert maps.concepts == ("dog",)
    message = rf"^{name} gives the text of this run other tokens than .*leave it out, or pass prompt_tokens="
    with (
        pytest.raises(dcm.ConceptMapsError, match=message),
        dcm.trace(pipe, ["dog"], target="prompt", methods=METHODS),
    ):
        call_for_images(pipe, ["a red dog"], **{name: ["the dog"]})


@pytest.mark.parametrize(("branch", "row"), [("cond", 1), ("uncond", 0)])
def test_text_to_image(branch: str, row: int, pipe: StableDiffusion3Pipeline) -> None:
    places = [(step, slice(row, row + 1)) for step in range(3)]
    check_run(pipe, lambda: call_for_images(pipe, ["a red dog"]), EMBEDS, (1, 5, 3), places, passes=3, branch=branch)


def test_nothing_is_recorded_of_perturbed_attention(
    pipe: StableDiffusion3Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rows would be taken for those of a branch."""
    parts = {
        name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")
    }
    perturbed = StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"])
    perturbed.set_progress_bar_config(disable=True)
    before, off = kept_state(pipe.transformer), call_for_images(perturbed, ["a red dog"])
    with dcm.trace(perturbed, concept_embeds=EMBEDS) as maps:
        assert torch.equal(call_for_images(perturbed, ["a red dog"]), off)
        with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded"):
            maps.get()
        off = call_for_images(perturbed, ["a red dog"], pag_scale=0.0)
    assert kept_state(pipe.transformer) == before
    assert [record.message for record in caplog.records if "perturbed" in record.message] == [
        "StableDiffusion3PAGPipeline adds rows for perturbed attention to its batches, of which the guidance branches "
        "cannot be told: nothing is recorded of this run. Call it with pag_scale=0."
    ]
    with dcm.trace(pipe, concept_embeds=EMBEDS) as expected:
        assert torch.equal(call_for_images(pipe, ["a red dog"]), off)
    assert torch.equal(maps.get(), expected.get())


def test_without_guidance(pipe: StableDiffusion3Pipeline) -> None:
    places = [(step, slice(0, 2)) for step in range(3)]
    prompts = ["a red dog", "the sky"]
    check_run(pipe, lambda: call_for_images(pipe, prompts, guidance_scale=1.0), EMBEDS, (1, 5, 3), places, passes=3)


@pytest.mark.parametrize("skipped", [[0], [1, 2]])
def test_passes_with_skipped_layers_are_left_out(skipped: list[int], pipe: StableDiffusion3Pipeline) -> None:
    options = {"skip_guidance_layers": skipped, "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    places = [(0, COND), (1, COND), (3, COND)]  # the second and third step have such a pass
    plain = call_for_images(pipe, ["a red dog"])
    assert not torch.equal(call_for_images(pipe, ["a red dog"], **options), plain)
    check_run(pipe, lambda: call_for_images(pipe, ["a red dog"], **options), EMBEDS, (1, 5, 3), places, passes=5)


def test_a_bare_transformer_with_skipped_layers() -> None:
    transformer, inputs = tiny.make_transformer(), tiny.inputs(1, 5, 1)
    with torch.no_grad(), dcm.trace(transformer, concept_embeds=EMBEDS) as maps:
        transformer(**inputs, skip_layers=[0])
    assert maps.coverage["concept_attention"].tolist() == [[False, True, True]]


def test_fused_before_the_capture_and_unfused_again() -> None:
    fused = tiny.make_pipeline()
    fused.transformer.fuse_qkv_projections()
    places = [(step, COND) for step in range(3)]
    check_run(fused, lambda: call_for_images(fused, ["a red dog"]), EMBEDS, (1, 5, 3), places, passes=3)
    fused.transformer.unfuse_qkv_projections()
    check_run(fused, lambda: call_for_images(fused, ["a red dog"]), EMBEDS, (1, 5, 3), places, passes=3)


def test_training_with_fused_projections() -> None:
    def make() -> SD3Transformer2DModel:
        transformer = tiny.make_transformer()
        transformer.fuse_qkv_projections()
        return transformer

    check_training(make, tiny.inputs(2, 5, 1), EMBEDS, METHODS)


@pytest.mark.parametrize("kind", ["image to image", "inpainting"])
def test_from_an_image(kind: str) -> None:
    inpaints = kind == "inpainting"
    cls = StableDiffusion3InpaintPipeline if inpaints else StableDiffusion3Img2ImgPipeline
    pipe = cls(**tiny.make_pipeline(channels=16).components)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"image": picture(), "strength": 0.5}  # two of the three steps
    options |= {"mask_image": picture().convert("L")} if inpaints else {}
    places = [(step, COND) for step in range(2)]
    check_run(pipe, lambda: call_for_images(pipe, ["a red dog"], **options), EMBEDS, (1, 5, 3), places, passes=2)


def test_with_a_control_net() -> None:
    components = tiny.make_pipeline().components
    control = SD3ControlNetModel.from_transformer(
        components["transformer"], num_layers=2, num_extra_conditioning_channels=0
    ).eval()
    torch.manual_seed(3)
    for layer in (*control.controlnet_blocks, control.pos_embed_input.proj):  # zeros at first
        torch.nn.init.normal_(layer.weight)
    pipe = StableDiffusion3ControlNetPipeline(**components, controlnet=control)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 24, "width": 16}

    def run() -> torch.Tensor:
        torch.manual_seed(0)  # the stock pipeline samples the control image without its generator
        return call_for_images(pipe, ["a red dog"], control_image=picture(), **size)

    assert not torch.equal(run(), call_for_images(tiny.make_pipeline(), ["a red dog"], **size))
    check_run(pipe, run, EMBEDS, (1, 6, 4), [(step, COND) for step in range(3)], passes=3)


GOLDEN = os.environ.get("DCM_GOLDEN")


def golden_model() -> tuple[SD3Transformer2DModel, dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """The model of the official code's tensors, its inputs, these tensors, and what is known of them."""
    path = Path(str(GOLDEN)) / "ca_sd3_h4d16_l3.json"
    facts, golden = json.loads(path.read_text(encoding="utf-8")), load_file(path.with_suffix(".safetensors"))
    transformer = SD3Transformer2DModel(**facts["config"]).eval()
    transformer.load_state_dict({name[3:]: value for name, value in golden.items() if name.startswith("sd.")})
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    return transformer, {name: golden[f"in.{name}"] for name in names}, golden, facts


@pytest.mark.skipif(GOLDEN is None, reason="DCM_GOLDEN does not name a folder of golden tensors")
def test_outputs_of_the_official_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Concept states and outputs are the official ones; image outputs are, once the image reads concepts, no prompt.

    That second attention, made here of what a layer shows, is no part of the package: no parity switch makes the
    official maps of SD3, whose vectors are scaled and averaged before they are compared.
    """
    transformer, inputs, golden, facts = golden_model()
    layers: list[LayerTaps] = []
    states: list[torch.Tensor | None] = []
    score, leave = ConceptAttention.score, type(BACKBONE).leave
    monkeypatch.setattr(
        ConceptAttention, "score", lambda self, taps, *rest: (layers.append(taps), score(self, taps, *rest))[1]
    )
    monkeypatch.setattr(type(BACKBONE), "leave", lambda *given: (states.append(leave(*given)), states[-1])[1])
    with torch.no_grad(), dcm.trace(transformer, concept_embeds=golden["in.concept_hidden_states"][0]) as maps:
        sample = transformer(**inputs, return_dict=False)[0]
    assert torch.equal(sample, golden["out.sample"])
    assert maps.get().shape[2:] == (1, *facts["image_grid"])
    for layer, taps in enumerate(layers):
        assert taps.text_output is not None
        check_vectors(taps.text_output, golden["layers.concept_output_vectors"][layer])
        check_vectors(read_concepts(taps), golden["layers.image_output_vectors"][layer])
    assert states[-1] is None  # the text of the last block ends there
    for state, expected in zip(states[:-1], golden["layers.concept_hidden_states_out"], strict=False):
        assert state is not None
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.skipif(GOLDEN is None, reason="DCM_GOLDEN does not name a folder of golden tensors")
def test_cross_attention_of_the_official_code() -> None:
    """The official maps of the prompt's tokens are the mean logits of the heads, unscaled."""
    transformer, inputs, golden, facts = golden_model()
    words = {f"token {token}": [token] for token in range(inputs["encoder_hidden_states"].shape[1])}
    for layer, expected in enumerate(golden["layers.cross_attention_maps"]):
        options: dict[str, Any] = {"methods": ["cross_attention"], "layers": [layer], "normalize": "none"}
        with torch.no_grad(), dcm.trace(transformer, target="prompt", prompt_tokens=words, **options) as maps:
            transformer(**inputs)
        unscaled = maps.get().flatten(2) * facts["config"]["attention_head_dim"] ** 0.5
        torch.testing.assert_close(unscaled, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def read_concepts(taps: LayerTaps) -> torch.Tensor:
    """What the image tokens would read of image and concepts `[R, H, N, D]`."""
    image_key, image_value, text_key, text_value = tensors_of(taps)
    key, value = torch.cat([image_key, text_key], 2), torch.cat([image_value, text_value], 2)
    return (taps.image_query @ key.mT / key.shape[-1] ** 0.5).softmax(-1) @ value


def tensors_of(taps: LayerTaps) -> Sequence[torch.Tensor]:
    tensors = (taps.image_key, taps.image_value, taps.text_key, taps.text_value)
    return [tensor for tensor in tensors if tensor is not None]


def check_vectors(heads: torch.Tensor, expected: torch.Tensor) -> None:
    joined = heads.transpose(1, 2).flatten(2)
    torch.testing.assert_close(joined, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
