"""Wan beyond the contract: its other pipelines, two transformers, reference images, fused projections, presets."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from backbones import tiny_wan
from backbones._oracle import embeds_of, kept_state, layer_taps
from backbones._runs import check_training
from backbones.test_contract import CONCEPTS, NORMALIZATIONS, close, output_of, recorded_calls
from backbones.tiny_wan import CASES, GRID, call, components, silent
from diffusers import WanImageToVideoPipeline, WanPipeline, WanVACEPipeline
from diffusers import WanVideoToVideoPipeline as VideoToVideo
from naive import all_heads, saliency
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones.wan import BACKBONE

GOLDEN = os.environ.get("DCM_GOLDEN")
METHODS = ("cross_attention", "gramcol", "imap")
VACE = CASES[-1]


def picture(seed: int = 0, height: int = 48, width: int = 80) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_parts() -> dict[str, Any]:
    """An encoder of images; of eight by eight pixels it makes five tokens."""
    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8,
        patch_size=4, projection_dim=16,
    )  # fmt: skip
    return {
        "image_encoder": CLIPVisionModel(config).eval(),
        "image_processor": CLIPImageProcessor(size=8, crop_size=8),
    }


def image_to_video() -> WanImageToVideoPipeline:
    """Wan 2.1, whose transformer is given the tokens of the image as well."""
    transformer = tiny_wan.make_transformer(image_dim=16, added_kv_proj_dim=48, in_channels=36)
    return silent(WanImageToVideoPipeline(**components(transformer=transformer, **image_parts())))


def traced(pipe: Any, prompt: Any = "a red dog", **options: Any) -> Any:
    """Maps of a call whose frames are the ones that it has without them."""
    capture = {name: options.pop(name) for name in ("branch", "target", "steps", "methods") if name in options}
    concepts = None if capture.get("target") == "prompt" else CONCEPTS

    def run() -> torch.Tensor:
        torch.manual_seed(0)  # some pipelines draw from the global random state
        return call(pipe, prompt, **options)

    off = run()
    with dcm.trace(pipe, concepts, **({"methods": METHODS} | capture)) as maps:
        on = run()
    assert off.isfinite().all()
    assert torch.equal(on, off)
    assert torch.equal(run(), off)
    return maps


@pytest.mark.parametrize("last", [False, True])
def test_image_to_video(last: bool) -> None:
    pipe = image_to_video()
    images = {"image": picture(), "last_image": picture(1)} if last else {"image": picture()}
    if last:  # two images, of five tokens each, become one context
        pipe.register_modules(
            transformer=tiny_wan.make_transformer(
                image_dim=16, added_kv_proj_dim=48, in_channels=36, pos_embed_seq_len=10
            )
        )
    both = traced(pipe, **images, max_sequence_length=512, branch="both")
    assert both["cond"].get().shape == both["uncond"].get().shape == (1, 3, *GRID)
    calls = recorded_calls(CASES[0], pipe, ["a red dog"], **images, max_sequence_length=512)
    for branch, offset in (("cond", 0), ("uncond", 1)):
        maps = traced(pipe, **images, max_sequence_length=512, branch=branch, steps=[1])
        transformer, inputs = calls[2 + offset]
        embeds = dcm.concepts.encode_concepts(BACKBONE, pipe, CONCEPTS, "mean")
        with dcm.trace(transformer, concept_embeds=embeds, methods=METHODS) as expected:
            output_of(transformer, inputs)
        for method in METHODS:
            close(maps.get(method), expected.get(method), 1e-6)


def test_image_to_video_of_two_transformers_without_image_tokens() -> None:
    first, second = (tiny_wan.make_transformer(in_channels=36) for _ in range(2))
    parts = components(transformer=first, transformer_2=second)
    pipe = silent(WanImageToVideoPipeline(**parts, boundary_ratio=0.9))
    ran: list[Any] = []
    hooks = [t.register_forward_hook(lambda module, *_: ran.append(module)) for t in (first, second)]
    maps = traced(pipe, image=picture(), num_inference_steps=4)
    assert {id(module) for module in ran} == {id(first), id(second)}
    assert maps.coverage["imap"].all()
    assert maps.coverage["imap"].shape == (4, 3)
    for hook in hooks:
        hook.remove()


def test_image_to_video_with_a_timestep_per_token() -> None:
    pipe = silent(
        WanImageToVideoPipeline(**components(transformer=tiny_wan.make_transformer()), expand_timesteps=True)
    )
    maps = traced(pipe, image=picture())
    assert maps.get().shape == (1, 3, *GRID)
    assert maps.coverage["imap"].all()


@pytest.mark.parametrize("name", ["transformer", "transformer_2"])
def test_one_of_two_transformers(name: str) -> None:
    """Checkpoints of which one transformer does all the work."""
    parts = components(**{"transformer": None, "transformer_2": None, name: tiny_wan.make_transformer()})
    pipe = silent(WanPipeline(**parts, boundary_ratio=0.0 if name == "transformer" else 1.0))
    maps = traced(pipe)
    assert maps.coverage["imap"].shape == (3, 3)
    assert maps.coverage["imap"].all()


def test_video_to_video() -> None:
    pipe = silent(VideoToVideo(**components(transformer=tiny_wan.make_transformer())))

    def run() -> torch.Tensor:
        return pipe(
            [picture(seed) for seed in range(9)], "a red dog", num_inference_steps=4, strength=0.7, height=48,
            width=80, max_sequence_length=12, output_type="latent", generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    off = run()
    with dcm.trace(pipe, CONCEPTS, methods=METHODS, branch="both") as maps:
        assert torch.equal(run(), off)
    for branch in ("cond", "uncond"):
        assert maps[branch].coverage["imap"].shape == (2, 3)  # of four steps
        assert maps[branch].coverage["imap"].all()
        assert maps[branch].get().shape == (1, 3, *GRID)
    assert not torch.equal(maps["cond"].get(), maps["uncond"].get())


def vace(**options: Any) -> WanVACEPipeline:
    return silent(WanVACEPipeline(**components(transformer=tiny_wan.make_vace()), **options))


@pytest.mark.parametrize("references", [0, 1, 2])
def test_vace_leaves_reference_images_out(references: int) -> None:
    pipe = vace()
    options: dict[str, Any] = {
        "video": [picture(seed) for seed in range(1, 10)],
        "mask": [Image.new("L", (80, 48), 255 * (frame > 3)) for frame in range(9)],  # the first frames are given
    }
    if references:
        options["reference_images"] = [picture(20 + i, 40, 40) for i in range(references)]
    maps = traced(pipe, **options, steps=[1])
    embeds = dcm.concepts.encode_concepts(BACKBONE, pipe, CONCEPTS, "mean")
    transformer, inputs = recorded_calls(CASES[0], pipe, "a red dog", **options)[2]  # type: ignore[arg-type]
    assert inputs["hidden_states"].shape[2] == 3 + references
    inputs.pop("attention_kwargs")
    case = replace(VACE, start=15 * references)
    taps = layer_taps(case, inputs, embeds)
    for method in METHODS:
        assert maps.get(method).shape == (1, 3, *GRID)
        # The five heads of "imap" are all four.
        close(maps.get(method), saliency([taps], method, NORMALIZATIONS[method], GRID, all_heads))


def test_vace_without_control_has_no_references() -> None:
    transformer, inputs = tiny_wan.make_vace(), tiny_wan.vace_inputs(1, 5, 1)
    inputs["control_hidden_states"].zero_()
    with dcm.trace(transformer, concept_embeds=embeds_of(VACE), methods=METHODS) as maps:
        output_of(transformer, inputs)
    assert maps.get().shape == (1, 3, *GRID)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_fused_projections(case: Any) -> None:
    transformer, inputs = case.make(), case.inputs(2, case.text_lengths[-1], 3)
    with dcm.trace(transformer, concept_embeds=embeds_of(case), methods=METHODS) as expected:
        output_of(transformer, inputs)
    transformer.fuse_qkv_projections()
    off, before = output_of(transformer, inputs), kept_state(transformer)
    with dcm.trace(transformer, concept_embeds=embeds_of(case), methods=METHODS) as maps:
        assert torch.equal(output_of(transformer, inputs), off)
    assert kept_state(transformer) == before
    for method in METHODS:
        close(maps.get(method), expected.get(method), 1e-5)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_training_with_fused_projections(case: Any) -> None:
    def make() -> Any:
        transformer = case.make()
        transformer.fuse_qkv_projections()
        return transformer

    check_training(make, case.inputs(2, case.text_lengths[-1], 1), embeds_of(case), METHODS)


def test_concepts_are_encoded_as_prompts() -> None:
    pipe, random = tiny_wan.make_pipeline(), torch.get_rng_state()
    embeds = dcm.concepts.encode_concepts(BACKBONE, pipe, ["red dog", "sky"], "mean")
    states, _ = pipe.encode_prompt(["red dog", "sky"], do_classifier_free_guidance=False, max_sequence_length=512)
    close(embeds, torch.stack([states[0, :2].mean(0), states[1, 0]]), 1e-6)
    assert torch.equal(torch.get_rng_state(), random)
    fixed, counts = BACKBONE.encode(pipe, ["red dog", "sky"], 2)
    assert fixed.shape == (2, 2, tiny_wan.WIDTH)
    assert counts == [1, 1]


def test_concepts_that_cannot_be_encoded() -> None:
    pipe = tiny_wan.make_pipeline()
    with pytest.raises(dcm.ConceptMapsValueError, match="^concept 'dog .*' has 512 tokens; expected at most 511"):
        dcm.trace(pipe, ["dog " * 512], methods=METHODS).__enter__()
    pipe.register_modules(text_encoder=None)
    message = "^this WanPipeline has no tokenizer or text encoder to encode the concepts with; pass concept_embeds"
    with pytest.raises(dcm.ConceptMapsError, match=message):
        dcm.trace(pipe, ["dog"], methods=METHODS).__enter__()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"num_layers": 30, "num_attention_heads": 12, "in_channels": 16, "image_dim": None}, "Wan 1.3B"),
        ({"num_layers": 40, "num_attention_heads": 40, "in_channels": 16, "image_dim": None}, "Wan 14B"),
        ({"num_layers": 40, "num_attention_heads": 40, "in_channels": 36, "image_dim": 1280}, None),
        ({"num_layers": 40, "num_attention_heads": 40, "in_channels": 36, "image_dim": None}, None),
        ({"num_layers": 30, "num_attention_heads": 24, "in_channels": 48, "image_dim": None}, None),
        ({"num_layers": 30, "num_attention_heads": 12, "in_channels": 16, "vace_layers": [0, 2]}, None),
    ],
)
def test_presets(config: dict[str, Any], name: str | None) -> None:
    preset = BACKBONE.preset(SimpleNamespace(config=SimpleNamespace(**config)))
    assert name == (preset and preset.name)
    if preset is not None:
        layers, heads = ((5, 19), 3) if name == "Wan 1.3B" else ((5, 25), 5)
        assert preset.layers == {"imap": tuple(range(layers[0], layers[1] + 1))}
        assert preset.heads == {"imap": dcm.HeadSelection(top_k=heads)}
        assert "2603.02919" in preset.source


def test_geometry() -> None:
    assert BACKBONE.geometry(tiny_wan.make_transformer()) == {"frames_per_latent": 4, "latents_per_token": 1}
