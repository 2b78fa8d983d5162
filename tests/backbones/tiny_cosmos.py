"""Tiny random Cosmos transformers and pipelines of stock classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backbones._case import Case, Inputs, append_to_text, randomize, seeded
from backbones.tiny_cogvideox import WORDS, make_tokenizer
from diffusers import (
    AutoencoderKLCosmos,
    AutoencoderKLWan,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    EDMEulerScheduler,
)
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2Model, T5Config, T5EncoderModel

WIDTH = 32
GRID = (3, 3, 5)
TEMPLATE = (
    "{% for m in messages %}<im> {{ m['role'] }} : "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %}"
    " </im> {% endfor %}"
)


def make_transformer(**config: Any) -> CosmosTransformer3DModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 12,
        "num_layers": 3,
        "mlp_ratio": 2.0,
        "text_embed_dim": WIDTH,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "patch_size": (1, 4, 4),
        "concat_padding_mask": False,  # it needs torchvision
    }
    return randomize(CosmosTransformer3DModel(**(settings | config)))


def make_25(**config: Any) -> CosmosTransformer3DModel:
    """Its latents come with a mask of the frames that are given, and its text goes through a projection."""
    settings = {
        "in_channels": 5,
        "extra_pos_embed_type": None,
        "use_crossattn_projection": True,
        "crossattn_proj_in_channels": WIDTH,
        "encoder_hidden_states_channels": 24,
        "text_embed_dim": 24,
    }
    return make_transformer(**(settings | config))


def inputs(batch: int, text: int, seed: int) -> Inputs:
    return {
        "hidden_states": seeded(batch, 4, 3, 12, 20, seed=seed + 2),
        "encoder_hidden_states": seeded(batch, text, WIDTH, seed=seed + 3),
        "timestep": torch.full((batch,), 0.4),
        "fps": 16,
    }


def inputs_25(batch: int, text: int, seed: int) -> Inputs:
    """The first frame is given, with a timestep of its own."""
    given = torch.zeros(batch, 1, 3, 1, 1)
    given[:, :, 0] = 1.0
    return inputs(batch, text, seed) | {
        "timestep": 0.4 * (1 - given) + 0.01 * given,
        "condition_mask": given.expand(-1, -1, -1, 12, 20),
    }


@contextmanager
def joining(transformer: Any, inputs: Inputs, embeds: torch.Tensor) -> Iterator[Inputs]:
    """Concepts join the text; the learned positions are normed in float32, which float64 cannot be narrowed to."""
    if transformer.learnable_pos_embed is not None:
        transformer.learnable_pos_embed.float()
    with append_to_text(transformer, inputs, embeds) as joined:
        yield joined


class SafetyChecker(ModelMixin, ConfigMixin):  # type: ignore[misc]  # untyped host
    """The pipelines insist on one."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def check_text_safety(self, prompt: str) -> bool:
        return True


def make_encoder() -> T5EncoderModel:
    config = T5Config(
        vocab_size=13, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def make_pipeline(cls: Any = CosmosTextToWorldPipeline, **config: Any) -> Any:
    """Pipelines of Cosmos 1."""
    torch.manual_seed(1)
    vae = AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,), resolution=64, num_layers=1, spatial_compression_ratio=8,
        temporal_compression_ratio=4, latents_mean=None, latents_std=None,
    )  # fmt: skip
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min")
    return finish(cls, make_transformer(**config), vae, scheduler, make_tokenizer(), make_encoder())


def make_wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def make_conversation_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    plain = tokenizer.backend_tokenizer
    plain.post_processor = None
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>", chat_template=TEMPLATE
    )


def make_qwen() -> Qwen2Model:
    """Two layers, so that their states are as wide as text together."""
    config = Qwen2Config(
        vocab_size=3 + len(WORDS), hidden_size=WIDTH // 2, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    return Qwen2Model(config).eval()


def finish(cls: Any, transformer: Any, vae: Any, scheduler: Any, tokenizer: Any, text_encoder: Any) -> Any:
    pipe = cls(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae.eval(),
        scheduler=scheduler,
        safety_checker=SafetyChecker(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, prompts: list[str], **options: Any) -> torch.Tensor:
    settings: dict[str, Any] = {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "height": 96,
        "width": 160,
        "max_sequence_length": 12,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    output = pipe(prompt=prompts, **(settings | options))
    return output.images if "images" in output else output.frames


def call_video(pipe: Any, prompts: list[str], **options: Any) -> torch.Tensor:
    return call(pipe, prompts, num_frames=9, **options)


SHARED: dict[str, Any] = {
    "grid": GRID,
    "image_first": True,
    "layers": 3,
    "text_width": WIDTH,
    "joint": False,
    "joining": joining,
}
CASES = (
    Case(
        "Cosmos",
        make_transformer,
        inputs,
        **SHARED,
        pipeline=make_pipeline,
        call=call_video,
        guidance="two passes",
    ),
    Case("Cosmos 2.5", make_25, inputs_25, **SHARED),
)
