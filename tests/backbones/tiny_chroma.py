"""Tiny random Chroma transformers and pipelines of stock classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backbones._case import Case, Inputs, randomize, seeded
from backbones.tiny_cogvideox import make_tokenizer
from backbones.tiny_flux import WIDTH, call, joining, make_t5, make_vae, positions
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

BEHIND = 4


def make_transformer() -> ChromaTransformer2DModel:
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return randomize(transformer)


def inputs(batch: int, text: int, seed: int) -> Inputs:
    """Without a mask."""
    return {
        "hidden_states": seeded(batch, 15, 16, seed=seed),
        "encoder_hidden_states": seeded(batch, text, WIDTH, seed=seed + 1),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": positions(5, 3),
        "txt_ids": torch.zeros(text, 3),
    }


def masked_inputs(batch: int, text: int, seed: int) -> Inputs:
    """With the mask of prompts that have one token, two, and so on, and with image tokens behind the grid."""
    mask = torch.ones(batch, text + 15 + BEHIND)
    for row in range(batch):
        mask[row, row + 1 : text] = 0
    behind = {
        "hidden_states": seeded(batch, 15 + BEHIND, 16, seed=seed),
        "img_ids": torch.cat([positions(5, 3), positions(2, 2, image=1)]),
    }
    return inputs(batch, text, seed) | behind | {"attention_mask": mask}


@contextmanager
def masked_joining(transformer: Any, given: Inputs, embeds: torch.Tensor) -> Iterator[Inputs]:
    """Concepts join the text, behind its padding; the mask lets them through."""
    text, mask = given["encoder_hidden_states"].shape[1], given["attention_mask"]
    through = mask.new_ones(mask.shape[0], embeds.shape[0])
    with joining(transformer, given, embeds) as joined:
        yield {**joined, "attention_mask": torch.cat([mask[:, :text], through, mask[:, text:]], 1)}


def components() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": make_vae(),
        "text_encoder": make_t5(),
        "tokenizer": make_tokenizer(),
        "transformer": make_transformer(),
    }


def make_pipeline() -> ChromaPipeline:
    pipe = ChromaPipeline(**components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_guided(pipe: Any, prompts: list[str], **options: Any) -> torch.Tensor:
    return call(pipe, prompts, negative_prompt=["the cat"] * len(prompts), guidance_scale=3.0, **options)


SHARED: dict[str, Any] = {
    "grid": (1, 5, 3),
    "image_first": False,
    "layers": 4,
    "text_width": WIDTH,
}
CASES = (
    Case(
        "Chroma",
        make_transformer,
        inputs,
        **SHARED,
        joining=joining,
        pipeline=make_pipeline,
        call=call_guided,
        guidance="two passes",
        frames_per_prompt="num_images_per_prompt",
    ),
    Case("Chroma masked", make_transformer, masked_inputs, **SHARED, behind=BEHIND, joining=masked_joining),
)
