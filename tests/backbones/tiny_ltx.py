"""Tiny random LTX-Video transformers and pipelines of stock classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backbones._case import Case, Inputs, append_to_text, randomize, seeded
from backbones.tiny_cogvideox import make_tokenizer
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

WIDTH = 32
GRID = (3, 3, 5)
FRAME = 15
"""Tokens of one frame of the grid."""


def make_transformer() -> LTXVideoTransformer3DModel:
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=5, attention_head_dim=8, cross_attention_dim=40,
        num_layers=3, caption_channels=WIDTH,
    )  # fmt: skip
    return randomize(transformer)


def inputs(batch: int, text: int, seed: int) -> Inputs:
    mask = torch.ones(batch, text, dtype=torch.bool)
    mask[0, 3:] = False
    return {
        "hidden_states": seeded(batch, 3 * FRAME, 8, seed=seed),
        "encoder_hidden_states": seeded(batch, text, WIDTH, seed=seed + 1),
        "encoder_attention_mask": mask,
        "timestep": torch.full((batch,), 500.0),
        "num_frames": 3,
        "height": 3,
        "width": 5,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def conditioned(batch: int, text: int, seed: int) -> Inputs:
    """Two conditions in front of the grid, at video frames 9 and 16, with coordinates of all tokens in the video."""
    frames = torch.tensor([9.0, 16.0, 0.0, 1.0, 9.0])
    times, rows, columns = torch.meshgrid(frames / 25, 32.0 * torch.arange(3), 32.0 * torch.arange(5), indexing="ij")
    coordinates = torch.stack([times, rows, columns]).flatten(1)
    kept = {name: value for name, value in inputs(batch, text, seed + 15).items() if name.startswith("encoder_")}
    timestep = torch.full((batch, 5 * FRAME), 500.0)
    timestep[:, : 2 * FRAME] = 0.0
    return kept | {
        "hidden_states": seeded(batch, 5 * FRAME, 8, seed=seed + 15),
        "timestep": timestep,
        "video_coords": coordinates.expand(batch, -1, -1),
    }


@contextmanager
def joining(transformer: Any, inputs: Inputs, embeds: torch.Tensor) -> Iterator[Inputs]:
    """Concepts join the text and its mask."""
    mask = inputs["encoder_attention_mask"]
    longer = torch.cat([mask, mask.new_ones(mask.shape[0], embeds.shape[0])], 1)
    with append_to_text(transformer, inputs, embeds) as joined:
        yield joined | {"encoder_attention_mask": longer}


def make_pipeline(cls: Any = LTXPipeline) -> Any:
    torch.manual_seed(1)
    t5_config = T5Config(
        vocab_size=13, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
    )  # fmt: skip
    pipe = cls(
        transformer=make_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=T5EncoderModel(t5_config).eval(),
        tokenizer=make_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, prompts: list[str], **options: Any) -> torch.Tensor:
    settings: dict[str, Any] = {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "height": 96,
        "width": 160,
        "num_frames": 17,
        "max_sequence_length": 12,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    return pipe(prompt=prompts, **(settings | options)).frames


SHARED: dict[str, Any] = {
    "grid": GRID,
    "image_first": True,
    "layers": 3,
    "text_width": WIDTH,
    "joint": False,
    "joining": joining,
}
CASES = (
    Case("LTX-Video", make_transformer, inputs, **SHARED, pipeline=make_pipeline, call=call),
    Case("LTX-Video with conditions", make_transformer, conditioned, **SHARED, start=2 * FRAME),
)
