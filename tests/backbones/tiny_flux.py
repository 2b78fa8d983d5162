"""Tiny random FLUX.1 transformers and pipelines of stock classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backbones._case import Case, Inputs, append_to_text, randomize, seeded
from backbones.tiny_cogvideox import make_tokenizer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

WIDTH = 32
SIZE = {"height": 20, "width": 12}
"""Pixels of a call; the token grid is 5 x 3 (spatial factor 2, patch 2)."""


def make_transformer(guidance: bool = True, **config: Any) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": guidance,
    }
    return randomize(FluxTransformer2DModel(**(settings | config)))


def make_schnell() -> FluxTransformer2DModel:
    return make_transformer(guidance=False)


def make_fused() -> FluxTransformer2DModel:
    transformer = make_transformer()
    transformer.fuse_qkv_projections()
    return transformer


def positions(height: int, width: int, image: int = 0) -> torch.Tensor:
    """Positions of image tokens `[token, 3]`: image, row, column."""
    places = [(image, row, column) for row in range(height) for column in range(width)]
    return torch.tensor(places, dtype=torch.float32)


def inputs(batch: int, text: int, seed: int, ids: torch.Tensor | None = None, guidance: bool = True) -> Inputs:
    ids = positions(5, 3) if ids is None else ids
    given = {
        "hidden_states": seeded(batch, ids.shape[0], 16, seed=seed),
        "encoder_hidden_states": seeded(batch, text, WIDTH, seed=seed + 1),
        "pooled_projections": seeded(batch, 16, seed=seed + 2),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }
    return given | {"guidance": torch.full((batch,), 3.5)} if guidance else given


def schnell_inputs(batch: int, text: int, seed: int) -> Inputs:
    return inputs(batch, text, seed, guidance=False)


def kontext_inputs(batch: int, text: int, seed: int) -> Inputs:
    return inputs(batch, text, seed, torch.cat([positions(5, 3), positions(2, 4, image=1)]))


@contextmanager
def joining(transformer: Any, given: Inputs, embeds: torch.Tensor) -> Iterator[Inputs]:
    """Concepts join the text, at the position that all text has."""
    with append_to_text(transformer, given, embeds) as joined:
        yield {**joined, "txt_ids": torch.zeros(joined["encoder_hidden_states"].shape[1], 3)}


def make_clip() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def make_t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=13, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def make_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1, latent_channels=4,
        norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    )  # fmt: skip
    return vae.eval()


def components(transformer: FluxTransformer2DModel | None = None) -> dict[str, Any]:
    torch.manual_seed(1)
    clip_tokenizer = make_tokenizer()
    clip_tokenizer.model_max_length = 77
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": make_vae(),
        "text_encoder": make_clip(),
        "tokenizer": clip_tokenizer,
        "text_encoder_2": make_t5(),
        "tokenizer_2": make_tokenizer(),
        "transformer": transformer or make_transformer(),
    }


def make_pipeline() -> FluxPipeline:
    pipe = FluxPipeline(**components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_schnell_pipeline() -> FluxPipeline:
    pipe = FluxPipeline(**components(make_schnell()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, prompts: str | list[str], **options: Any) -> torch.Tensor:
    settings: dict[str, Any] = {
        "num_inference_steps": 3,
        "max_sequence_length": 12,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **SIZE,
    }
    return pipe(prompt=prompts, **(settings | options)).images


def call_guided(pipe: Any, prompts: list[str], **options: Any) -> torch.Tensor:
    """True guidance, in two passes."""
    return call(pipe, prompts, negative_prompt=["the cat"] * len(prompts), true_cfg_scale=3.0, **options)


SHARED: dict[str, Any] = {
    "grid": (1, 5, 3),
    "image_first": False,
    "layers": 4,
    "text_width": WIDTH,
    "joining": joining,
    "frames_per_prompt": "num_images_per_prompt",
}
CASES = (
    Case(
        "FLUX.1 dev",
        make_transformer,
        inputs,
        **SHARED,
        pipeline=make_pipeline,
        call=call_guided,
        guidance="two passes",
    ),
    Case(
        "FLUX.1 schnell",
        make_schnell,
        schnell_inputs,
        **SHARED,
        pipeline=make_schnell_pipeline,
        call=call,
        guidance="none",
    ),
    Case("FLUX.1 Kontext", make_transformer, kontext_inputs, **SHARED, behind=8),
    Case("FLUX.1 fused", make_fused, inputs, **SHARED),
)
