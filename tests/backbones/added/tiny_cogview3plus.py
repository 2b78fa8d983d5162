"""A tiny random CogView3-Plus transformer of the stock class."""

from __future__ import annotations

import torch
from backbones._case import Case, Inputs, randomize, seeded
from diffusers import CogView3PlusTransformer2DModel

WIDTH = 32


def make_transformer() -> CogView3PlusTransformer2DModel:
    torch.manual_seed(0)
    return randomize(
        CogView3PlusTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=6,
            text_embed_dim=WIDTH, time_embed_dim=16, condition_dim=4, pos_embed_max_size=8, sample_size=16,
        )
    )  # fmt: skip


def inputs(batch: int, text: int, seed: int) -> Inputs:
    sizes = {name: torch.full((batch, 2), 80.0) for name in ("original_size", "target_size", "crop_coords")}
    return {
        "hidden_states": seeded(batch, 4, 10, 6, seed=seed),
        "encoder_hidden_states": seeded(batch, text, WIDTH, seed=seed + 1),
        "timestep": torch.full((batch,), 500.0),
        **sizes,
    }


CASES = (
    Case(
        "CogView3-Plus",
        make_transformer,
        inputs,
        grid=(1, 5, 3),
        image_first=False,
        layers=2,
        text_width=WIDTH,
    ),
)
