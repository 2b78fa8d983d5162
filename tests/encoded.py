"""Maps of a clip by a bare transformer, over latents that are noised by hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from backbones import tiny_cogvideox as tiny
from diffusers import CogVideoXPipeline

import diffusers_concept_maps as dcm

CONCEPTS = ("dog", "running", "sky")
METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")
PROMPT = "a red dog running on the beach"
SPREAD = (1e-5, 1e-5)
"""Absolute and relative difference that float32 may make."""


def clip_of(frames: int = 9, height: int = 48, width: int = 80) -> torch.Tensor:
    """Noise and a shade, `[frame, 3, height, width]` in 0..1."""
    noise = torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(frames))
    return 0.5 * noise + 0.5 * torch.linspace(0, 1, width)


@cache
def shared(rope: bool = True, dtype: torch.dtype = torch.float32) -> CogVideoXPipeline:
    """A pipeline that tests leave as it is."""
    return tiny.make_pipeline(rope=rope, dtype=dtype)


def kept(scheduler: Any) -> torch.Tensor:
    """The cumulative product of each of 1000 training steps, in float64 from the config alone."""
    config = scheduler.config
    roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float64)
    product = (1 - roots.square()).cumprod(0)
    assert config.beta_schedule == "scaled_linear"
    product = product / (config.snr_shift_scale + (1 - config.snr_shift_scale) * product)
    if config.rescale_betas_zero_snr:
        root = product.sqrt()
        product = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return product


@torch.no_grad()
def by_hand(
    pipe: CogVideoXPipeline, clip: torch.Tensor, level: float, seed: int = 0, prompt: str = PROMPT, **options: Any
) -> dcm.ConceptMaps:
    """Maps of one forward pass of the bare transformer; the clip is of a size that the model takes."""
    frames, _, height, width = clip.shape
    dtype = pipe.transformer.dtype
    pixels = (clip * 2 - 1).transpose(0, 1)[None].to(pipe.vae.dtype)
    clean = (pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor).double()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).double()
    step = round(1000 * level) - 1
    signal = kept(pipe.scheduler)[step]
    noised = signal.sqrt() * clean + (1 - signal).sqrt() * noise
    rotary = None
    if pipe.transformer.config.use_rotary_positional_embeddings:
        rotary = pipe._prepare_rotary_positional_embeddings(height, width, (frames - 1) // 4 + 1, "cpu")
    if "prompt_tokens" not in options:
        options = {"concepts": list(CONCEPTS), "concept_embeds": embeds_of(pipe, CONCEPTS)} | options
    with dcm.trace(pipe.transformer, **options) as maps:
        pipe.transformer(
            hidden_states=noised.transpose(1, 2).to(dtype),
            encoder_hidden_states=text_of(pipe, [prompt]),
            timestep=torch.tensor([step]),
            image_rotary_emb=rotary,
        )
    return maps


def text_of(pipe: CogVideoXPipeline, texts: Sequence[str]) -> torch.Tensor:
    tokens = pipe.tokenizer(
        list(texts), padding="max_length", max_length=tiny.TEXT_LENGTH, truncation=True, return_tensors="pt"
    )
    return pipe.text_encoder(tokens.input_ids)[0]


def embeds_of(pipe: CogVideoXPipeline, concepts: Sequence[str]) -> torch.Tensor:
    """The mean over the words of each concept, its end mark and padding left out."""
    states = text_of(pipe, concepts).float()
    return torch.stack([state[: len(text.split())].mean(0) for state, text in zip(states, concepts, strict=True)])


def expect(maps: dcm.ConceptMaps, expected: Sequence[dcm.ConceptMaps]) -> None:
    """Every method's maps are the mean of the expected ones."""
    assert {maps.methods} == {other.methods for other in expected}
    for method in maps.methods:
        mean = torch.stack([other.get(method).double() for other in expected]).mean(0)
        torch.testing.assert_close(maps.get(method).double(), mean, atol=SPREAD[0], rtol=SPREAD[1])
        assert mean.std() > 1e-3
