"""Tiny random FLUX.2 transformers and pipelines of stock classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backbones._case import Case, Inputs, append_to_text, randomize, seeded
from backbones.tiny_cogvideox import WORDS
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

WIDTH = 24
"""Of the text encoder states: three layers of 8."""
TEXT_LENGTH = 16
QWEN_TEMPLATE = (
    "{% for message in messages %}<user> {{ message['content'] }}<end> {% endfor %}"
    "{% if add_generation_prompt %}<dog> a{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}<system> the sky<end>"
    "{% else %}<user>{{ message['content'][0]['text'] }}<end>{% endif %}{% endfor %}"
)


class Processor:
    """What is called a tokenizer in the pipeline of dev: it has one, and calls it with its chats."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def apply_chat_template(self, chats: Any, *, tokenize: bool, add_generation_prompt: bool, **options: Any) -> Any:
        texts = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=add_generation_prompt)
        if not tokenize:
            return texts
        options.pop("return_dict")
        marks = not texts[0].startswith(self.tokenizer.bos_token)
        return self.tokenizer(texts, add_special_tokens=marks, **options)


def make_tokenizer(template: str, side: str = "right") -> PreTrainedTokenizerFast:
    """One token per word, and marks of a chat; a mark in front of what has none."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    marks = [AddedToken(mark, special=True) for mark in ("<system>", "<user>", "<end>", "<dog>")]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        additional_special_tokens=marks,
        chat_template=template,
        padding_side=side,
    )


def make_transformer(guidance: bool = True) -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=16,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    return randomize(transformer)


def make_klein() -> Flux2Transformer2DModel:
    return make_transformer(guidance=False)


def make_fused() -> Flux2Transformer2DModel:
    transformer = make_transformer()
    transformer.fuse_qkv_projections()
    return transformer


def positions(height: int, width: int, image: int = 0) -> torch.Tensor:
    """Positions of image tokens `[token, 4]`: image, row, column, text."""
    return torch.tensor([(image, row, column, 0) for row in range(height) for column in range(width)])


def text_positions(count: int) -> torch.Tensor:
    return torch.tensor([(0, 0, 0, token) for token in range(count)])


def inputs(batch: int, text: int, seed: int) -> Inputs:
    """With a reference image behind the grid."""
    ids = torch.cat([positions(5, 3), positions(2, 4, image=10)])
    return {
        "hidden_states": seeded(batch, 23, 16, seed=seed + 80),
        "encoder_hidden_states": seeded(batch, text, WIDTH, seed=seed + 1),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 4.0),
        "img_ids": ids.repeat(batch, 1, 1),
        "txt_ids": text_positions(text).repeat(batch, 1, 1),
    }


def klein_inputs(batch: int, text: int, seed: int) -> Inputs:
    """Without one, and with positions that have no batch axis."""
    own = {"hidden_states": seeded(batch, 15, 16, seed=seed), "img_ids": positions(5, 3)}
    return inputs(batch, text, seed) | own | {"txt_ids": text_positions(text), "guidance": None}


@contextmanager
def joining(transformer: Any, given: Inputs, embeds: torch.Tensor) -> Iterator[Inputs]:
    """Concepts join the text, each at the position of its first token."""
    first = given["txt_ids"][..., :1, :]
    ids = torch.cat([given["txt_ids"], *[first] * embeds.shape[0]], dim=-2)
    with append_to_text(transformer, given, embeds) as joined:
        yield {**joined, "txt_ids": ids}


def make_vae() -> AutoencoderKLFlux2:
    torch.manual_seed(1)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return vae.eval()


def language_model(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "bos_token_id": 1, "eos_token_id": 1,
        "pad_token_id": 0,
    }  # fmt: skip


def klein_components() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": make_vae(),
        "text_encoder": Qwen3ForCausalLM(Qwen3Config(**language_model(28))).eval(),
        "tokenizer": make_tokenizer(QWEN_TEMPLATE),
        "transformer": make_klein(),
    }


def make_klein_pipeline() -> Flux2KleinPipeline:
    pipe = Flux2KleinPipeline(**klein_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pipeline() -> Flux2Pipeline:
    torch.manual_seed(1)
    pipe = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=make_vae(),
        text_encoder=MistralForCausalLM(MistralConfig(**language_model(31))).eval(),
        tokenizer=Processor(make_tokenizer(MISTRAL_TEMPLATE, "left")),
        transformer=make_transformer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, prompts: str | list[str], **options: Any) -> torch.Tensor:
    settings: dict[str, Any] = {
        "num_inference_steps": 3,
        "max_sequence_length": TEXT_LENGTH,
        "height": 20,
        "width": 12,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    return pipe(prompt=prompts, **(settings | options)).images


SHARED: dict[str, Any] = {
    "grid": (1, 5, 3),
    "image_first": False,
    "layers": 4,
    "text_width": WIDTH,
    "joining": joining,
    "call": call,
    "frames_per_prompt": "num_images_per_prompt",
}
CASES = (
    Case("FLUX.2 dev", make_transformer, inputs, **SHARED, behind=8, pipeline=make_pipeline, guidance="none"),
    Case("FLUX.2 klein", make_klein, klein_inputs, **SHARED, pipeline=make_klein_pipeline, guidance="two passes"),
    Case("FLUX.2 fused", make_fused, inputs, **SHARED, behind=8),
)
