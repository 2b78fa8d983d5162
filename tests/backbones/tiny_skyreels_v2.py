"""Tiny random SkyReels-V2 transformers and pipelines of stock classes; their parts and calls are those of Wan."""

from __future__ import annotations

from typing import Any

import torch
from backbones import tiny_wan
from backbones._case import Case, Inputs, randomize, seeded
from backbones.tiny_wan import PIPELINE, SHARED, call, components, silent
from diffusers import SkyReelsV2DiffusionForcingPipeline, SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel

FORCED_GRID = (4, 3, 5)


def make_transformer(**config: Any) -> SkyReelsV2Transformer3DModel:
    torch.manual_seed(0)
    return randomize(SkyReelsV2Transformer3DModel(**(tiny_wan.CONFIG | config)))


def make_image_to_video() -> SkyReelsV2Transformer3DModel:
    return make_transformer(image_dim=16, added_kv_proj_dim=48)


def make_forced() -> SkyReelsV2Transformer3DModel:
    """Two frames at a time see each other and those before them."""
    return make_transformer(num_frame_per_block=2)


def forced_inputs(batch: int, text: int, seed: int) -> Inputs:
    """A timestep for every frame."""
    return {
        "hidden_states": seeded(batch, 16, 4, 6, 10, seed=seed + 1),
        "encoder_hidden_states": seeded(batch, text, tiny_wan.WIDTH, seed=seed + 2),
        "timestep": torch.tensor([0, 300, 600, 999]).expand(batch, -1),
        "enable_diffusion_forcing": True,
        "fps": [1] * batch,
    }


def make_pipeline() -> SkyReelsV2Pipeline:
    return silent(SkyReelsV2Pipeline(**components(transformer=make_transformer())))


def make_forcing_pipeline() -> SkyReelsV2DiffusionForcingPipeline:
    return silent(SkyReelsV2DiffusionForcingPipeline(**components(transformer=make_forced())))


def call_forced(pipe: Any, prompts: Any, **options: Any) -> torch.Tensor:
    return call(pipe, prompts, **({"num_frames": 13, "overlap_history": None} | options))


CASES = (
    Case("SkyReels-V2", make_transformer, tiny_wan.inputs, **SHARED, pipeline=make_pipeline, **PIPELINE),
    Case(
        "SkyReels-V2 image-to-video",
        make_image_to_video,
        tiny_wan.image_inputs,
        **SHARED,
        text_lengths=(512,),
        joining=tiny_wan.join_text,
    ),
    Case(
        "SkyReels-V2 diffusion forcing",
        make_forced,
        forced_inputs,
        **(SHARED | {"grid": FORCED_GRID}),
        pipeline=make_forcing_pipeline,
        **(PIPELINE | {"call": call_forced}),
    ),
)
