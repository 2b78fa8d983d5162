"""HunyuanVideo beyond the contract: official maps, image-to-video pipelines, prompts in templates, caches, presets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import tiny_hunyuan_video as tiny
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoTransformer3DModel,
    PyramidAttentionBroadcastConfig,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones import find_backbone
from diffusers_concept_maps.parity import IMAP

METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")
GOLDEN = os.environ.get("DCM_GOLDEN")
needs_golden = pytest.mark.skipif(GOLDEN is None, reason="DCM_GOLDEN does not name a folder of golden tensors")
# The official names of the maps, and the tolerance as a part of the tensor's maximum; see tests/test_parity.py.
KEYS = {
    "concept_attention": ("concept_attention_maps", 1e-4),
    "cross_attention": ("cross_attention_maps", 1e-4),
    "gramcol": ("imap", 5e-4),
    "imap": ("sel_imap", 1e-4),
}


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=tolerance * float(expected.abs().max())
    )


class Golden:
    """The official tensors, the stock transformer they were made with, and the call they were made by."""

    def __init__(self) -> None:
        path = Path(str(GOLDEN)) / "imap_hunyuan_h4d16_l3.json"
        self.facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.tensors = load_file(path.with_suffix(".safetensors"))
        weights = {name[3:]: value for name, value in self.tensors.items() if name.startswith("sd.")}
        self.transformer = HunyuanVideoTransformer3DModel(**self.facts["config"]).eval()
        self.transformer.load_state_dict(weights)
        self.concepts: int = self.facts["n_concepts"]
        self.embeds = self.tensors["in.concept_hidden_states"][0, : self.concepts]

    def run(self) -> torch.Tensor:
        names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
        arguments = {name: self.tensors[f"in.{name}"] for name in (*names, "guidance")}
        with torch.no_grad():
            sample: torch.Tensor = self.transformer(**arguments, return_dict=False)[0]
        return sample

    def maps(self, method: str, **options: Any) -> torch.Tensor:
        """`[target, token]`."""
        heads = dcm.HeadSelection(top_k=self.facts["topk"]) if method == "imap" else None
        with dcm.trace(self.transformer, methods=[method], heads=heads, parity=IMAP, **options) as maps:
            self.run()
        return maps.get(method)[0].flatten(1)


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden()


@needs_golden
class TestOfficialMaps:
    def test_the_sample_is_the_stock_sample(self, golden: Golden) -> None:
        assert torch.equal(golden.run(), golden.tensors["out.sample"])

    @pytest.mark.parametrize("method", METHODS)
    def test_concepts(self, golden: Golden, method: str) -> None:
        key, tolerance = KEYS[method]
        for layer in golden.facts["layers"]:
            expected = golden.tensors[f"concepts.layer{layer}.{key}"][: golden.concepts]
            close(golden.maps(method, concept_embeds=golden.embeds, layers=[layer]), expected, tolerance)
        for layers, suffix in ((golden.facts["layers"], ""), (golden.facts["imap_layer"], "_layers")):
            actual = golden.maps(method, concept_embeds=golden.embeds, layers=layers)
            close(actual, golden.tensors[f"concepts.agg.raw.{key}{suffix}"], tolerance)

    @pytest.mark.parametrize("method", ["gramcol", "imap"])
    def test_words_of_the_prompt(self, golden: Golden, method: str) -> None:
        key, tolerance = KEYS[method]
        tokens = {f"token {i}": [i] for i in range(golden.facts["n_tokens"])}
        for layer in golden.facts["layers"]:
            actual = golden.maps(method, target="prompt", prompt_tokens=tokens, layers=[layer])
            close(actual, golden.tensors[f"prompt.layer{layer}.{key}"][: len(tokens)], tolerance)

    def test_the_default_is_another(self, golden: Golden) -> None:
        with dcm.trace(golden.transformer, concept_embeds=golden.embeds, normalize="none", layers=[2]) as maps:
            golden.run()
        expected = golden.tensors["concepts.layer2.concept_attention_maps"][: golden.concepts]
        assert (maps.get()[0].flatten(1) - expected).abs().max() > 0.05 * expected.abs().max()


@contextmanager
def noted_queries(transformer: Any) -> Iterator[list[torch.Tensor]]:
    """Queries of the video `[R, H, N, D]`, layer by layer."""
    queries: list[torch.Tensor] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def attend(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if query.shape[2] == key.shape[2] > 45:
            queries.append(query[:, :, :45])
        return original(query, key, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        yield queries


@pytest.mark.parametrize("padded", [True, False])
def test_official_concepts_never_receive_what_they_read(padded: bool) -> None:
    """Against its formula: `c + gate n + gate' ff(...)` with n the normed concept, all refined as one sequence."""
    transformer = tiny.make_transformer()
    inputs, embeds = tiny.inputs(1, 9, 4), tiny.seeded(3, tiny.WIDTH, seed=9)
    parity = replace(IMAP, padded=padded)
    with noted_queries(transformer) as queries:
        transformer(**inputs)
    with (
        dcm.trace(transformer, concept_embeds=embeds, methods=["cross_attention"], layers=[1], parity=parity) as maps,
        torch.no_grad(),
    ):
        transformer(**inputs)
    text = torch.zeros(1, 9, tiny.WIDTH) if padded else torch.zeros(1, 3, tiny.WIDTH)
    text[0, :3] = embeds
    block, following = transformer.transformer_blocks
    with torch.no_grad():
        mask = (torch.arange(text.shape[1]) < 3)[None].float()
        time, _ = transformer.time_text_embed(inputs["timestep"], inputs["pooled_projections"], inputs["guidance"])
        concepts = transformer.context_embedder(text, inputs["timestep"], mask)
        normed, gate, shift, scale, second_gate = block.norm1_context(concepts, emb=time)
        concepts = concepts + gate[:, None] * normed
        inner = block.norm2_context(concepts) * (1 + scale[:, None]) + shift[:, None]
        concepts = concepts + second_gate[:, None] * block.ff_context(inner)
        normed, *_ = following.norm1_context(concepts, emb=time)
        key = following.attn.norm_added_k(following.attn.add_k_proj(normed).unflatten(2, (4, 16))).transpose(1, 2)
    expected = (key[:, :, :3] @ queries[1].mT).mean(1)
    close(maps.get()[0].flatten(1), expected[0])


def prompt_embeds(count: int = 1, text: int = 7) -> dict[str, torch.Tensor]:
    return {
        "prompt_embeds": tiny.seeded(count, text, tiny.WIDTH, seed=1),
        "pooled_prompt_embeds": tiny.seeded(count, tiny.POOLED, seed=2),
        "prompt_attention_mask": tiny.text_mask(count, text),
    }


def image_to_video(condition: str, **modules: Any) -> HunyuanVideoImageToVideoPipeline:
    """In "latent_concat", latents, image and mask share the channels."""
    channels = 9 if condition == "latent_concat" else 4
    transformer = tiny.make_transformer(image_condition_type=condition, in_channels=channels, out_channels=4)
    parts: dict[str, Any] = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "image_processor")
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = HunyuanVideoImageToVideoPipeline(
        transformer=transformer, scheduler=scheduler, vae=tiny.make_vae(), **(parts | modules)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def skyreels() -> HunyuanSkyreelsImageToVideoPipeline:
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = HunyuanSkyreelsImageToVideoPipeline(
        transformer=tiny.make_transformer(in_channels=8, out_channels=4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=tiny.make_vae(),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["token_replace", "latent_concat", "skyreels"])
def test_image_to_video(name: str) -> None:
    """The given frame is part of the grid; the second pass of a step is the unconditional one."""
    pipe = skyreels() if name == "skyreels" else image_to_video(name)
    negative = {f"negative_{key}": value for key, value in prompt_embeds(text=5).items()}
    calls: list[dict[str, Any]] = []

    def run() -> torch.Tensor:
        image = Image.new("RGB", (80, 48), (90, 20, 200))
        options = {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        guided = {"true_cfg_scale": 2.0, "num_inference_steps": 2, **prompt_embeds(), **negative}
        frames: torch.Tensor = pipe(image=image, **options, **guided, **tiny.SIZE).frames
        return frames

    off = run()
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    embeds = tiny.seeded(2, tiny.WIDTH, seed=3)
    with dcm.trace(pipe, concept_embeds=embeds, methods=METHODS, branch="both", steps=[1]) as maps:
        on = run()
    hook.remove()
    assert torch.equal(on, off)
    assert len(calls) == 4
    for branch, inputs in zip(("cond", "uncond"), calls[2:], strict=True):
        with dcm.trace(pipe.transformer, concept_embeds=embeds, methods=METHODS) as expected, torch.no_grad():
            pipe.transformer(**inputs)
        for method in METHODS:
            assert maps[branch].get(method).shape == (1, 2, 3, 3, 5)
            close(maps[branch].get(method), expected.get(method), 1e-5)


def test_distilled_guidance_is_one_pass() -> None:
    pipe = tiny.make_pipeline()
    options = {"negative_prompt": None, "guidance_scale": 6.0}
    off = tiny.call(pipe, ["a red dog"], **options)
    with dcm.trace(pipe, ["dog"], methods=["gramcol"]) as maps:
        assert torch.equal(tiny.call(pipe, ["a red dog"], **options), off)
    assert maps.coverage["gramcol"].tolist() == [[True] * 4] * 3


def test_caches_of_the_token_refiner_are_left_alone() -> None:
    pipe = tiny.make_pipeline()
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe._current_timestep,
    )
    pipe.transformer.enable_cache(config)
    off = tiny.call(pipe, ["a red dog"], negative_prompt=None)
    with dcm.trace(pipe, ["dog"]) as maps:
        on = tiny.call(pipe, ["a red dog"], negative_prompt=None)
    assert torch.equal(on, off)
    assert maps.get().isfinite().all()


def llama_states(pipe: Any, text: str) -> torch.Tensor:
    """States of the tokens of a text in the template, by its own tokens `[token, width]`."""
    template = (
        "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
        "1. The main content and theme of the video."
        "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
        "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
        "4. background environment, light, style and atmosphere."
        "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n"
    )
    ids = pipe.tokenizer(template + text, return_tensors="pt").input_ids
    with torch.no_grad():
        states: torch.Tensor = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-3]
    return states[0, 95:]


class TestText:
    @pytest.mark.parametrize("length", [None, 16])
    def test_concepts_are_encoded_within_the_template(self, length: int | None) -> None:
        pipe = tiny.make_pipeline()
        random = torch.get_rng_state()
        states, counts = find_backbone(pipe.transformer).encode(pipe, ["dog", "the red rock"], length)
        assert counts == [1, 3]
        for text, state, count in zip(["dog", "the red rock"], states, counts, strict=True):
            close(state[:count], llama_states(pipe, text), 1e-5)
        assert torch.equal(torch.get_rng_state(), random)

    def test_concepts_of_an_image_pipeline_follow_a_black_image(self) -> None:
        pipe = image_to_video("token_replace", **llava())
        states, counts = find_backbone(pipe.transformer).encode(pipe, ["dog", "the red rock"], None)
        assert counts == [1, 3]
        for text, state, count in zip(["dog", "the red rock"], states, counts, strict=True):
            image = Image.new("RGB", (48, 48))
            with torch.no_grad():
                embeds, _, mask = pipe.encode_prompt(image=image, prompt=text, image_embed_interleave=4)
            assert mask[0, : 144 + count].all()
            close(state[:count], embeds[0, 144 : 144 + count], 1e-5)

    def test_what_cannot_be_encoded(self) -> None:
        pipe = tiny.make_pipeline()
        encode: Callable[..., Any] = find_backbone(pipe.transformer).encode
        with pytest.raises(dcm.ConceptMapsError, match="has 300 tokens; expected at most 255"):
            encode(pipe, ["dog " * 300], None)
        with pytest.raises(dcm.ConceptMapsError, match="'zebra' has no word that the tokenizer knows"):
            encode(pipe, ["zebra"], None)
        pipe.text_encoder = None
        with pytest.raises(dcm.ConceptMapsError, match="no tokenizer or text encoder"):
            encode(pipe, ["dog"], None)

    def test_words_of_the_prompt(self) -> None:
        pipe = tiny.make_pipeline()
        positions = {"red": [1, 4], "dog": [2]}
        with dcm.trace(pipe, ["red", "dog"], target="prompt", methods=METHODS) as found:
            off = tiny.call(pipe, ["a red dog, red rock"])
        with dcm.trace(pipe, target="prompt", prompt_tokens=positions, methods=METHODS) as given:
            assert torch.equal(tiny.call(pipe, ["a red dog, red rock"]), off)
        spans = find_backbone(pipe.transformer).token_spans(pipe, "a red dog, red rock", 8)
        assert spans == [(0, 1), (2, 5), (6, 9), (9, 10), (11, 14), (15, 19), (0, 0)]
        for method in METHODS:
            assert torch.equal(found.get(method), given.get(method))

    def test_words_are_not_looked_for_in_another_template(self) -> None:
        pipe, template = tiny.make_pipeline(), {"template": "the beach {}", "crop_start": 0}
        with (
            pytest.raises(dcm.ConceptMapsError, match="^prompt_template gives the text of this run other tokens"),
            dcm.trace(pipe, ["dog"], target="prompt", methods=METHODS),
        ):
            tiny.call(pipe, ["a red dog"], prompt_template=template)

    def test_words_stand_behind_the_image(self) -> None:
        for condition, images in (("token_replace", 144), ("latent_concat", 288)):
            pipe = image_to_video(condition, tokenizer=tiny.make_tokenizer(begin=1))
            spans = find_backbone(pipe.transformer).token_spans(pipe, "the dog", images + 252)
            assert spans[: images + 3] == [(0, 0)] * images + [(0, 3), (4, 7), (0, 0)]


def llava() -> dict[str, Any]:
    """Tiny LLaVA with the 24 x 24 image tokens that the template has room for."""
    torch.manual_seed(5)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=2,
        projection_dim=8,
    )  # fmt: skip
    text = tiny.make_llama().config
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=6, pad_token_id=0)
    return {
        "text_encoder": LlavaForConditionalGeneration(config).eval(),
        "tokenizer": tiny.make_tokenizer(begin=1),
        "text_encoder_2": tiny.make_clip(),
        "tokenizer_2": tiny.make_tokenizer(),
        "image_processor": CLIPImageProcessorPil(
            size={"height": 48, "width": 48}, crop_size={"height": 48, "width": 48}
        ),
    }


def test_presets() -> None:
    backbone = find_backbone(tiny.make_transformer())
    with torch.device("meta"):
        checkpoint = HunyuanVideoTransformer3DModel()
        image = HunyuanVideoTransformer3DModel(image_condition_type="token_replace")
    preset = backbone.preset(checkpoint)
    assert preset is not None
    assert preset.name == "HunyuanVideo"
    assert preset.layers["imap"] == (1, 2, 4, 5, 6, 9, 10, 13, 15, 16, 17, 18, 19)
    assert preset.layers["concept_attention"] == tuple(range(20))
    assert preset.heads["imap"] == dcm.HeadSelection(top_k=5)
    assert backbone.preset(image) is None
    assert backbone.preset(tiny.make_transformer()) is None
