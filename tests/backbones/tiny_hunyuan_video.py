"""Tiny random HunyuanVideo transformers and pipelines of stock classes; prompts of unequal length, so with padding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backbones._case import Case, Inputs, randomize, seeded
from backbones.tiny_cogvideox import WORDS
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

WIDTH = 24
POOLED = 16
MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")
SIZE = {"height": 48, "width": 80, "num_frames": 9}


def make_tokenizer(begin: int = 2) -> PreTrainedTokenizerFast:
    """One token per word, mark and line break, with so many marks in front that a template has its pipeline's crop."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<s>", "<unk>", *MARKS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|refer|\w+|[^\w\s]+"), behavior="removed", invert=True)
    marks = processors.TemplateProcessing(single=" ".join(["<s>"] * begin + ["$A"]), special_tokens=[("<s>", 1)])
    tokenizer.post_processor = marks
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", model_max_length=77
    )


def make_llama() -> LlamaModel:
    config = LlamaConfig(
        vocab_size=32, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=5, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaModel(config).eval()


def make_clip() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=32, hidden_size=POOLED, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=8, bos_token_id=1, pad_token_id=0, eos_token_id=5,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def make_vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
    ).eval()  # fmt: skip


SETTINGS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": WIDTH,
    "pooled_projection_dim": POOLED,
    "rope_axes_dim": (4, 6, 6),
}


def make_transformer(**config: Any) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    return randomize(HunyuanVideoTransformer3DModel(**(SETTINGS | config)))


def make_image_to_video() -> HunyuanVideoTransformer3DModel:
    return make_transformer(image_condition_type="token_replace")


def text_mask(batch: int, text: int) -> torch.Tensor:
    """All rows but the last are padded."""
    mask = torch.ones(batch, text)
    mask[: max(batch - 1, 1), (text + 1) // 2 :] = 0
    return mask


def inputs(batch: int, text: int, seed: int) -> Inputs:
    return {
        "hidden_states": seeded(batch, 4, 3, 6, 10, seed=seed),
        "timestep": torch.linspace(300.0, 500.0, batch),
        "encoder_hidden_states": seeded(batch, text, WIDTH, seed=seed + 1),
        "encoder_attention_mask": text_mask(batch, text),
        "pooled_projections": seeded(batch, POOLED, seed=seed + 2),
        "guidance": torch.full((batch,), 6000.0),
    }


@contextmanager
def joining(transformer: Any, inputs: Inputs, embeds: torch.Tensor) -> Iterator[Inputs]:
    """Concepts, each refined by itself."""
    timestep = inputs["timestep"]
    refined = [transformer.context_embedder(one.expand(len(timestep), 1, -1), timestep) for one in embeds]
    with behind_the_text(transformer, torch.cat(refined, 1)):
        yield inputs


@contextmanager
def behind_the_text(transformer: Any, concepts: torch.Tensor) -> Iterator[None]:
    """Concepts stand behind the text of the first block, and no padding mask hides them."""
    first = transformer.transformer_blocks[0]

    def extend(block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        video, text, time, mask, *others = args
        if block is first:
            text = torch.cat([text, concepts], 1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(*mask.shape[:-1], concepts.shape[1])], -1)
        return (video, text, time, mask, *others)

    blocks = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]
    hooks = [block.register_forward_pre_hook(extend) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def make_pipeline() -> HunyuanVideoPipeline:
    torch.manual_seed(1)
    pipe = HunyuanVideoPipeline(
        transformer=make_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=make_vae(),
        text_encoder=make_llama(),
        tokenizer=make_tokenizer(),
        text_encoder_2=make_clip(),
        tokenizer_2=make_tokenizer(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: HunyuanVideoPipeline, prompts: list[str], **options: Any) -> torch.Tensor:
    settings: dict[str, Any] = {
        "num_inference_steps": 3,
        "negative_prompt": ["a cat"] * len(prompts),
        "true_cfg_scale": 3.0,
        "max_sequence_length": 8,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **SIZE,
    }
    return pipe(prompts, **(settings | options)).frames


SHARED: dict[str, Any] = {
    "inputs": inputs,
    "grid": (3, 3, 5),
    "image_first": True,
    "layers": 4,
    "text_width": WIDTH,
    "joining": joining,
}
CASES = (
    Case("HunyuanVideo", make_transformer, **SHARED, pipeline=make_pipeline, call=call, guidance="two passes"),
    Case(
        "HunyuanVideo image-to-video",
        make_image_to_video,
        **(SHARED | {"inputs": lambda batch, text, seed: inputs(batch, text, seed + 2)}),  # seeds without near ties
    ),
)
