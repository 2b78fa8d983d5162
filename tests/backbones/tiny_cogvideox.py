"""Tiny random CogVideoX pipelines of stock classes: rotary or sin-cos positions, grids that are odd and not square."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from backbones._case import Case, Inputs, append_to_text, randomize, seeded
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ("a", "dog", "cat", "sky", "running", "red", "rock", "on", "the", "beach")
TEXT_LENGTH = 12
SIZE = {"height": 48, "width": 80, "num_frames": 9}
"""Pixels and frames of a call; the token grid is 3 x 3 x 5 (temporal factor 4, spatial factor 8, patch 2)."""
GRID = (3, 3, 5)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, and the end mark T5 sets."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
    )


def make_transformer(
    *, rope: bool = True, layers: int = 3, heads: int = 4, **config: Any
) -> CogVideoXTransformer3DModel:
    """A random transformer: `heads` x 16, wide enough that heads, rows and concepts cannot be confused."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "num_attention_heads": heads,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 32,
        "num_layers": layers,
        "sample_width": SIZE["width"] // 8,
        "sample_height": SIZE["height"] // 8,
        "sample_frames": SIZE["num_frames"],
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": TEXT_LENGTH,
        "use_rotary_positional_embeddings": rope,
    }
    transformer = CogVideoXTransformer3DModel(**(settings | config))
    with torch.no_grad():  # the default initialization leaves maps almost flat
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 2 and "norm" not in name:
                parameter.mul_(2.0)
    return transformer.eval()


def make_pipeline(
    *, rope: bool = True, layers: int = 3, dtype: torch.dtype = torch.float32, **config: Any
) -> CogVideoXPipeline:
    """A stock text-to-video pipeline around `make_transformer`, silent."""
    transformer = make_transformer(rope=rope, layers=layers, **config)
    text_config = T5Config(
        vocab_size=3 + len(WORDS), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    pipe = CogVideoXPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=T5EncoderModel(text_config).eval(),
        vae=vae.eval(),
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    )
    pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: CogVideoXPipeline, prompt: Any = "a red dog running on the beach", **options: Any) -> torch.Tensor:
    """Latents of one short seeded run; `options` go to the pipeline."""
    settings: dict[str, Any] = {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "max_sequence_length": TEXT_LENGTH,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **SIZE,
    }
    if "prompt_embeds" not in options:
        options["prompt"] = prompt
    return pipe(**(settings | options)).frames


@contextmanager
def recorded_calls(transformer: torch.nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The arguments of every forward pass, one entry per denoising step."""
    calls: list[dict[str, Any]] = []
    hook = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


def shake(transformer: torch.nn.Module) -> None:
    """Move norms and biases off their initial ones and zeros, so that leaving one out changes the result."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@cache
def shaken_pipeline(rope: bool = True) -> CogVideoXPipeline:
    """A pipeline whose norms and biases are no longer at their initial values."""
    pipe = make_pipeline(rope=rope)
    shake(pipe.transformer)
    return pipe


def make_random(**config: Any) -> CogVideoXTransformer3DModel:
    return randomize(make_transformer(**config))


def make_sincos() -> CogVideoXTransformer3DModel:
    return make_random(rope=False)


def make_fused() -> CogVideoXTransformer3DModel:
    transformer = make_random()
    transformer.fuse_qkv_projections()
    return transformer


def make_15() -> CogVideoXTransformer3DModel:
    return make_random(patch_size_t=2)


def make_learned() -> CogVideoXTransformer3DModel:
    """With a table of positions in which those of text are not zero."""
    transformer = make_random(use_learned_positional_embeddings=True)
    table = transformer.patch_embed.pos_embedding
    table[:, :TEXT_LENGTH] = seeded(1, TEXT_LENGTH, table.shape[2], seed=3)
    return transformer


def inputs(batch: int, text: int, seed: int, frames: int = 3, tokens: int = 45) -> Inputs:
    angles = seeded(tokens, 8, seed=seed + 2).repeat_interleave(2, dim=1)
    return {
        "hidden_states": seeded(batch, frames, 4, SIZE["height"] // 8, SIZE["width"] // 8, seed=seed),
        "encoder_hidden_states": seeded(batch, text, 32, seed=seed + 1),
        "timestep": torch.full((batch,), 500),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def sincos_inputs(batch: int, text: int, seed: int) -> Inputs:
    return inputs(batch, text, seed) | {"image_rotary_emb": None}


def inputs_15(batch: int, text: int, seed: int) -> Inputs:
    return inputs(batch, text, seed, frames=4, tokens=30)


@contextmanager
def join_in_table(transformer: Any, inputs: Inputs, embeds: torch.Tensor) -> Iterator[Inputs]:
    """Concepts join the text, each at the place that the table of positions has for the first text token."""
    embed, count = transformer.patch_embed, embeds.shape[0]
    table = embed.pos_embedding
    own = table[:, :1].expand(-1, count, -1)
    embed.pos_embedding = torch.cat([table[:, :TEXT_LENGTH], own, table[:, TEXT_LENGTH:]], 1)
    try:
        with append_to_text(transformer, inputs, embeds) as joined:
            yield joined
    finally:
        embed.pos_embedding = table


def make_random_pipeline() -> CogVideoXPipeline:
    pipe = make_pipeline()
    randomize(pipe.transformer)
    return pipe


def call_each(pipe: CogVideoXPipeline, prompts: list[str], num_videos_per_prompt: int = 1, **options: Any) -> Any:
    """The stock pipeline makes one video of a prompt whatever it is asked for."""
    return call(pipe, [prompt for prompt in prompts for _ in range(num_videos_per_prompt)], **options)


SHARED: dict[str, Any] = {"image_first": False, "layers": 3, "text_width": 32}
TABLE: dict[str, Any] = SHARED | {"text_lengths": (TEXT_LENGTH,), "joining": join_in_table}
CASES = (
    Case("CogVideoX", make_random, inputs, GRID, **SHARED, pipeline=make_random_pipeline, call=call_each),
    Case("CogVideoX fused", make_fused, inputs, GRID, **SHARED),
    Case("CogVideoX 1.5", make_15, inputs_15, (2, 3, 5), **SHARED),
    Case("CogVideoX sin-cos", make_sincos, sincos_inputs, GRID, **TABLE),
    Case("CogVideoX learned", make_learned, inputs, GRID, **TABLE),
)
