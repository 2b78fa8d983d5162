"""Tiny random pipelines of every other stock class with CogVideoX blocks, and of CogVideoX 1.5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from backbones import tiny_cogvideox
from backbones.tiny_cogvideox import TEXT_LENGTH
from diffusers import (
    CogVideoXFunControlPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
    ConsisIDTransformer3DModel,
)
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline  # the public name asks for OpenCV
from PIL import Image

HEIGHT, WIDTH = 48, 80
CHANNELS = 4
PROMPTS = ("a red dog running on the beach", "the sky on a rock")


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Noise of the size that is generated."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


@dataclass(frozen=True)
class Variant:
    """A pipeline class, what a call with so many prompts needs, the transformer's config, token grid and noise.

    With most seeds two anchors of GramCol somewhere are too nearly as good for float32 to tell them apart; these have
    none.
    """

    pipeline: Any
    inputs: Callable[[int], dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, int, int] = (3, 3, 5)
    seed: int = 0


def images(prompts: int, frames: int = 9) -> dict[str, Any]:
    return {"image": pictures(prompts), "num_frames": frames}


def face(prompts: int) -> dict[str, Any]:
    """What the face encoders would have made of one face."""
    generator = torch.Generator().manual_seed(3)
    vision = [torch.randn(1, 4, 12, generator=generator) for _ in range(2)]
    return images(prompts) | {"id_cond": torch.randn(1, 16, generator=generator), "id_vit_hidden": vision}


LEARNED = {"in_channels": 2 * CHANNELS, "use_learned_positional_embeddings": True}
FACES = {
    "is_train_face": True,
    "cross_attn_interval": 2,
    "cross_attn_dim_head": 8,
    "cross_attn_num_heads": 2,
    "LFE_id_dim": 16,
    "LFE_vit_dim": 12,
    "LFE_depth": 2,
    "LFE_dim_head": 8,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 2,
    "LFE_num_querie": 3,
    "LFE_output_dim": 42,  # two thirds of the width
    "LFE_num_scale": 2,
}

VARIANTS = {
    # An odd number of latent frames, padded to four; then four without padding.
    "1.5": Variant(CogVideoXPipeline, lambda n: {"num_frames": 9}, {"patch_size_t": 2}, (2, 3, 5), seed=1),
    "1.5-even": Variant(CogVideoXPipeline, lambda n: {"num_frames": 13}, {"patch_size_t": 2}, (2, 3, 5), seed=1),
    "image": Variant(CogVideoXImageToVideoPipeline, images, LEARNED),
    "image-ofs": Variant(CogVideoXImageToVideoPipeline, images, LEARNED | {"ofs_embed_dim": 8}, seed=4),
    "image-1.5": Variant(
        CogVideoXImageToVideoPipeline,
        images,
        {"in_channels": 2 * CHANNELS, "ofs_embed_dim": 8, "patch_size_t": 2},
        (2, 3, 5),
    ),
    # The learned table is for three latent frames: with four the model makes a sin-cos one instead.
    "image-longer": Variant(CogVideoXImageToVideoPipeline, lambda n: images(n, 13), LEARNED, (4, 3, 5), seed=3),
    "video": Variant(CogVideoXVideoToVideoPipeline, lambda n: {"video": pictures(9)}),
    "video-1.5": Variant(
        CogVideoXVideoToVideoPipeline, lambda n: {"video": pictures(13)}, {"patch_size_t": 2}, (2, 3, 5)
    ),
    "control": Variant(
        CogVideoXFunControlPipeline,
        lambda n: {"control_video": [pictures(9, seed) for seed in range(n)]},
        {"in_channels": 2 * CHANNELS},
        seed=2,
    ),
    "face": Variant(ConsisIDPipeline, face, LEARNED | FACES | {"num_layers": 4}),
}


def shake(transformer: torch.nn.Module, seed: int = 7) -> None:
    """Move norms, biases and learned text positions off their initial ones and zeros."""
    generator = torch.Generator().manual_seed(seed)

    def noise(shape: Sequence[int]) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim == 1:
                parameter.add_(noise(parameter.shape))
        if transformer.config.use_learned_positional_embeddings:
            text = transformer.patch_embed.pos_embedding[:, :TEXT_LENGTH]
            text.add_(5 * noise(text.shape))


def make_consisid(config: dict[str, Any]) -> ConsisIDTransformer3DModel:
    torch.manual_seed(0)
    model = ConsisIDTransformer3DModel(
        **{
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "out_channels": CHANNELS,
            "time_embed_dim": 8,
            "text_embed_dim": 32,
            "sample_width": WIDTH // 8,
            "sample_height": HEIGHT // 8,
            "sample_frames": 9,
            "max_text_seq_length": TEXT_LENGTH,
            "use_rotary_positional_embeddings": True,
        }
        | config
    )
    with torch.no_grad():
        for block in model.transformer_blocks:
            for parameter in block.parameters():
                parameter.mul_(2.0)
    return model.eval()


def make_pipeline(variant: Variant, dtype: torch.dtype = torch.float32) -> Any:
    """A silent stock pipeline."""
    if variant.pipeline is ConsisIDPipeline:
        components = tiny_cogvideox.make_pipeline().components | {"transformer": make_consisid(variant.config)}
    else:
        components = tiny_cogvideox.make_pipeline(**variant.config).components
    shake(components["transformer"])
    pipe = variant.pipeline(**components)
    pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, variant: Variant, prompts: Sequence[str] = PROMPTS, **options: Any) -> torch.Tensor:
    """Latents of one short seeded run; `options` go to the pipeline."""
    settings: dict[str, Any] = {
        "prompt": list(prompts),
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "max_sequence_length": TEXT_LENGTH,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(variant.seed),
        **variant.inputs(len(prompts)),
    }
    return pipe(**(settings | options)).frames
