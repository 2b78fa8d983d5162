"""Kandinsky 5 beyond the contract: its other pipelines, sparse order, words in its template, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from backbones import tiny_kandinsky5 as tiny
from backbones._oracle import embeds_of, kept_state
from backbones.test_contract import CONCEPTS, close, output_of, recorded_calls
from backbones.tiny_kandinsky5 import CASES, GRID, call, components, prepared
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2IPipeline,
    Kandinsky5I2VPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
)
from diffusers.models.attention_dispatch import attention_backend
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones.kandinsky5 import BACKBONE

METHODS = ("cross_attention", "gramcol", "imap")
CASE = CASES[0]


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))


def make_image_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip


def traced(pipe: Any, concepts: Any = CONCEPTS, *, capture: dict[str, Any] | None = None, **options: Any) -> Any:
    """Maps of a call whose frames are the ones that it has without them."""
    off = call(pipe, "a red dog", **options)
    with dcm.trace(pipe, concepts, methods=METHODS, **(capture or {})) as maps:
        on = call(pipe, "a red dog", **options)
    assert off.isfinite().all()
    assert torch.equal(on, off)
    assert torch.equal(call(pipe, "a red dog", **options), off)
    return maps


def test_image_to_video() -> None:
    pipe = prepared(Kandinsky5I2VPipeline(**components(transformer=tiny.make_transformer(visual_cond=True))))
    maps = traced(pipe, capture={"branch": "both"}, image=picture(), num_frames=21)
    for branch in ("cond", "uncond"):
        assert maps[branch].get().shape == (1, 3, 6, 3, 5)
        assert maps[branch].coverage["imap"].shape == (3, 3)
        assert maps[branch].coverage["imap"].all()
    assert not torch.equal(maps["cond"].get(), maps["uncond"].get())


@pytest.mark.parametrize("from_image", [False, True])
def test_images(from_image: bool) -> None:
    cls = Kandinsky5I2IPipeline if from_image else Kandinsky5T2IPipeline
    transformer = tiny.make_transformer(visual_cond=from_image)
    pipe = prepared(cls(**components(transformer=transformer, vae=make_image_vae())))
    pipe.resolutions = [(80, 48)]
    options: dict[str, Any] = {"image": picture()} if from_image else {}
    capture = {"concept_embeds": embeds_of(CASE)} if from_image else {}
    maps = traced(pipe, CONCEPTS, capture=capture, num_frames=None, **options)
    assert maps.get().shape == (1, 3, 1, 3, 5)
    assert maps.coverage["imap"].all()


def test_two_videos_of_a_prompt_share_its_text() -> None:
    pipe = tiny.make_pipeline()

    def run() -> torch.Tensor:
        return pipe(
            "a red dog", num_videos_per_prompt=2, num_inference_steps=2, max_sequence_length=12,
            negative_prompt="rock", output_type="latent", generator=torch.Generator().manual_seed(0), **tiny.SIZE,
        ).frames  # fmt: skip

    off = run()
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        assert torch.equal(run(), off)
    assert maps.get().shape == (2, 3, *GRID)
    assert not torch.equal(maps.get()[0], maps.get()[1])


def test_sparse_order() -> None:
    """Tokens in squares of eight by eight, every one seen by all: the maps are those of the dense model."""
    transformer = tiny.make_transformer()
    inputs = tiny.inputs(1, 5, 3)
    inputs["hidden_states"] = tiny.seeded(1, 2, 16, 32, 4, seed=3)
    inputs["visual_rope_pos"] = [torch.arange(count) for count in (2, 8, 16)]
    with dcm.trace(transformer, concept_embeds=embeds_of(CASE), methods=METHODS) as dense:
        expected = output_of(transformer, inputs)
    squares = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    sparse = inputs | {"sparse_params": {"to_fractal": True, "sta_mask": squares, "P": 1.0}}
    with attention_backend("flex"):
        off = output_of(transformer, sparse)
        close(off, expected, 1e-3)
        with dcm.trace(transformer, concept_embeds=embeds_of(CASE), methods=METHODS) as maps:
            assert torch.equal(output_of(transformer, sparse), off)
    for method in METHODS:
        assert maps.get(method).shape == (1, 3, 2, 8, 16)
        close(maps.get(method), dense.get(method), 1e-2)  # rotary embeddings are rounded to bfloat16


def test_text_blocks_of_the_concepts_pass_by_what_caches_put_into_attention() -> None:
    transformer, inputs = tiny.make_transformer(), tiny.inputs(2, 5, 3)
    with dcm.trace(transformer, concept_embeds=embeds_of(CASE), methods=METHODS) as expected:
        output_of(transformer, inputs)
    lengths: list[int] = []
    for block in transformer.text_transformer_blocks:
        attention = block.self_attention
        forward = attention.forward

        def patched(hidden_states: torch.Tensor, *args: Any, forward: Any = forward, **kwargs: Any) -> torch.Tensor:
            lengths.append(hidden_states.shape[1])
            return forward(hidden_states, *args, **kwargs)

        attention.forward = patched
    before = kept_state(transformer)
    with dcm.trace(transformer, concept_embeds=embeds_of(CASE), methods=METHODS) as maps:
        output_of(transformer, inputs)
    assert lengths == [5, 5]
    assert kept_state(transformer) == before
    assert all("forward" in vars(block.self_attention) for block in transformer.text_transformer_blocks)
    assert all(torch.equal(maps.get(method), expected.get(method)) for method in METHODS)


def test_concepts_do_not_see_one_another() -> None:
    transformer, inputs, embeds = tiny.make_transformer(), tiny.inputs(2, 5, 3), embeds_of(CASE)
    made = []
    for own in (embeds, embeds[[2, 0, 1]], embeds[:2]):
        with dcm.trace(transformer, concept_embeds=own, methods=METHODS, normalize="none") as maps:
            output_of(transformer, inputs)
        made.append(maps)
    for method in METHODS:
        close(made[1].get(method)[:, [1, 2, 0]], made[0].get(method), 1e-6)
        close(made[2].get(method), made[0].get(method)[:, :2], 1e-6)


def test_words_of_the_prompt_in_its_template() -> None:
    pipe = tiny.make_pipeline()
    prompt = "  a red\n dog on  the beach"
    with dcm.trace(pipe, methods=METHODS, target="prompt") as maps:
        call(pipe, prompt)
    assert maps.concepts == ("a", "red", "dog", "on", "the", "beach")
    positions = {word: [place] for place, word in enumerate(maps.concepts)}
    with dcm.trace(pipe, methods=METHODS, target="prompt", prompt_tokens=positions) as given:
        call(pipe, prompt)
    assert all(torch.equal(maps.get(method), given.get(method)) for method in METHODS)
    clean = BACKBONE.clean(prompt)
    spans = BACKBONE.token_spans(pipe, clean, 7)
    assert [clean[start:stop] for start, stop in spans] == [*clean.split(), ""]  # the end mark covers none


def test_concepts_are_encoded_as_prompts() -> None:
    pipe, random = tiny.make_pipeline(), torch.get_rng_state()
    embeds = dcm.concepts.encode_concepts(BACKBONE, pipe, ["red dog", "sky"], "mean")
    rows = [pipe.encode_prompt([text])[0][0] for text in ("red dog", "sky")]
    assert [len(row) for row in rows] == [3, 2]  # the words and the end mark
    close(embeds, torch.stack([rows[0][:2].mean(0), rows[1][0]]), 1e-6)
    assert torch.equal(torch.get_rng_state(), random)
    _, counts = BACKBONE.encode(pipe, ["red dog running"], 2)
    assert counts == [2]


def refused(pipe: Any, message: str, concepts: Any = ("dog", "sky"), *, value: bool = False) -> None:
    error = dcm.ConceptMapsValueError if value else dcm.ConceptMapsError
    with pytest.raises(error, match=message), dcm.trace(pipe, list(concepts), methods=METHODS):
        raise AssertionError("attached")


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"])
def test_a_pipeline_that_lacks_an_encoder(part: str) -> None:
    pipe = tiny.make_pipeline()
    pipe.register_modules(**{part: None})
    refused(pipe, "^this Kandinsky5T2VPipeline has no tokenizer or text encoder .*; pass concept_embeds instead")


def test_concepts_that_cannot_be_encoded() -> None:
    pipe = prepared(Kandinsky5I2IPipeline(**components(transformer=tiny.make_transformer(visual_cond=True))))
    message = "^Kandinsky5I2IPipeline encodes a text together with an image, which concepts do not have; pass concept"
    refused(pipe, message)
    message = "^concept 'dog .*' has 512 tokens; expected at most 511"
    refused(tiny.make_pipeline(), message, ["dog " * 512, "sky"], value=True)


@pytest.mark.parametrize(("shift", "place"), [(400.0, 0), (40.0, 1)])
def test_timesteps_that_bfloat16_rounds_to_the_same_number(shift: float, place: int) -> None:
    """The pipeline writes down no timestep: its passes are counted there, with and without guidance."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipe = prepared(Kandinsky5T2VPipeline(**components(transformer=tiny.make_transformer(), scheduler=scheduler)))
    pipe.transformer.to(torch.bfloat16)
    for scale in (4.0, 1.0):
        options = {"guidance_scale": scale, "num_inference_steps": 12}
        calls = recorded_calls(CASE, pipe, "a red dog", **options)  # type: ignore[arg-type]
        cond = calls[::2] if scale > 1 else calls
        handed = [inputs["timestep"].item() for _, inputs in cond]
        assert len(handed) == 12
        assert handed.index(handed[place + 1]) == place
        with dcm.trace(pipe, CONCEPTS, methods=["cross_attention"], steps=[place, place + 1]) as maps:
            call(pipe, "a red dog", **options)
        covered = maps.coverage["cross_attention"].all(1)
        assert covered.nonzero().flatten().tolist() == [place, place + 1]
        embeds = dcm.concepts.encode_concepts(BACKBONE, pipe, CONCEPTS, "mean")
        made = []
        for transformer, inputs in cond[place : place + 2]:
            with dcm.trace(transformer, concept_embeds=embeds, methods=["cross_attention"]) as expected:
                output_of(transformer, inputs)
            made.append(expected.get())
        close(maps.get(), torch.stack(made).mean(0), 1e-6)


def test_facts() -> None:
    assert BACKBONE.presets == ()
    assert BACKBONE.geometry(tiny.make_transformer()) == {"frames_per_latent": 4, "latents_per_token": 1}
