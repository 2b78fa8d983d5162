"""Tiny random LTX-2 transformers and pipelines of stock classes."""

from __future__ import annotations

from typing import Any

import torch
from backbones._case import Case, Inputs, randomize, seeded
from backbones.tiny_cogvideox import WORDS
from backbones.tiny_ltx import joining
from backbones.tiny_sana_video import make_tokenizer
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from transformers import Gemma3TextConfig, Gemma3TextModel

WIDTH = 32
GRID = (3, 3, 5)
TOKENS = 45


def make_transformer(**config: Any) -> LTX2VideoTransformer3DModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 4,
        "attention_head_dim": 10,
        "cross_attention_dim": 40,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 4,
        "audio_attention_head_dim": 4,
        "audio_cross_attention_dim": 16,
        "num_layers": 3,
        "caption_channels": WIDTH,
    }
    return randomize(LTX2VideoTransformer3DModel(**(settings | config)))


def make_23(**config: Any) -> LTX2VideoTransformer3DModel:
    """Text is modulated by every block and comes without a projection; heads have gates."""
    settings: dict[str, Any] = {
        "use_prompt_embeddings": False,
        "cross_attn_mod": True,
        "audio_cross_attn_mod": True,
        "gated_attn": True,
        "audio_gated_attn": True,
        "perturbed_attn": True,
        "rope_type": "split",
    }
    return make_transformer(**(settings | config))


def make_25() -> LTX2VideoTransformer3DModel:
    """The modulation of text does not depend on the timestep."""
    return make_23(use_prompt_adaln_single=False)


def inputs(batch: int, text: int, seed: int) -> Inputs:
    """Sound and its text have as many tokens as the video, by which their attention is told from that to text."""
    mask = torch.ones(batch, text, dtype=torch.long)
    mask[0, 3:] = 0
    return {
        "hidden_states": seeded(batch, TOKENS, 8, seed=seed + 3),
        "audio_hidden_states": seeded(batch, TOKENS, 4, seed=seed + 4),
        "encoder_hidden_states": seeded(batch, text, WIDTH, seed=seed + 5),
        "audio_encoder_hidden_states": seeded(batch, TOKENS, WIDTH, seed=seed + 6),
        "encoder_attention_mask": mask,
        "timestep": torch.full((batch,), 500.0),
        "sigma": torch.full((batch,), 500.0),
        "num_frames": 3,
        "height": 3,
        "width": 5,
        "audio_num_frames": TOKENS,
    }


def inputs_23(batch: int, text: int, seed: int) -> Inputs:
    return inputs(batch, text, seed) | {
        "encoder_hidden_states": seeded(batch, text, 40, seed=seed + 5),
        "audio_encoder_hidden_states": seeded(batch, TOKENS, 16, seed=seed + 6),
        "use_cross_timestep": True,
    }


def make_connectors(registers: int | None = 4, **config: Any) -> LTX2TextConnectors:
    """Of three layers' states, those of the embedding included."""
    settings: dict[str, Any] = {
        "caption_channels": WIDTH,
        "text_proj_in_factor": 3,
        "video_connector_num_attention_heads": 4,
        "video_connector_attention_head_dim": 8,
        "video_connector_num_layers": 1,
        "video_connector_num_learnable_registers": registers,
        "audio_connector_num_attention_heads": 4,
        "audio_connector_attention_head_dim": 8,
        "audio_connector_num_layers": 1,
        "audio_connector_num_learnable_registers": registers,
        "connector_rope_base_seq_len": 32,
    }
    return LTX2TextConnectors(**(settings | config)).eval()


def make_23_connectors() -> LTX2TextConnectors:
    """As wide as the attention of video and sound, with a projection for each."""
    return make_connectors(
        per_modality_projections=True, video_hidden_dim=40, audio_hidden_dim=16,
        video_connector_attention_head_dim=10, audio_connector_attention_head_dim=4, rope_type="split",
    )  # fmt: skip


def make_pipeline(cls: Any = LTX2Pipeline, transformer: Any = None, connectors: Any = None) -> Any:
    torch.manual_seed(1)
    gemma = Gemma3TextConfig(
        vocab_size=3 + 2 * len(WORDS), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    vae = AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 3,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4,
        spatial_compression_ratio=32, temporal_compression_ratio=8,
    )  # fmt: skip
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    pipe = cls(
        transformer=transformer or make_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        text_encoder=Gemma3TextModel(gemma).eval(),
        tokenizer=make_tokenizer(),
        connectors=connectors or make_connectors(),
        vocoder=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, prompts: list[str], **options: Any) -> torch.Tensor:
    """Guidance by the prompt alone, unless told otherwise."""
    settings: dict[str, Any] = {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_stg_scale": 0.0,
        "audio_modality_scale": 1.0,
        "spatio_temporal_guidance_blocks": [1],
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
    "joint": False,
    "joining": joining,
}
CASES = (
    Case("LTX-2", make_transformer, inputs, **SHARED, text_width=WIDTH, pipeline=make_pipeline, call=call),
    Case("LTX-2.3", make_23, inputs_23, **SHARED, text_width=40),
    Case("LTX-2.5", make_25, inputs_23, **SHARED, text_width=40),
)
