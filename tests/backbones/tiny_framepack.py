"""Tiny random FramePack transformers and pipelines of stock classes; 38 tokens of history stand before the grid."""

from __future__ import annotations

from typing import Any

import torch
from backbones import tiny_hunyuan_video as hunyuan
from backbones._case import Case, Inputs, randomize, seeded
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
)
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

IMAGE_WIDTH = 12


def make_transformer() -> HunyuanVideoFramepackTransformer3DModel:
    torch.manual_seed(0)
    images = {"has_image_proj": True, "image_proj_dim": IMAGE_WIDTH, "has_clean_x_embedder": True}
    return randomize(HunyuanVideoFramepackTransformer3DModel(**hunyuan.SETTINGS, **images))


def inputs(batch: int, text: int, seed: int) -> Inputs:
    return {
        **hunyuan.inputs(batch, text, seed),
        "image_embeds": seeded(batch, 2, IMAGE_WIDTH, seed=seed + 3),
        "indices_latents": torch.arange(1, 4),
        "latents_clean": seeded(batch, 4, 2, 6, 10, seed=seed + 4),
        "indices_latents_clean": torch.tensor([0, 4]),
        "latents_history_2x": seeded(batch, 4, 2, 6, 10, seed=seed + 5),
        "indices_latents_history_2x": torch.arange(5, 7),
        "latents_history_4x": seeded(batch, 4, 4, 6, 10, seed=seed + 6),
        "indices_latents_history_4x": torch.arange(7, 11),
    }


def make_pipeline() -> HunyuanVideoFramepackPipeline:
    torch.manual_seed(1)
    vision = SiglipVisionConfig(
        hidden_size=IMAGE_WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8,
        patch_size=4,
    )  # fmt: skip
    pipe = HunyuanVideoFramepackPipeline(
        transformer=make_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=hunyuan.make_vae(),
        text_encoder=hunyuan.make_llama(),
        tokenizer=hunyuan.make_tokenizer(),
        text_encoder_2=hunyuan.make_clip(),
        tokenizer_2=hunyuan.make_tokenizer(),
        image_encoder=SiglipVisionModel(vision).eval(),
        feature_extractor=SiglipImageProcessorPil(size={"height": 8, "width": 8}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SHARED: dict[str, Any] = hunyuan.SHARED | {
    "inputs": lambda batch, text, seed: inputs(batch, text, seed + 1),  # seeds without near ties
    "start": 38,
}
CASES = (Case("FramePack", make_transformer, **SHARED),)
