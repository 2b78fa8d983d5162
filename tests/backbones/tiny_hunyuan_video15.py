"""Tiny random HunyuanVideo 1.5 transformers and pipelines of stock classes, with padding in all kinds of text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backbones._case import Case, Inputs, randomize, seeded
from backbones.tiny_cogvideox import WORDS
from backbones.tiny_hunyuan_video import behind_the_text, text_mask
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

WIDTH, GLYPH_WIDTH, IMAGE_WIDTH = 16, 14, 12
MARKS = ("<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE = {"height": 12, "width": 20, "num_frames": 9}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, mark and line break."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", *MARKS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|\w+|[^\w\s]+"), behavior="removed", invert=True)
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", chat_template=CHAT
    )


def make_transformer() -> HunyuanVideo15Transformer3DModel:
    """It takes timesteps in its own dtype, which a hook sees to, as the pipelines do."""
    torch.manual_seed(0)
    transformer = randomize(
        HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=16,
            num_layers=3,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=WIDTH,
            text_embed_2_dim=GLYPH_WIDTH,
            image_embed_dim=IMAGE_WIDTH,
            rope_axes_dim=(4, 6, 6),
            target_size=16,
        )
    )

    def cast_timestep(model: Any, args: tuple[Any, ...], call: dict[str, Any]) -> tuple[tuple[Any, ...], Inputs]:
        return args, call | {"timestep": call["timestep"].to(model.dtype)}

    transformer.register_forward_pre_hook(cast_timestep, with_kwargs=True)
    return transformer


def inputs(batch: int, text: int, seed: int) -> Inputs:
    """The first row has two glyphs, the last one none."""
    glyphs = torch.zeros(batch, 3)
    glyphs[0, :2] = 1
    return {
        "hidden_states": seeded(batch, 9, 3, 3, 5, seed=seed),
        "timestep": torch.linspace(300.0, 500.0, batch),
        "encoder_hidden_states": seeded(batch, text, WIDTH, seed=seed + 1),
        "encoder_attention_mask": text_mask(batch, text),
        "encoder_hidden_states_2": seeded(batch, 3, GLYPH_WIDTH, seed=seed + 2),
        "encoder_attention_mask_2": glyphs,
        "image_embeds": seeded(batch, 2, IMAGE_WIDTH, seed=seed + 3),
    }


def without_image(batch: int, text: int, seed: int) -> Inputs:
    return inputs(batch, text, seed) | {"image_embeds": torch.zeros(batch, 2, IMAGE_WIDTH)}


@contextmanager
def joining(transformer: Any, inputs: Inputs, embeds: torch.Tensor) -> Iterator[Inputs]:
    """Concepts, each refined by itself, with the mark of the prompt."""
    timestep = inputs["timestep"]
    refined = [transformer.context_embedder(one.expand(len(timestep), 1, -1), timestep) for one in embeds]
    with behind_the_text(transformer, torch.cat(refined, 1) + transformer.cond_type_embed.weight[0]):
        yield inputs


def make_parts() -> dict[str, Any]:
    torch.manual_seed(1)
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=32, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    )  # fmt: skip
    byt5 = T5Config(d_model=GLYPH_WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=384, dropout_rate=0.0)
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    return {
        "transformer": make_transformer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "vae": vae.eval(),
        "text_encoder": Qwen2_5_VLTextModel(qwen).eval(),
        "tokenizer": make_tokenizer(),
        "text_encoder_2": T5EncoderModel(byt5).eval(),
        "tokenizer_2": ByT5Tokenizer(),
        "guider": ClassifierFreeGuidance(guidance_scale=4.0),
    }


def tune(pipe: Any) -> Any:
    """Lengths of text that suit the tiny tokenizer."""
    system = f"<|im_start|>system\n{pipe.system_message}<|im_end|>\n<|im_start|>user\n"
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(system).input_ids)
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 12, 24, 4
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pipeline() -> HunyuanVideo15Pipeline:
    return tune(HunyuanVideo15Pipeline(**make_parts()))


def make_image_pipeline() -> HunyuanVideo15ImageToVideoPipeline:
    parts = make_parts()
    vision = SiglipVisionConfig(
        hidden_size=IMAGE_WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8,
        patch_size=4,
    )  # fmt: skip
    parts["image_encoder"] = SiglipVisionModel(vision).eval()
    parts["feature_extractor"] = SiglipImageProcessorPil(size={"height": 8, "width": 8})
    return tune(HunyuanVideo15ImageToVideoPipeline(**parts))


def call(
    pipe: HunyuanVideo15Pipeline, prompts: list[str], num_videos_per_prompt: int = 1, **options: Any
) -> torch.Tensor:
    """Prompts are repeated instead of their videos, of which the stock pipeline fails to make several."""
    settings: dict[str, Any] = {
        "num_inference_steps": 3,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **SIZE,
    }
    prompts = [prompt for prompt in prompts for _ in range(num_videos_per_prompt)]
    return pipe(prompts, **({"negative_prompt": ["a cat"] * len(prompts)} | settings | options)).frames


SHARED: dict[str, Any] = {
    "grid": (3, 3, 5),
    "image_first": True,
    "layers": 3,
    "text_width": WIDTH,
    "joining": joining,
}
CASES = (
    Case(
        "HunyuanVideo 1.5",
        make_transformer,
        without_image,
        **SHARED,
        pipeline=make_pipeline,
        call=call,
        guidance="two passes",
    ),
    Case("HunyuanVideo 1.5 image-to-video", make_transformer, inputs, **SHARED),
)
