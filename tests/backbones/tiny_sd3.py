"""Tiny random SD3 transformers and pipelines of stock classes."""

from __future__ import annotations

from typing import Any

import torch
from backbones._case import Case, Inputs, call_for_images, randomize, seeded
from backbones.tiny_cogvideox import WORDS, make_tokenizer
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WIDTH = 32


def make_transformer(**config: Any) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 6,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": 48,
        "pooled_projection_dim": 16,
        "out_channels": 4,
        "pos_embed_max_size": 16,
    }
    return randomize(SD3Transformer2DModel(**(settings | config)))


def make_35_medium() -> SD3Transformer2DModel:
    return make_transformer(qk_norm="rms_norm", dual_attention_layers=(0, 1))


def inputs(batch: int, text: int, seed: int) -> Inputs:
    return {
        "hidden_states": seeded(batch, 4, 10, 6, seed=seed),
        "encoder_hidden_states": seeded(batch, text, WIDTH, seed=seed + 1),
        "pooled_projections": seeded(batch, 16, seed=seed + 2),
        "timestep": torch.full((batch,), 500.0),
    }


def make_fused() -> SD3Transformer2DModel:
    transformer = make_transformer(qk_norm="rms_norm")
    transformer.fuse_qkv_projections()
    return transformer


def make_clip_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word between a start and an end mark, which is what unknown words and padding are as well."""
    vocabulary = {word: i for i, word in enumerate(("<s>", "</s>", "-", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="</s>",
        model_max_length=77,
    )


def make_clip(width: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=13, hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=8, bos_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config).eval()


def make_pipeline(t5: bool = True, channels: int = 4) -> StableDiffusion3Pipeline:
    torch.manual_seed(1)
    clip_tokenizer = make_clip_tokenizer()
    t5_config = T5Config(
        vocab_size=13, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=make_transformer(in_channels=channels, out_channels=channels),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=make_clip(12),
        tokenizer=clip_tokenizer,
        text_encoder_2=make_clip(16),
        tokenizer_2=clip_tokenizer,
        text_encoder_3=T5EncoderModel(t5_config).eval() if t5 else None,
        tokenizer_3=make_tokenizer() if t5 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SHARED: dict[str, Any] = {
    "inputs": inputs,
    "grid": (1, 5, 3),
    "image_first": True,
    "layers": 3,
    "text_width": WIDTH,
}
CASES = (
    Case(
        "SD3",
        make_transformer,
        **SHARED,
        pipeline=make_pipeline,
        call=call_for_images,
        frames_per_prompt="num_images_per_prompt",
    ),
    Case("SD3.5 medium", make_35_medium, **SHARED),
    Case("SD3 fused", make_fused, **SHARED),
)
