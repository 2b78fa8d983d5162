"""Tiny random Kandinsky 5 transformers and pipelines of stock classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backbones._case import Case, Inputs, randomize, seeded
from backbones.tiny_cogvideox import make_tokenizer
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

WIDTH = 32
GRID = (3, 3, 5)
SIZE = {"height": 48, "width": 80, "num_frames": 9}
TEMPLATE = "on the beach {} </s>"
"""Three tokens before the prompt, and an end mark behind it, as those of the published pipelines have."""


def make_transformer(**config: Any) -> Kandinsky5Transformer3DModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": WIDTH,
        "in_text_dim2": 16,
        "time_dim": 16,
        "model_dim": 48,
        "ff_dim": 64,
        "num_text_blocks": 2,
        "num_visual_blocks": 3,
        "axes_dims": (4, 4, 4),
    }
    transformer = randomize(Kandinsky5Transformer3DModel(**(settings | config)))
    with torch.no_grad():  # where shifts are large all tokens are nearly equal, and maps nearly flat
        for name, parameter in transformer.named_parameters():
            if "modulation" in name:
                parameter.mul_(0.2)
    # As it is loaded the embedding of the timestep stays in float32, which it computes in; here it is cast as a whole.
    layer = transformer.time_embeddings.in_layer
    layer.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype),))
    return transformer


def inputs(batch: int, text: int, seed: int) -> Inputs:
    return {
        "hidden_states": seeded(batch, 3, 6, 10, 4, seed=seed),
        "encoder_hidden_states": seeded(batch, text, WIDTH, seed=seed + 1),
        "pooled_projections": seeded(batch, 16, seed=seed + 2),
        "timestep": torch.linspace(500, 600, batch),
        "visual_rope_pos": [torch.arange(count) for count in GRID],
        "text_rope_pos": torch.arange(text),
        "scale_factor": (1.0, 2.0, 2.0),
    }


@contextmanager
def join_text(transformer: Any, given: Inputs, embeds: torch.Tensor) -> Iterator[Inputs]:
    """Concepts behind the text that the visual blocks read, each having gone through the text blocks by itself."""
    text, count = transformer.text_transformer_blocks, embeds.shape[0]
    batch = given["hidden_states"].shape[0]
    made: list[torch.Tensor] = []
    with torch.no_grad():
        for embed in embeds.to(given["encoder_hidden_states"]):
            alone = transformer.text_embeddings(embed.expand(batch, 1, -1))
            time = transformer.time_embeddings(given["timestep"])
            time = time + transformer.pooled_text_embeddings(given["pooled_projections"])
            for block in text:
                alone = block(alone, time, transformer.text_rope_embeddings(torch.tensor([0]))[None])
            made.append(alone)
    joined = torch.cat(made, 1)
    assert joined.shape[1] == count
    text[-1].register_forward_hook(lambda module, args, output: torch.cat([output, joined], 1))
    yield given


class Processor(PreTrainedTokenizerFast):  # type: ignore[misc]  # untyped host
    """A tokenizer that may be called as a processor of texts and images."""

    def __call__(self, text: Any = None, *, images: Any = None, videos: Any = None, **options: Any) -> Any:
        return super().__call__(text, **options)


def make_processor() -> Processor:
    plain = make_tokenizer()
    plain.backend_tokenizer.post_processor = None  # Qwen adds no marks: the template has them
    return Processor(tokenizer_object=plain.backend_tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": 13, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "pad_token_id": 0, "bos_token_id": None,
        "eos_token_id": 1,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def make_clip() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=8, bos_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def make_vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        mid_block_add_attention=True,
    ).eval()


def components(**changes: Any) -> dict[str, Any]:
    """What pipelines of the family are made of, seeded."""
    torch.manual_seed(1)
    clip_tokenizer = make_tokenizer()
    clip_tokenizer.model_max_length = 77
    shared = {
        "vae": make_vae(),
        "text_encoder": make_text_encoder(),
        "tokenizer": make_processor(),
        "text_encoder_2": make_clip(),
        "tokenizer_2": clip_tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
    }
    return shared | changes


def prepared(pipe: Any) -> Any:
    """Silent, with a template of known words."""
    pipe.set_progress_bar_config(disable=True)
    pipe.prompt_template, pipe.prompt_template_encode_start_idx = TEMPLATE, 3
    return pipe


def make_pipeline() -> Kandinsky5T2VPipeline:
    return prepared(Kandinsky5T2VPipeline(**components(transformer=make_transformer())))


def call(pipe: Any, prompts: Any, **options: Any) -> torch.Tensor:
    """The pipeline does not tell its text encoders how many videos to make of a prompt: here prompts are repeated."""
    videos = options.pop("num_videos_per_prompt", 1)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    settings: dict[str, Any] = {
        "negative_prompt": "rock",
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "max_sequence_length": 12,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **SIZE,
    }
    prompts = [prompt for prompt in prompts for _ in range(videos)]
    given = {name: value for name, value in (settings | options).items() if value is not None}
    output = pipe(prompt=prompts, **given)
    return output.image if "image" in output else output.frames


CASES = (
    Case(
        "Kandinsky 5",
        make_transformer,
        inputs,
        GRID,
        image_first=True,
        layers=3,
        text_width=WIDTH,
        joint=False,
        joining=join_text,
        pipeline=make_pipeline,
        call=call,
        guidance="two passes",
    ),
)
