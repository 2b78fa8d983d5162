"""Tiny random Wan transformers and pipelines of stock classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backbones._case import Case, Inputs, randomize, seeded
from backbones.tiny_cogvideox import WORDS, make_tokenizer
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch.nn import functional
from transformers import UMT5Config, UMT5EncoderModel

WIDTH = 32
GRID = (3, 3, 5)
SIZE = {"height": 48, "width": 80, "num_frames": 9}
"""Pixels and frames of a call; latents are 3 x 6 x 10 (temporal factor 4, spatial factor 8), tokens 3 x 3 x 5."""
CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}


def make_transformer(**config: Any) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return randomize(WanTransformer3DModel(**(CONFIG | config)))


def make_image_to_video() -> WanTransformer3DModel:
    return make_transformer(image_dim=16, added_kv_proj_dim=48)


def make_vace() -> WanVACETransformer3DModel:
    torch.manual_seed(0)
    return randomize(WanVACETransformer3DModel(**CONFIG, vace_layers=[0, 2], vace_in_channels=96))


def inputs(batch: int, text: int, seed: int) -> Inputs:
    return {
        "hidden_states": seeded(batch, 16, 3, 6, 10, seed=seed + 1),
        "encoder_hidden_states": seeded(batch, text, WIDTH, seed=seed + 2),
        "timestep": torch.full((batch,), 500),
    }


def image_inputs(batch: int, text: int, seed: int) -> Inputs:
    return inputs(batch, text, seed - 1) | {"encoder_hidden_states_image": seeded(batch, 4, 16, seed=seed + 2)}


def vace_inputs(batch: int, text: int, seed: int) -> Inputs:
    return inputs(batch, text, seed) | {"control_hidden_states": seeded(batch, 96, 3, 6, 10, seed=seed + 3)}


def token_inputs(batch: int, text: int, seed: int) -> Inputs:
    """A timestep for every token; the first frame is given."""
    timestep = torch.full((batch, 45), 500.0)
    timestep[:, :15] = 0
    return inputs(batch, text, seed + 2) | {"timestep": timestep}


class NaiveProcessor:
    """Attention to images, text and the concepts behind it; what is not noted goes round PyTorch's attention."""

    def __init__(self, text: int, *, hidden: int = 0) -> None:
        self.text = text
        self.hidden = hidden

    def __call__(self, attn: Any, video: torch.Tensor, context: torch.Tensor, *_: Any) -> torch.Tensor:
        context = context[:, : context.shape[1] - self.hidden]
        image, text = context[:, : -self.text], context[:, -self.text :]
        query = self.heads(attn, attn.norm_q(attn.to_q(video)))
        key, value = self.heads(attn, attn.norm_k(attn.to_k(text))), self.heads(attn, attn.to_v(text))
        attend = naive_attention if self.hidden else functional.scaled_dot_product_attention
        output = attend(query, key, value)
        if attn.add_k_proj is not None:
            key = self.heads(attn, attn.norm_added_k(attn.add_k_proj(image)))
            output = output + naive_attention(query, key, self.heads(attn, attn.add_v_proj(image)))
        return attn.to_out[0](output.transpose(1, 2).flatten(2))

    @staticmethod
    def heads(attn: Any, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def naive_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value


@contextmanager
def join_text(transformer: Any, given: Inputs, embeds: torch.Tensor) -> Iterator[Inputs]:
    """Concepts behind the text, where the stock class would take the first tokens for those of an image."""
    text = given["encoder_hidden_states"]
    joined = torch.cat([text, embeds.expand(text.shape[0], -1, -1).to(text)], 1)
    for block in transformer.blocks:
        block.attn2.processor = NaiveProcessor(joined.shape[1])
    for block in getattr(transformer, "vace_blocks", ()):
        block.attn2.processor = NaiveProcessor(text.shape[1], hidden=embeds.shape[0])
    yield given | {"encoder_hidden_states": joined}


def make_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=3 + len(WORDS), d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return UMT5EncoderModel(config).eval()


def make_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()  # fmt: skip


def components(**changes: Any) -> dict[str, Any]:
    """What pipelines of the family are made of, seeded."""
    torch.manual_seed(1)
    shared = {
        "tokenizer": make_tokenizer(),
        "text_encoder": make_encoder(),
        "vae": make_vae(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    }
    return shared | changes


def silent(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_pipeline() -> WanPipeline:
    return silent(WanPipeline(**components(transformer=make_transformer())))


def make_two() -> WanPipeline:
    """Wan 2.2: the first of three steps is before the boundary."""
    second = make_transformer()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.1)
    return silent(WanPipeline(**components(transformer=make_transformer(), transformer_2=second), boundary_ratio=0.9))


def make_expanded() -> WanPipeline:
    return silent(WanPipeline(**components(transformer=make_transformer()), expand_timesteps=True))


def call(pipe: Any, prompts: Any, **options: Any) -> torch.Tensor:
    settings: dict[str, Any] = {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "max_sequence_length": 12,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **SIZE,
    }
    return pipe(prompt=prompts, **(settings | options)).frames


SHARED: dict[str, Any] = {
    "grid": GRID,
    "image_first": True,
    "layers": 3,
    "text_width": WIDTH,
    "joint": False,
}
PIPELINE: dict[str, Any] = {"call": call, "guidance": "two passes"}
CASES = (
    Case("Wan 2.1", make_transformer, inputs, **SHARED, pipeline=make_pipeline, **PIPELINE),
    Case("Wan 2.2", make_transformer, inputs, **SHARED, pipeline=make_two, **PIPELINE),
    Case("Wan 2.2 5B", make_transformer, token_inputs, **SHARED, pipeline=make_expanded, **PIPELINE),
    Case("Wan image-to-video", make_image_to_video, image_inputs, **SHARED, text_lengths=(512,), joining=join_text),
    Case("Wan VACE", make_vace, vace_inputs, **SHARED, joining=join_text),
)
