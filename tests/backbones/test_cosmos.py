"""Cosmos: its pipelines of three generations, the image context and the conversation of 2.5, and encoding."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from backbones import test_contract
from backbones import tiny_cosmos as tiny
from backbones._case import Case, Inputs, seeded
from backbones._oracle import embeds_of
from backbones._runs import check_run
from diffusers import (
    Cosmos2_5_PredictBasePipeline,
    Cosmos2_5_TransferPipeline,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTextToWorldPipeline,
    CosmosVideoToWorldPipeline,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones.cosmos import BACKBONE

METHODS = ("cross_attention", "gramcol", "imap")
CONCEPTS = ["dog", "red sky"]


def picture(seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (96, 160, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@cache
def cosmos1(cls: Any, channels: int) -> Any:
    return tiny.make_pipeline(cls, in_channels=channels)


@cache
def cosmos2(cls: Any, channels: int) -> Any:
    transformer = tiny.make_transformer(in_channels=channels, extra_pos_embed_type=None)
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    torch.manual_seed(1)
    return tiny.finish(cls, transformer, tiny.make_wan_vae(), scheduler, tiny.make_tokenizer(), tiny.make_encoder())


@cache
def cosmos25() -> Any:
    torch.manual_seed(1)
    return tiny.finish(
        Cosmos2_5_PredictBasePipeline,
        tiny.make_25(),
        tiny.make_wan_vae(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        tiny.make_conversation_tokenizer(),
        tiny.make_qwen(),
    )


class Residuals(ModelMixin, ConfigMixin):  # type: ignore[misc]  # untyped host
    """Stands in for the control model, which needs torchvision: the same interface, residuals of the controls."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(1, 48)

    def forward(self, controls_latents: torch.Tensor, **_: Any) -> tuple[list[torch.Tensor]]:
        """A residual for two of three blocks `[batch, token, 48]`."""
        pooled = torch.nn.functional.avg_pool3d(controls_latents.mean(1, keepdim=True), (1, 4, 4))
        residual = self.project(pooled.flatten(2).mT)
        return ([residual, 0.5 * residual],)


@cache
def transfer() -> Any:
    """Its transformer takes residuals, and reads an image context of zeros."""
    torch.manual_seed(1)
    transformer = with_image_context(controlnet_block_every_n=2, max_size=(9, 32, 32))
    components = cosmos25().components | {"transformer": transformer}
    pipe = Cosmos2_5_TransferPipeline(**components, controlnet=Residuals())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def variant(name: str, pipeline: Any, call: Any = tiny.call_video, **changes: Any) -> Case:
    """Another pipeline of the family."""
    return replace(tiny.CASES[0], name=name, pipeline=pipeline, call=call, **changes)


VIDEO = [picture(seed) for seed in range(9)]
VARIANTS = (
    variant(
        "1, image to world",
        partial(cosmos1, CosmosVideoToWorldPipeline, 5),
        partial(tiny.call_video, image=picture()),
    ),
    variant(
        "2, text to image",
        partial(cosmos2, Cosmos2TextToImagePipeline, 4),
        tiny.call,
        grid=(1, 3, 5),
        frames_per_prompt="num_images_per_prompt",
    ),
    variant(
        "2, image to world",
        partial(cosmos2, Cosmos2VideoToWorldPipeline, 5),
        partial(tiny.call_video, image=picture()),
    ),
    variant("2.5, text to world", cosmos25, partial(tiny.call_video, max_sequence_length=48)),
)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_pipelines(case: Case) -> None:
    checks = test_contract.TestPipeline()
    checks.test_frames_are_unchanged(case)
    checks.test_steps_and_branches(case)


def test_a_video_in_2_5() -> None:
    """Two latent frames are given, with a timestep of their own."""

    def call(pipe: Any, prompts: list[str]) -> torch.Tensor:
        return tiny.call_video(pipe, prompts[:1], video=VIDEO, max_sequence_length=48, conditional_frame_timestep=0.9)

    case = variant("2.5, video to world", cosmos25, call)
    checks = test_contract.TestPipeline()
    checks.test_frames_are_unchanged(case)
    checks.test_steps_and_branches(case)
    passes = test_contract.recorded_calls(case, cosmos25(), ["a red dog"])
    assert [given["timestep"].argmax().item() for _, given in passes] == [2, 2, 0, 0, 0, 0]


def call_transfer(pipe: Any, prompts: list[str], **options: Any) -> torch.Tensor:
    settings = {"controls": VIDEO, "num_frames_per_chunk": 9, "max_sequence_length": 48}
    return tiny.call(pipe, prompts[:1], **(settings | options))


def test_transfer() -> None:
    run = partial(call_transfer, transfer(), ["a red dog"])
    rows = [(place, slice(None)) for place in (0, 2, 4)]
    check_run(transfer(), run, embeds_of(tiny.CASES[1]), tiny.GRID, rows, passes=6, methods=METHODS)


def test_transfers_in_chunks_are_refused() -> None:
    with (
        dcm.trace(transfer(), CONCEPTS, methods=METHODS),
        pytest.raises(dcm.ConceptMapsError, match="makes this video in chunks"),
    ):
        call_transfer(transfer(), ["a red dog"], controls=[*VIDEO, *VIDEO])


@pytest.mark.parametrize("case", [tiny.CASES[0], VARIANTS[1], VARIANTS[3]], ids=str)
def test_steps_of_rounded_timesteps(case: Case) -> None:
    """In half precision the pipelines of 1 and 2 hand over copies."""
    assert case.pipeline is not None
    assert case.call is not None
    pipe = make_new(case.pipeline).to(torch.bfloat16)
    off = case.call(pipe, ["a red dog"])
    with dcm.trace(pipe, CONCEPTS, methods=METHODS, branch="both") as maps:
        assert torch.equal(case.call(pipe, ["a red dog"]), off)
    for branch in maps.values():
        assert branch.coverage["imap"].all()
        assert branch.coverage["imap"].shape == (3, 3)


def make_new(pipeline: Any) -> Any:
    """A pipeline of its own, where others are cached."""
    made = partial(pipeline)
    return getattr(made.func, "__wrapped__", made.func)(*made.args)


def with_image_context(**config: Any) -> Any:
    return tiny.make_25(img_context_dim_in=12, img_context_num_tokens=4, img_context_dim_out=48, **config)


def image_inputs(batch: int) -> Inputs:
    inputs = tiny.inputs_25(batch, 5, 1)
    return inputs | {"encoder_hidden_states": (inputs["encoder_hidden_states"], seeded(batch, 4, 12, seed=9))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2])
def test_image_context_changes_nothing(batch: int, dtype: torch.dtype) -> None:
    transformer = with_image_context().to(dtype)
    inputs = image_inputs(batch)
    inputs["encoder_hidden_states"] = tuple(context.to(dtype) for context in inputs["encoder_hidden_states"])
    inputs |= {name: inputs[name].to(dtype) for name in ("hidden_states", "condition_mask")}
    with torch.no_grad():
        off = transformer(**inputs, return_dict=False)[0]
        with dcm.trace(transformer, concept_embeds=embeds_of(tiny.CASES[1]), methods=METHODS) as maps:
            assert torch.equal(transformer(**inputs, return_dict=False)[0], off)
    assert off.isfinite().all()
    assert maps.get("imap").shape == (batch, 3, *tiny.GRID)


def test_image_context_has_no_part_in_maps() -> None:
    """Where nothing is read in it, maps are those of the model without one."""
    transformer, plain = with_image_context(), tiny.make_25()
    plain.load_state_dict(transformer.state_dict(), strict=False)
    for block in transformer.transformer_blocks:
        torch.nn.init.zeros_(block.attn2.v_img.weight)
    embeds, inputs = embeds_of(tiny.CASES[1]), image_inputs(2)
    text = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"][0]}
    with torch.no_grad():
        with dcm.trace(transformer, concept_embeds=embeds, methods=METHODS) as maps:
            transformer(**inputs)
        with dcm.trace(plain, concept_embeds=embeds, methods=METHODS) as expected:
            plain(**text)
        with dcm.trace(transformer, methods=METHODS, target="prompt", prompt_tokens={"word": [4], "other": [2]}) as a:
            transformer(**inputs)
        with dcm.trace(plain, methods=METHODS, target="prompt", prompt_tokens={"word": [4], "other": [2]}) as b:
            plain(**text)
    for method in METHODS:
        torch.testing.assert_close(maps.get(method), expected.get(method), rtol=0, atol=1e-5)
        torch.testing.assert_close(a.get(method), b.get(method), rtol=0, atol=1e-5)


def test_text_with_a_mask() -> None:
    transformer, inputs = tiny.make_transformer(), tiny.inputs(2, 5, 1)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    with torch.no_grad():
        off = transformer(**inputs, attention_mask=mask, return_dict=False)[0]
        with dcm.trace(transformer, concept_embeds=embeds_of(tiny.CASES[0]), methods=METHODS):
            assert torch.equal(transformer(**inputs, attention_mask=mask, return_dict=False)[0], off)
        assert not torch.equal(transformer(**inputs, return_dict=False)[0], off)


def test_encode() -> None:
    pipe, random = cosmos1(CosmosTextToWorldPipeline, 4), torch.get_rng_state()
    states, counts = BACKBONE.encode(pipe, ["red dog", "sky"], None)
    assert torch.equal(torch.get_rng_state(), random)
    assert counts == [2, 1]
    for text, own, count in zip(["red dog", "sky"], states, counts, strict=True):
        with torch.no_grad():
            expected = pipe.text_encoder(pipe.tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0]
        torch.testing.assert_close(own[:count], expected[:count], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_encode_in_a_conversation(side: str) -> None:
    """A concept has the states that the pipeline's own conversation gives its words, in all layers, normed."""
    pipe = cosmos25()
    pipe.tokenizer.padding_side = side
    states, counts = BACKBONE.encode(pipe, ["red dog", "sky"], 48)
    assert counts == [2, 1]
    for text, own, count in zip(["red dog", "sky"], states, counts, strict=True):
        spans = BACKBONE.token_spans(pipe, text, 48)
        rows = [row for row, span in enumerate(spans) if span != (0, 0)]
        assert [text[slice(*spans[row])] for row in rows] == text.split()
        read: list[torch.Tensor] = []
        hook = pipe.text_encoder.register_forward_pre_hook(lambda _, args, read=read: read.append(args[0]))
        expected, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=48)
        hook.remove()
        assert read[0][0, rows].tolist() == pipe.tokenizer(text).input_ids
        torch.testing.assert_close(own[:count], expected[0, rows])
    pipe.tokenizer.padding_side = "right"


def test_words_of_the_prompt() -> None:
    pipe = cosmos25()
    call = partial(tiny.call_video, pipe, ["the red dog"], max_sequence_length=48)
    rows = [row for row, span in enumerate(BACKBONE.token_spans(pipe, "the red dog", 48)) if span != (0, 0)]
    assert len(rows) == 3
    with dcm.trace(pipe, ["dog", "red"], methods=METHODS, target="prompt") as words:
        off = call()
    given = {"dog": [rows[2]], "red": [rows[1]]}
    with dcm.trace(pipe, methods=METHODS, target="prompt", prompt_tokens=given) as positions:
        assert torch.equal(call(), off)
    for method in METHODS:
        assert torch.equal(words.get(method), positions.get(method))


def test_what_cannot_be_encoded() -> None:
    pipe = cosmos1(CosmosTextToWorldPipeline, 4)
    with pytest.raises(dcm.ConceptMapsError, match="has 13 tokens; expected at most 11"):
        BACKBONE.encode(pipe, ["a dog " * 6 + "sky"], 12)
    with pytest.raises(dcm.ConceptMapsError, match="does not fit into 30 tokens"):
        BACKBONE.encode(cosmos25(), ["a dog " * 6 + "sky"], 30)
    with pytest.raises(dcm.ConceptMapsError, match="no word that the tokenizer knows"):
        dcm.trace(pipe, ["zebra"], methods=METHODS).__enter__()
    bare = CosmosTextToWorldPipeline(**(pipe.components | {"tokenizer": None, "text_encoder": None}))
    with pytest.raises(dcm.ConceptMapsError, match="CosmosTextToWorldPipeline has no tokenizer or text encoder"):
        dcm.trace(bare, ["dog"], methods=METHODS).__enter__()


def test_geometry() -> None:
    assert BACKBONE.geometry(tiny.make_transformer()) == {"frames_per_latent": 8, "latents_per_token": 1}
    assert BACKBONE.geometry(tiny.make_25()) == {"frames_per_latent": 4, "latents_per_token": 1}
