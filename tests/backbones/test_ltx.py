"""LTX-Video: images and conditions, words of the prompt, encoding, and what is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from backbones import tiny_ltx as tiny
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


def check_run(pipe: Any, prompts: list[str], last: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    """Frames are unchanged, and the maps of the last step are those of the transformer with what it was given then.

    Args:
        pipe: a tiny pipeline.
        prompts: what to make videos of.
        last: filled with the arguments of the last forward pass.
        options: of its call.
    """
    embeds = embeds_of(tiny.CASES[0])
    off = tiny.call(pipe, prompts, **options)
    hook = pipe.transformer.register_forward_pre_hook(lambda *call: last.update(call[2]), with_kwargs=True)
    with dcm.trace(pipe, concept_embeds=embeds, methods=METHODS, steps=[2], branch="both") as maps:
        on = tiny.call(pipe, prompts, **options)
    hook.remove()
    assert torch.equal(on, off)
    with dcm.trace(pipe.transformer, concept_embeds=embeds, methods=METHODS) as expected, torch.no_grad():
        pipe.transformer(**last)
    for method in METHODS:
        assert maps["cond"].get(method).shape == (len(prompts), 3, *tiny.GRID)
        rows = torch.cat([maps[branch].get(method) for branch in ("uncond", "cond")])
        torch.testing.assert_close(rows, expected.get(method), rtol=0, atol=1e-5)
    return {method: maps["cond"].get(method) for method in METHODS}


@pytest.mark.parametrize("case", tiny.CASES, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_one_text_token(case: Any, batch: int) -> None:
    transformer, inputs = case.make(), case.inputs(batch, 1, 1)
    with torch.no_grad():
        off = transformer(**inputs, return_dict=False)[0]
        with dcm.trace(transformer, concept_embeds=embeds_of(case), methods=METHODS) as maps:
            on = transformer(**inputs, return_dict=False)[0]
    assert torch.equal(on, off)
    assert (maps.get("cross_attention").flatten(2).std(-1) > 1e-6).all()


def test_image_to_video() -> None:
    last: dict[str, Any] = {}
    check_run(pipeline(LTXImageToVideoPipeline), PROMPTS, last, image=picture())
    assert last["timestep"].shape == (4, 45)
    assert (last["timestep"][:, :15] == 0).all()


@pytest.mark.parametrize("frame", [0, 8])
def test_conditions(frame: int) -> None:
    """A condition at a later frame is a frame of tokens in front of the grid."""
    last: dict[str, Any] = {}
    condition = LTXVideoCondition(image=picture(), frame_index=frame, strength=0.9)
    check_run(pipeline(LTXConditionPipeline), PROMPTS[:1], last, conditions=[condition])
    assert last["hidden_states"].shape[1] == (60 if frame else 45)


def test_conditions_of_videos() -> None:
    """Of a video at a later frame two latent frames stand in front of the grid, whatever follows is part of it."""
    last: dict[str, Any] = {}
    conditions = [
        LTXVideoCondition(image=picture(), frame_index=0),
        LTXVideoCondition(video=[picture(seed) for seed in range(9)], frame_index=8),
    ]
    check_run(pipeline(LTXConditionPipeline), PROMPTS[:1], last, conditions=conditions, denoise_strength=1.0)
    assert last["hidden_states"].shape[1] == 75


def test_no_conditions() -> None:
    check_run(pipeline(LTXConditionPipeline), PROMPTS, {})


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
