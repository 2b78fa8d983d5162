"""Tiny random AuraFlow transformers and pipelines of stock classes."""

from __future__ import annotations

from typing import Any

import torch
from backbones._case import Case, Inputs, call_for_images, randomize, seeded
from backbones.tiny_cogvideox import WORDS
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WIDTH = 32


def make_transformer(**config: Any) -> AuraFlowTransformer2DModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 6,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": 48,
        "pos_embed_max_size": 64,
    }
    return randomize(AuraFlowTransformer2DModel(**(settings | config)))


def make_fused() -> AuraFlowTransformer2DModel:
    transformer = make_transformer()
    transformer.fuse_qkv_projections()
    return transformer


def inputs(batch: int, text: int, seed: int) -> Inputs:
    return {
        "hidden_states": seeded(batch, 4, 10, 6, seed=seed),
        "encoder_hidden_states": seeded(batch, text, WIDTH, seed=seed + 1),
        "timestep": torch.full((batch,), 0.5),
    }


def make_tokenizer(start: bool = True) -> PreTrainedTokenizerFast:
    """One token per word, behind a start mark if wanted and before an end mark."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", "<s>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if start else "$A </s>", special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_pipeline(start: bool = True) -> AuraFlowPipeline:
    transformer = make_transformer()
    torch.manual_seed(1)
    config = UMT5Config(
        vocab_size=14, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.1,
        pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipe = AuraFlowPipeline(
        tokenizer=make_tokenizer(start),
        text_encoder=UMT5EncoderModel(config).eval(),
        vae=vae.eval(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SHARED: dict[str, Any] = {
    "inputs": inputs,
    "grid": (1, 5, 3),
    "image_first": False,
    "layers": 4,
    "text_width": WIDTH,
}
CASES = (
    Case(
        "AuraFlow",
        make_transformer,
        **SHARED,
        pipeline=make_pipeline,
        call=call_for_images,
        frames_per_prompt="num_images_per_prompt",
    ),
    Case("AuraFlow fused", make_fused, **SHARED),
)
