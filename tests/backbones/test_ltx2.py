"""LTX-2: images, conditions, further guidance, generations, the connectors' text, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from backbones import tiny_ltx2 as tiny
from backbones._case import Case
from backbones._oracle import embeds_of
from backbones._runs import check_run, recorded_passes
from diffusers.pipelines.ltx2 import LTX2ConditionPipeline, LTX2ImageToVideoPipeline
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones.ltx2 import BACKBONE

METHODS = ("cross_attention", "gramcol", "imap")
FURTHER = {"stg_scale": 1.0, "modality_scale": 3.0}
"""Guidance with two further forward passes in every step."""


@cache
def pipeline(cls: Any = tiny.LTX2Pipeline) -> Any:
    return tiny.make_pipeline(cls)


@cache
def pipeline_23() -> Any:
    torch.manual_seed(2)
    return tiny.make_pipeline(transformer=tiny.make_23(), connectors=tiny.make_23_connectors())


def picture() -> Image.Image:
    pixels = torch.randint(0, 256, (96, 160, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def check(pipe: Any, case: Case, places: Sequence[int], passes: int, **options: Any) -> None:
    """A run of one prompt with guidance; the conditional row of these forward passes makes the maps."""
    run = partial(tiny.call, pipe, ["a red dog"], **options)
    rows = [(place, slice(1, 2)) for place in places]
    check_run(pipe, run, embeds_of(case), tiny.GRID, rows, passes=passes, methods=METHODS)


@pytest.mark.parametrize("pipe", [pipeline, pipeline_23], ids=["2", "2.3"])
def test_further_passes_are_left_out(pipe: Any) -> None:
    case = tiny.CASES[pipe is pipeline_23]
    check(pipe(), case, [0, 3, 6], 9, **FURTHER)


def test_no_guidance_by_the_prompt() -> None:
    """All rows are conditional then, those of the first forward pass of a step."""
    run = partial(tiny.call, pipeline(), ["a red dog", "the sky"], guidance_scale=1.0, audio_guidance_scale=1.0)
    rows = [(place, slice(None)) for place in (0, 2, 4)]
    check_run(
        pipeline(),
        partial(run, stg_scale=1.0),
        embeds_of(tiny.CASES[0]),
        tiny.GRID,
        rows,
        passes=6,
        methods=METHODS,
    )


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_guidance_of_the_sound_alone(branch: str) -> None:
    run = partial(tiny.call, pipeline(), ["a red dog"], guidance_scale=1.0, audio_guidance_scale=5.0)
    rows = [(place, slice(1, 2) if branch == "cond" else slice(0, 1)) for place in range(3)]
    embeds = embeds_of(tiny.CASES[0])
    check_run(pipeline(), run, embeds, tiny.GRID, rows, passes=3, branch=branch, methods=METHODS)


def test_image_to_video() -> None:
    pipe = pipeline(LTX2ImageToVideoPipeline)
    check(pipe, tiny.CASES[0], [0, 3, 6], 9, image=picture(), image_crf=0, **FURTHER)
    with recorded_passes(pipe.transformer) as seen:
        tiny.call(pipe, ["a red dog"], image=picture(), image_crf=0)
    assert (seen[0]["timestep"][:, :15] == 0).all()


@pytest.mark.parametrize(("frame", "tokens"), [(0, 45), (1, 60)])
def test_conditions(frame: int, tokens: int) -> None:
    """A condition at a later latent frame is a frame of tokens behind the grid."""
    pipe = pipeline(LTX2ConditionPipeline)
    conditions = [LTX2VideoCondition(frames=picture(), index=frame, strength=0.9, crf=0)]
    check(pipe, tiny.CASES[0], [0, 1, 2], 3, conditions=conditions)
    with recorded_passes(pipe.transformer) as seen:
        tiny.call(pipe, ["a red dog"], conditions=conditions)
    assert seen[0]["hidden_states"].shape[1] == tokens


def test_a_missing_grid_is_refused() -> None:
    transformer, inputs = tiny.make_transformer(), tiny.inputs(1, 5, 1)
    coordinates = transformer.rope.prepare_video_coords(1, 3, 3, 5, torch.device("cpu"))
    inputs |= {"num_frames": None, "video_coords": coordinates}
    with (
        dcm.trace(transformer, concept_embeds=embeds_of(tiny.CASES[0]), methods=METHODS),
        pytest.raises(dcm.ConceptMapsError, match="given 45 tokens without num_frames, height and width"),
    ):
        transformer(**inputs)


@pytest.mark.parametrize("case", tiny.CASES, ids=str)
def test_a_concept_that_is_a_text_token_has_its_map(case: Case) -> None:
    """The key of a concept is that of a text row with the same states, as the block modulates those of its row."""
    transformer, inputs = case.make(), case.inputs(2, 5, 1)
    inputs |= {"timestep": torch.tensor([500.0, 300.0]), "sigma": torch.tensor([500.0, 300.0])}
    inputs["encoder_hidden_states"][1] = inputs["encoder_hidden_states"][0]
    embeds = inputs["encoder_hidden_states"][0, [0, 4]]
    options: dict[str, Any] = {"methods": METHODS, "normalize": "none"}
    tokens = {"first": [0], "last": [4]}  # the last one is masked in row 0
    with torch.no_grad():
        with dcm.trace(transformer, target="prompt", prompt_tokens=tokens, **options) as words:
            transformer(**inputs)
        with dcm.trace(transformer, concept_embeds=embeds, **options) as concepts:
            transformer(**inputs)
    for method in METHODS:
        scale = words.get(method).abs().max().item()
        torch.testing.assert_close(words.get(method), concepts.get(method), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("pipe", [pipeline, pipeline_23], ids=["2", "2.3"])
def test_encode(pipe: Any) -> None:
    """What the connectors make of a text that is the concept alone, behind its start mark."""
    pipe, random = pipe(), torch.get_rng_state()
    states, counts = BACKBONE.encode(pipe, [" red dog", "sky"], 12)
    assert torch.equal(torch.get_rng_state(), random)
    assert counts == [2, 1]
    for text, own, count in zip(["red dog", "sky"], states, counts, strict=True):
        ids = torch.tensor([[0] * (12 - count - 1) + pipe.tokenizer(text).input_ids])
        mask = (ids != 0).long()
        with torch.no_grad():
            hidden = pipe.text_encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states
            expected, _, seen = pipe.connectors(torch.stack(hidden, -1).flatten(2), mask)
        assert seen.all()
        torch.testing.assert_close(own[:count], expected[0, 1 : 1 + count])
    assert BACKBONE.encode(pipe, ["sky"], None)[0].shape[:2] == (1, 1024)


@pytest.mark.parametrize(("registers", "first"), [(4, 1), (None, 9)])
def test_words_of_the_prompt(registers: int | None, first: int) -> None:
    """Registers take the place of the padding in front of the prompt, which goes to the front."""
    pipe = tiny.make_pipeline(connectors=tiny.make_connectors(registers))
    call = partial(tiny.call, pipe, [" the red dog "])
    with dcm.trace(pipe, ["dog", "red"], methods=METHODS, target="prompt") as words:
        off = call()
    given = {"dog": [first + 2], "red": [first + 1]}
    with dcm.trace(pipe, methods=METHODS, target="prompt", prompt_tokens=given) as positions:
        assert torch.equal(call(), off)
    for method in METHODS:
        assert torch.equal(words.get(method), positions.get(method))


def test_what_cannot_be_encoded() -> None:
    pipe = pipeline()
    with pytest.raises(dcm.ConceptMapsError, match="has 13 tokens; expected at most 11"):
        BACKBONE.encode(pipe, ["a dog " * 6 + "sky"], 12)
    with pytest.raises(dcm.ConceptMapsError, match="no word that the tokenizer knows"):
        dcm.trace(pipe, ["zebra"], methods=METHODS).__enter__()
    bare = tiny.LTX2Pipeline(**(pipe.components | {"tokenizer": None, "text_encoder": None}))
    with pytest.raises(dcm.ConceptMapsError, match="LTX2Pipeline has no tokenizer or text encoder"):
        dcm.trace(bare, ["dog"], methods=METHODS).__enter__()


def test_geometry() -> None:
    pipe = pipeline()
    assert BACKBONE.geometry(pipe.transformer) == {
        "frames_per_latent": pipe.vae_temporal_compression_ratio,
        "latents_per_token": 1,
    }
