"""SkyReels-V2 beyond the contract: image-to-video, and the pipelines with diffusion forcing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import tiny_skyreels_v2 as tiny
from backbones.test_contract import CONCEPTS, close, output_of, recorded_calls
from backbones.test_wan import METHODS, image_parts, picture, traced
from backbones.tiny_wan import GRID, call, components, silent
from diffusers import (
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    SkyReelsV2ImageToVideoPipeline,
)

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones.skyreels_v2 import BACKBONE

WINDOWS = (
    "^SkyReelsV2DiffusionForcing.* makes this clip in windows that overlap, .*no more frames than base_num_frames"
)


def test_image_to_video() -> None:
    transformer = tiny.make_transformer(image_dim=16, added_kv_proj_dim=48, in_channels=36)
    pipe = silent(SkyReelsV2ImageToVideoPipeline(**components(transformer=transformer, **image_parts())))
    maps = traced(pipe, image=picture(), max_sequence_length=512, branch="both")
    for branch in ("cond", "uncond"):
        assert maps[branch].get().shape == (1, 3, *GRID)
        assert maps[branch].coverage["imap"].all()
    assert not torch.equal(maps["cond"].get(), maps["uncond"].get())


def test_words_of_the_prompt() -> None:
    maps = traced(tiny.make_forcing_pipeline(), "  red\n dog", target="prompt", num_frames=13, overlap_history=None)
    assert maps.concepts == ("red", "dog")
    assert maps.get().shape == (1, 2, *tiny.FORCED_GRID)


def test_frames_that_start_one_after_the_other() -> None:
    """Asynchronous: more passes than timesteps, some frames not begun and some finished, all on the grid."""
    pipe = silent(SkyReelsV2DiffusionForcingPipeline(**components(transformer=tiny.make_transformer())))
    options = {"ar_step": 2, "causal_block_size": 2, "num_frames": 13, "overlap_history": None}
    both = traced(pipe, **options, branch="both")
    calls = recorded_calls(tiny.CASES[0], pipe, "a red dog", **options)  # type: ignore[arg-type]
    timesteps = [inputs["timestep"][0].tolist() for _, inputs in calls[::2]]
    assert len(timesteps) == 5
    assert timesteps[0][2:] == [999, 999]
    assert timesteps[-1][:2] == [0, 0]
    assert both["cond"].coverage["imap"].shape == (5, 3)
    assert both["cond"].coverage["imap"].all()
    embeds = dcm.concepts.encode_concepts(BACKBONE, pipe, CONCEPTS, "mean")
    for step in (0, 4):
        maps = traced(pipe, **options, branch="both", steps=[step])
        for branch, offset in (("cond", 0), ("uncond", 1)):
            transformer, inputs = calls[2 * step + offset]
            with dcm.trace(transformer, concept_embeds=embeds, methods=METHODS) as expected:
                output_of(transformer, inputs)
            for method in METHODS:
                assert maps[branch].get(method).shape == (1, 3, *tiny.FORCED_GRID)
                close(maps[branch].get(method), expected.get(method), 1e-6)


def test_frame_rate() -> None:
    """A model that is told its frame rate takes no more than one video at a time."""
    transformer = tiny.make_transformer(inject_sample_info=True)
    pipe = silent(SkyReelsV2DiffusionForcingPipeline(**components(transformer=transformer)))
    maps = traced(pipe, num_frames=13, overlap_history=None, fps=16)
    assert maps.get().shape == (1, 3, *tiny.FORCED_GRID)


def test_forcing_from_an_image() -> None:
    parts = components(transformer=tiny.make_transformer())
    pipe = silent(SkyReelsV2DiffusionForcingImageToVideoPipeline(**parts))
    maps = traced(pipe, image=picture(), num_frames=13, overlap_history=None, addnoise_condition=20)
    assert maps.get().shape == (1, 3, *tiny.FORCED_GRID)
    assert maps.coverage["imap"].shape == (3, 3)
    assert maps.coverage["imap"].all()


def video_to_video() -> tuple[Any, dict[str, Any]]:
    parts = components(transformer=tiny.make_transformer())
    pipe = silent(SkyReelsV2DiffusionForcingVideoToVideoPipeline(**parts))
    return pipe, {"video": [picture(seed) for seed in range(5)], "overlap_history": 5}


def test_forcing_from_a_video() -> None:
    pipe, options = video_to_video()
    maps = traced(pipe, **options, num_frames=13, base_num_frames=13, addnoise_condition=20)
    assert maps.coverage["imap"].all()
    assert maps.get().shape[:2] == (1, 3)


def test_windows_are_refused() -> None:
    forcing = silent(SkyReelsV2DiffusionForcingPipeline(**components(transformer=tiny.make_transformer())))
    video, options = video_to_video()
    for pipe, arguments in ((forcing, {"overlap_history": 5}), (video, options)):
        arguments = {**arguments, "num_frames": 17, "base_num_frames": 9, "addnoise_condition": 0}
        off = call(pipe, "a red dog", **arguments)
        with pytest.raises(dcm.ConceptMapsError, match=WINDOWS), dcm.trace(pipe, CONCEPTS, methods=METHODS):
            call(pipe, "a red dog", **arguments)
        assert torch.equal(call(pipe, "a red dog", **arguments), off)


def test_passes_of_somebody_else_are_not_recorded() -> None:
    pipe, options = tiny.make_forcing_pipeline(), {"num_frames": 13, "overlap_history": None}
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as expected:
        call(pipe, "a red dog", **options)
    other = tiny.forced_inputs(1, 5, 1)
    other["timestep"] = torch.full((1, 4), 13)
    plain = other | {"timestep": torch.full((1,), 13), "enable_diffusion_forcing": False}

    def intrude(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        for inputs in (other, plain):
            output_of(pipe.transformer, inputs)
        return kwargs

    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        call(pipe, "a red dog", **options, callback_on_step_end=intrude)
    for method in METHODS:
        assert torch.equal(maps.get(method), expected.get(method))


def test_no_presets() -> None:
    assert BACKBONE.presets == ()
