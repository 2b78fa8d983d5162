"""Tiny random Sana-Video transformers and pipelines of stock classes."""

from __future__ import annotations

from typing import Any

import torch
from backbones._case import Case, Inputs, randomize, seeded
from backbones.tiny_cogvideox import WORDS
from backbones.tiny_ltx import joining
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

WIDTH = 32
GRID = (3, 3, 5)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word and the blank before it, as Gemma's, behind a start mark."""
    pieces = [*WORDS, *(f"▁{word}" for word in WORDS)]
    vocabulary = {piece: i for i, piece in enumerate(("<pad>", "<bos>", "<unk>", *pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>")


def make_transformer(**config: Any) -> SanaVideoTransformer3DModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 12,
        "num_layers": 3,
        "num_cross_attention_heads": 6,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 48,
        "caption_channels": WIDTH,
        "patch_size": (1, 4, 4),
        "rope_max_seq_len": 16,
    }
    return randomize(SanaVideoTransformer3DModel(**(settings | config)))


def make_plain() -> SanaVideoTransformer3DModel:
    return make_transformer(qk_norm=None)


def inputs(batch: int, text: int, seed: int) -> Inputs:
    mask = torch.ones(batch, text, dtype=torch.long)
    mask[0, 3:] = 0
    return {
        "hidden_states": seeded(batch, 4, 3, 12, 20, seed=seed + 1),
        "encoder_hidden_states": seeded(batch, text, WIDTH, seed=seed + 2),
        "encoder_attention_mask": mask,
        "timestep": torch.full((batch,), 500.0),
    }


def make_pipeline(cls: Any = SanaVideoPipeline, scheduler: Any = None) -> Any:
    torch.manual_seed(1)
    gemma = Gemma2Config(
        vocab_size=3 + 2 * len(WORDS), hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = cls(
        tokenizer=make_tokenizer(),
        text_encoder=Gemma2Model(gemma).eval(),
        vae=vae.eval(),
        transformer=make_transformer(),
        scheduler=scheduler or DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, prompts: list[str], **options: Any) -> torch.Tensor:
    settings: dict[str, Any] = {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "height": 96,
        "width": 160,
        "frames": 9,
        "use_resolution_binning": False,
        "max_sequence_length": 12,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    return pipe(prompt=prompts, **(settings | options)).frames


SHARED: dict[str, Any] = {
    "inputs": inputs,
    "grid": GRID,
    "image_first": True,
    "layers": 3,
    "text_width": WIDTH,
    "joint": False,
    "joining": joining,
}
CASES = (Case("Sana-Video", make_transformer, **SHARED, pipeline=make_pipeline, call=call),)
PLAIN = Case("Sana-Video without norms", make_plain, **SHARED)
"""Its linear attention overflows in half precision."""
