"""Tiny random Mochi transformers and pipelines of stock classes; prompts of unequal length, so with padding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backbones._case import Case, Inputs, randomize, seeded
from backbones.tiny_cogvideox import WORDS, make_tokenizer
from backbones.tiny_hunyuan_video import text_mask
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
from transformers import T5Config, T5EncoderModel

WIDTH = 32


def make_transformer() -> MochiTransformer3DModel:
    torch.manual_seed(0)
    return randomize(
        MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=3,
            pooled_projection_dim=24,
            in_channels=12,
            text_embed_dim=WIDTH,
            time_embed_dim=16,
            max_sequence_length=12,
        )
    )


def inputs(batch: int, text: int, seed: int) -> Inputs:
    return {
        "hidden_states": seeded(batch, 12, 3, 6, 10, seed=seed),
        "encoder_hidden_states": seeded(batch, text, WIDTH, seed=seed + 1),
        "timestep": torch.linspace(300.0, 500.0, batch),
        "encoder_attention_mask": text_mask(batch, text).bool(),
    }


@contextmanager
def joining(transformer: Any, inputs: Inputs, embeds: torch.Tensor) -> Iterator[Inputs]:
    """Concepts stand between the words of every row and its padding, which attention moves to the end."""
    concepts = transformer.time_embed.caption_proj(embeds)
    words = inputs["encoder_attention_mask"].sum(1).tolist()

    def extend(block: Any, args: tuple[Any, ...], call: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        text, mask = call["encoder_hidden_states"], call["encoder_attention_mask"]
        if block is transformer.transformer_blocks[0]:
            rows = [torch.cat([row[:count], concepts, row[count:]]) for row, count in zip(text, words, strict=True)]
            call = call | {"encoder_hidden_states": torch.stack(rows)}
        mask = torch.cat([mask.new_ones(mask.shape[0], len(embeds)), mask], 1)
        return args, call | {"encoder_attention_mask": mask}

    hooks = [block.register_forward_pre_hook(extend, with_kwargs=True) for block in transformer.transformer_blocks]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def make_pipeline() -> MochiPipeline:
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=3 + len(WORDS), d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    vae = AutoencoderKLMochi(
        latent_channels=12, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1, 1, 1, 1, 1), latents_mean=(0.0,) * 12, latents_std=(1.0,) * 12,
    )  # fmt: skip
    pipe = MochiPipeline(
        transformer=make_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae.eval(),
        text_encoder=T5EncoderModel(config).eval(),
        tokenizer=make_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: MochiPipeline, prompts: list[str], **options: Any) -> torch.Tensor:
    settings: dict[str, Any] = {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "negative_prompt": ["a cat"] * len(prompts),
        "height": 48,
        "width": 80,
        "num_frames": 13,
        "max_sequence_length": 12,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    return pipe(prompts, **(settings | options)).frames


CASES = (
    Case(
        "Mochi",
        make_transformer,
        inputs,
        grid=(3, 3, 5),
        image_first=True,
        layers=3,
        text_width=WIDTH,
        row_by_row=True,
        joining=joining,
        pipeline=make_pipeline,
        call=call,
    ),
)
