"""Tiny random Qwen-Image transformers and pipelines of stock classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backbones._case import Case, Inputs, randomize, seeded
from backbones.tiny_cogvideox import WORDS
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

WIDTH = 16
MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


SETTINGS: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 6,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 2, 2),
}


def make_transformer(**config: Any) -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    return randomize(QwenImageTransformer2DModel(**(SETTINGS | config)))


def make_edit_plus() -> QwenImageTransformer2DModel:
    return make_transformer(zero_cond_t=True)


def make_layered() -> QwenImageTransformer2DModel:
    return make_transformer(use_layer3d_rope=True, use_additional_t_cond=True)


def inputs(batch: int, text: int, seed: int, shapes: tuple[tuple[int, int, int], ...] = ((1, 5, 3),)) -> Inputs:
    tokens = sum(frames * height * width for frames, height, width in shapes)
    return {
        "hidden_states": seeded(batch, tokens, 16, seed=seed),
        "encoder_hidden_states": seeded(batch, text, WIDTH, seed=seed + 1),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [list(shapes)] * batch,
    }


def padded_inputs(batch: int, text: int, seed: int) -> Inputs:
    """Prompts of different lengths."""
    mask = torch.ones(batch, text, dtype=torch.long)
    mask[1:, (text + 1) // 2 :] = 0
    return inputs(batch, text, seed) | {"encoder_hidden_states_mask": mask}


def edit_inputs(batch: int, text: int, seed: int) -> Inputs:
    """Two given images of another size."""
    return inputs(batch, text, seed + 4, ((1, 5, 3), (1, 2, 4), (1, 3, 3)))


def layered_inputs(batch: int, text: int, seed: int) -> Inputs:
    """A whole image, its two layers, and the given image."""
    kind = torch.zeros(batch, dtype=torch.long)
    return inputs(batch, text, seed, ((1, 3, 5),) * 4) | {"additional_t_cond": kind}


@contextmanager
def join_at_first_position(transformer: Any, inputs: Inputs, embeds: torch.Tensor) -> Iterator[Inputs]:
    """Concepts join the text, each at the position of the first text token and seen by the mask."""
    text, count = inputs["encoder_hidden_states"], embeds.shape[0]

    def place(module: Any, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        image, positions = output
        return image, torch.cat([positions[:-count], positions[:1].expand(count, -1)])

    joined = torch.cat([text, embeds.expand(text.shape[0], -1, -1).to(text)], 1)
    result = inputs | {"encoder_hidden_states": joined}
    mask = inputs.get("encoder_hidden_states_mask")
    if mask is not None:
        result["encoder_hidden_states_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], count)], 1)
    hook = transformer.pos_embed.register_forward_hook(place)
    try:
        yield result
    finally:
        hook.remove()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word and mark; every other word of a template is unknown."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", *MARKS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=list(MARKS)
    )


def make_text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": WIDTH,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 17,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1000000.0},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        vision_start_token_id=4,
        image_token_id=5,
        vision_end_token_id=6,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def make_components(channels: int = 4, colors: int = 3, **config: Any) -> dict[str, Any]:
    transformer = make_transformer(in_channels=4 * channels, out_channels=channels, **config)
    torch.manual_seed(1)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=channels, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * channels, latents_std=[1.0] * channels, input_channels=colors,
    )  # fmt: skip
    return {
        "transformer": transformer,
        "vae": vae.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": make_text_encoder(),
        "tokenizer": make_tokenizer(),
    }


def set_up(pipe: Any) -> Any:
    """Silent, and with as many tokens in front of the prompt as its template has with the tiny tokenizer."""
    front = pipe.prompt_template_encode.split("<|vision_start|>")[0].split("{}")[0]
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(front).input_ids)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pipeline() -> QwenImagePipeline:
    return set_up(QwenImagePipeline(**make_components()))


def call(pipe: Any, prompts: list[str] | None, **options: Any) -> torch.Tensor:
    settings: dict[str, Any] = {
        "negative_prompt": ["the rock"] * len(prompts or ()),
        "num_inference_steps": 3,
        "true_cfg_scale": 4.0,
        "height": 40,
        "width": 24,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    return pipe(prompt=prompts, **(settings | options)).images


SHARED: dict[str, Any] = {
    "image_first": False,
    "layers": 3,
    "text_width": WIDTH,
    "joining": join_at_first_position,
}
CASES = (
    Case(
        "Qwen-Image",
        make_transformer,
        inputs,
        (1, 5, 3),
        **SHARED,
        pipeline=make_pipeline,
        call=call,
        guidance="two passes",
        frames_per_prompt="num_images_per_prompt",
    ),
    Case("Qwen-Image padded", make_transformer, padded_inputs, (1, 5, 3), **SHARED),
    Case("Qwen-Image-Edit", make_transformer, edit_inputs, (1, 5, 3), **SHARED, behind=17),
    Case("Qwen-Image-Edit 2511", make_edit_plus, edit_inputs, (1, 5, 3), **SHARED, behind=17),
    Case("Qwen-Image-Layered", make_layered, layered_inputs, (2, 3, 5), **SHARED, start=15, behind=15),
)
