"""FLUX.1: its pipelines, its text, what the official code conditions concepts on, and its presets."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from backbones import tiny_flux as tiny
from backbones._runs import METHODS, check_step, recorded_passes, word_maps
from backbones.golden_flux import Golden
from diffusers import FluxControlNetModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones import flux
from diffusers_concept_maps.backbones.flux import BACKBONE, grid_of
from diffusers_concept_maps.parity import FLUX_CONCEPT_ATTENTION

EMBEDS = torch.randn(3, tiny.WIDTH, generator=torch.Generator().manual_seed(99))
IMAGE = torch.rand(1, 3, 20, 12, generator=torch.Generator().manual_seed(5))
MASK = (torch.rand(1, 1, 20, 12, generator=torch.Generator().manual_seed(6)) > 0.5).float()
GUIDED = {"negative_prompt": "the cat", "true_cfg_scale": 3.0}
GOLDEN = os.environ.get("DCM_GOLDEN")


@cache
def pipeline(name: str = "FluxPipeline", controlled: bool = False, channels: int = 16) -> Any:
    parts = tiny.components(tiny.make_transformer(in_channels=channels, out_channels=16))
    if controlled:
        config = {**parts["transformer"].config, "num_layers": 1, "num_single_layers": 1}
        parts["controlnet"] = FluxControlNetModel.from_config(config)
        torch.manual_seed(2)
        for parameter in parts["controlnet"].parameters():  # stock ones add zeros
            torch.nn.init.normal_(parameter, std=0.1)
    pipe = getattr(diffusers, name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check(pipe: Any, run: Callable[[], torch.Tensor], passes: int) -> dict[str, Any]:
    return check_step(pipe, run, EMBEDS, (1, 5, 3), passes)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"])
def test_pipelines_of_the_same_transformer(name: str, guided: bool) -> None:
    pipe, options = pipeline(name), GUIDED if guided else {}
    if name != "FluxPipeline":
        options = {**options, "image": IMAGE, "strength": 0.9, "num_inference_steps": 4}
    if name == "FluxInpaintPipeline":
        options["mask_image"] = MASK
    check(pipe, lambda: tiny.call(pipe, "a red dog", **options), 1 + guided)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["FluxKontextPipeline", "FluxKontextInpaintPipeline"])
def test_kontext_leaves_its_reference_out(name: str, guided: bool) -> None:
    pipe, options = pipeline(name), {"image": IMAGE, "max_area": 240, "_auto_resize": False}
    if guided:
        options |= GUIDED
    if name == "FluxKontextInpaintPipeline":
        options |= {"mask_image": MASK, "strength": 1.0}
    call = check(pipe, lambda: tiny.call(pipe, "a red dog", **options), 1 + guided)
    assert call["hidden_states"].shape[1] == 30
    assert call["img_ids"][:, 0].tolist() == [0] * 15 + [1] * 15


def test_kontext_without_a_reference() -> None:
    pipe = pipeline("FluxKontextPipeline")
    call = check(pipe, lambda: tiny.call(pipe, "a red dog", max_area=240), 1)
    assert call["hidden_states"].shape[1] == 15


def test_fill() -> None:
    pipe = pipeline("FluxFillPipeline", channels=48)
    check(pipe, lambda: tiny.call(pipe, "a red dog", image=IMAGE, mask_image=MASK), 1)


@pytest.mark.parametrize("name", ["FluxControlPipeline", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline"])
def test_control(name: str) -> None:
    pipe, options = pipeline(name, channels=32), {"control_image": IMAGE}
    if name != "FluxControlPipeline":
        options |= {"image": IMAGE, "strength": 0.9, "num_inference_steps": 4}
    if name == "FluxControlInpaintPipeline":
        options |= {"mask_image": MASK}
    check(pipe, lambda: tiny.call(pipe, "a red dog", **options), 1)


@pytest.mark.parametrize(
    "name", ["FluxControlNetPipeline", "FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline"]
)
def test_controlnet(name: str) -> None:
    pipe, options = pipeline(name, controlled=True), {"control_image": IMAGE}
    if name == "FluxControlNetPipeline":
        options |= GUIDED
    else:
        options |= {"image": IMAGE, "strength": 0.9, "num_inference_steps": 4}
    if name == "FluxControlNetInpaintPipeline":
        options |= {"mask_image": MASK}
    passes = 2 if name == "FluxControlNetPipeline" else 1
    call = check(pipe, lambda: tiny.call(pipe, "a red dog", **options), passes)
    assert call["controlnet_block_samples"][0].abs().max() > 0


def test_half_precision() -> None:
    """Timesteps are rounded before they are divided, and positions are in half precision too."""
    pipe = diffusers.FluxPipeline(**tiny.components()).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    check(pipe, lambda: tiny.call(pipe, "a red dog", **GUIDED), 2)
    pipe = diffusers.FluxImg2ImgPipeline(**pipe.components)  # writes no timestep
    pipe.set_progress_bar_config(disable=True)
    check(pipe, lambda: tiny.call(pipe, "a red dog", image=IMAGE, strength=1.0, **GUIDED), 2)


def test_the_grid_is_counted() -> None:
    """So that positions may be rounded, have a batch axis and be followed by those of other images."""
    for height, width in ((1, 1), (1, 4), (4, 1), (300, 3), (3, 300)):
        ids = torch.cat([tiny.positions(height, width), tiny.positions(2, 5, image=1)]).bfloat16()
        assert grid_of(ids) == grid_of(ids[None]) == dcm.backbones.Grid(1, height, width)
        behind = torch.cat([tiny.positions(2, 5, image=1), tiny.positions(height, width)])
        assert grid_of(behind, 10) == dcm.backbones.Grid(1, height, width, 10)


def test_the_grid_is_read_once_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device waits for it; another transformer call may have another one, unless a pipeline makes it."""
    read, stock = [], BACKBONE.grid

    def grid(transformer: Any, call: Any) -> Any:
        read.append(stock(transformer, call))
        return read[-1]

    monkeypatch.setattr(BACKBONE, "grid", grid)
    pipe = pipeline()
    with dcm.trace(pipe, concept_embeds=EMBEDS) as maps:
        for height, width in ((20, 12), (12, 20)):  # as many tokens
            tiny.call(pipe, "a red dog", height=height, width=width, **GUIDED)
            assert maps.get().shape[2:] == (1, height // 4, width // 4)
    assert read == [dcm.backbones.Grid(1, 5, 3), dcm.backbones.Grid(1, 3, 5)]
    with torch.no_grad(), dcm.trace(pipe.transformer, concept_embeds=EMBEDS) as maps:
        for height, width in ((5, 3), (3, 5)):
            pipe.transformer(**tiny.inputs(1, 5, 1) | {"img_ids": tiny.positions(height, width)})
            assert maps.get().shape[2:] == (1, height, width)


def test_projections_that_are_fused_during_a_capture() -> None:
    """The processors stay in place, and the maps are those of a model that was fused before."""
    given, maps = tiny.inputs(2, 5, 1), []
    for transformer in (tiny.make_transformer(), tiny.make_fused()):
        with torch.no_grad(), dcm.trace(transformer, concept_embeds=EMBEDS, methods=METHODS) as captured:
            transformer.fuse_qkv_projections()
            transformer(**given)
        maps.append(captured)
    for method in METHODS:
        assert torch.equal(maps[0].get(method), maps[1].get(method))


def test_the_main_call_keeps_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, given, used = tiny.make_transformer(), tiny.inputs(2, 5, 1), []
    for module in transformer.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = AttentionBackendName._NATIVE_MATH
    with torch.no_grad():
        off = transformer(**given, return_dict=False)[0]

    def note(*args: Any, **options: Any) -> torch.Tensor:
        used.append(options["backend"])
        return dispatch_attention_fn(*args, **options)

    monkeypatch.setattr(flux, "dispatch_attention_fn", note)
    with torch.no_grad(), dcm.trace(transformer, concept_embeds=EMBEDS):
        assert torch.equal(transformer(**given, return_dict=False)[0], off)
    assert used == [AttentionBackendName._NATIVE_MATH] * 4


def encoded(pipe: Any, texts: list[str], length: int) -> torch.Tensor:
    """States of T5 `[text, token, width]`, padded and without a mask."""
    ids = pipe.tokenizer_2(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder_2(ids).last_hidden_state


@pytest.mark.parametrize(("make", "length"), [(tiny.make_pipeline, 512), (tiny.make_schnell_pipeline, 256)])
def test_concepts_are_encoded_as_prompts_are(make: Callable[[], Any], length: int) -> None:
    pipe = make()
    expected = torch.stack([encoded(pipe, ["red dog"], length)[0, :2].mean(0), encoded(pipe, ["sky"], length)[0, 0]])
    maps = []
    for capture in (dcm.trace(pipe, ["red dog", "sky"]), dcm.trace(pipe, concept_embeds=expected)):
        with capture as captured:
            tiny.call(pipe, "a red dog")
        maps.append(captured.get())
    torch.testing.assert_close(*maps, rtol=1e-5, atol=1e-6)


def test_encoding_leaves_the_random_state_alone() -> None:
    pipe = tiny.make_pipeline()
    pipe.text_encoder_2.train()
    pipe.text_encoder_2.encoder.block[0].layer[0].dropout.p = 0.5
    before = torch.get_rng_state()
    with dcm.trace(pipe, ["dog"]):
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["tokenizer", "text_encoder", "text_encoder_2", "tokenizer_2"])
def test_a_pipeline_without_its_encoders(name: str) -> None:
    pipe = diffusers.FluxPipeline(**(tiny.components() | {name: None}))
    message = f"^this FluxPipeline has no .*; pass concept_embeds instead, or load the pipeline with its {name}$"
    with pytest.raises(dcm.ConceptMapsError, match=message):
        dcm.capture.attach(pipe, ["dog"])


def test_a_concept_that_is_too_long() -> None:
    with pytest.raises(dcm.ConceptMapsError, match="has 512 tokens; expected at most 511"):
        dcm.capture.attach(tiny.make_pipeline(), [" ".join(["dog"] * 512)])


@pytest.mark.parametrize("guided", [False, True])
def test_words_of_the_prompt_and_not_of_the_negative_one(guided: bool) -> None:
    """Which this pipeline encodes last."""
    pipe, options = pipeline(), {"negative_prompt": "dog red sky", "true_cfg_scale": 3.0} if guided else {}
    for prompt, words in (("a red dog", {"red": [1], "dog": [2]}), ("dog on red", {"red": [2], "dog": [0]})):
        with (
            dcm.trace(pipe, ["red", "dog"], target="prompt", steps=[0]) as maps,
            recorded_passes(pipe.transformer) as calls,
        ):
            tiny.call(pipe, prompt, **options)
        assert torch.equal(maps.get(), word_maps(pipe.transformer, words, calls[0]))


def test_words_of_the_text_that_t5_is_given() -> None:
    pipe = pipeline()
    with dcm.trace(pipe, target="prompt", steps=[0]) as maps, recorded_passes(pipe.transformer) as calls:
        tiny.call(pipe, "the beach", prompt_2="a red dog", negative_prompt="sky", true_cfg_scale=3.0)
    assert maps.concepts == ("a", "red", "dog")
    assert torch.equal(maps.get(), word_maps(pipe.transformer, {"a": [0], "red": [1], "dog": [2]}, calls[0]))


def test_two_runs_with_negative_prompts_in_one_capture() -> None:
    pipe = pipeline()
    with dcm.trace(pipe, target="prompt") as maps:
        for prompt, words in (("a red dog", ("a", "red", "dog")), ("sky on", ("sky", "on"))):
            tiny.call(pipe, prompt, negative_prompt="the cat", true_cfg_scale=3.0)
            assert maps.concepts == words


def test_prompt_embeds_with_a_negative_prompt() -> None:
    pipe = pipeline()
    states, pooled, _ = pipe.encode_prompt("a red dog", None, max_sequence_length=12)
    with (
        pytest.raises(dcm.ConceptMapsError, match="was given prompt_embeds; pass prompt_tokens"),
        dcm.trace(pipe, ["cat"], target="prompt"),
    ):
        tiny.call(pipe, None, prompt_embeds=states, pooled_prompt_embeds=pooled, **GUIDED)


def test_embeddings_that_were_changed_on_the_way() -> None:
    """The prompt is then the one that was encoded first."""
    pipe = pipeline()
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"] * 2}),
        with_kwargs=True,
    )
    with dcm.trace(pipe, target="prompt") as maps:
        tiny.call(pipe, "a red dog", **GUIDED)
    hook.remove()
    assert maps.concepts == ("a", "red", "dog")


@pytest.mark.parametrize("guidance", [True, False])
def test_parity_modulates_concepts_without_the_pooled_vector(guidance: bool) -> None:
    transformer = tiny.make_transformer(guidance)
    given = tiny.inputs(2, 5, 1, guidance=guidance)
    modulations: list[torch.Tensor] = []
    hooks = [
        block.norm1_context.register_forward_hook(
            lambda module, args, kwargs, output: modulations.append(kwargs["emb"]), with_kwargs=True
        )
        for block in transformer.transformer_blocks
    ]
    for parity, pooled in (("concept_attention", 0.0), (None, 1.0)):
        modulations.clear()
        with torch.no_grad(), dcm.trace(transformer, concept_embeds=EMBEDS, parity=parity):
            transformer(**given)
            scaled = [given[name] * 1000 for name in ("timestep", "guidance")[: 1 + guidance]]
            expected = transformer.time_text_embed(*scaled, given["pooled_projections"] * pooled)
        assert len(modulations) == 4  # of text and concepts, in two blocks
        assert all(torch.equal(modulation, expected) for modulation in modulations[1::2])
    for hook in hooks:
        hook.remove()


def test_parity_of_this_family() -> None:
    transformer, given = tiny.make_transformer(), tiny.inputs(1, 5, 1)
    given["pooled_projections"] = torch.zeros(1, 16)
    maps = []
    for parity in ("concept_attention", FLUX_CONCEPT_ATTENTION, None):
        with torch.no_grad(), dcm.trace(transformer, concept_embeds=EMBEDS, parity=parity) as captured:
            transformer(**given)
        maps.append(captured.get())
    assert torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], maps[2])  # nothing is padded
    with pytest.raises(
        dcm.ConceptMapsError, match="has no method 'cross_attention'; its methods are concept_attention"
    ):
        dcm.capture.attach(transformer, concept_embeds=EMBEDS, parity="concept_attention", methods=["cross_attention"])


def test_parity_encodes_a_first_sub_word_padded_as_the_prompt() -> None:
    pipe = pipeline()
    expected = encoded(pipe, ["red dog", "sky"], 512)[:, 0]
    maps = []
    for options in ({"concepts": ["red dog", "sky"]}, {"concept_embeds": expected}):
        with dcm.trace(pipe, parity="concept_attention", **options) as captured:
            tiny.call(pipe, "a red dog")
        maps.append(captured.get())
    torch.testing.assert_close(*maps, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(GOLDEN is None, reason="DCM_GOLDEN does not name a folder of golden tensors")
def test_official_maps() -> None:
    golden = Golden(Path(str(GOLDEN)) / "ca_flux_bfl_h4d16_l3.json")
    assert torch.equal(golden.run(), golden.tensors["out.sample"])
    scores, vector = golden.tensors["layers.concept_scores"], golden.tensors["in.concept_vec"]

    def condition(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The official pipeline has zeros there, and these tensors were made with another vector."""
        return args if args[-1].any() else (*args[:-1], vector)

    golden.transformer.time_text_embed.register_forward_pre_hook(condition)
    for layer in range(3):
        options = {"concept_embeds": golden.tensors["in.concepts"], "layers": [layer], "normalize": "none"}
        with dcm.trace(golden.transformer, parity="concept_attention", **options) as maps:
            golden.run()
        expected = scores[layer]
        error = (maps.get().flatten(2) - expected).abs().max()
        assert error < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"guidance_embeds": True}, "FLUX.1-dev"),
        ({"guidance_embeds": False}, "FLUX.1-schnell"),
        ({"guidance_embeds": True, "in_channels": 384, "out_channels": 64}, None),  # Fill
        ({"guidance_embeds": True, "num_layers": 18}, None),
    ],
)
def test_presets(config: dict[str, Any], name: str | None) -> None:
    with torch.device("meta"):
        size = {"attention_head_dim": 8, "num_attention_heads": 24, "axes_dims_rope": (2, 2, 4), "in_channels": 64}
        transformer = diffusers.FluxTransformer2DModel(**(size | config))
    preset = BACKBONE.preset(transformer)
    assert (preset and preset.name) == name
    assert preset is None or preset.layers == {"concept_attention": (15, 16, 17, 18)}
