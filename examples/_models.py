"""The pipelines of the examples: the embedded model, any other by its name, and a tiny Wan of random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

import diffusers_concept_maps as dcm

_WIDTH = 32


def load(model: str | None, steps: int | None = None) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and the arguments of its call that do not depend on what is asked for.

    Args:
        model: a folder or a name on the hub; None for the embedded model.
        steps: denoising steps; None is the pipeline's default, 20 for the embedded model.
    """
    call: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
    if model is None:
        pipe, call = dcm.load_shapes_pipeline(), {"num_inference_steps": 20, "guidance_scale": 4.0} | call
    else:
        on_gpu = torch.cuda.is_available()
        pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.bfloat16 if on_gpu else torch.float32)
        if on_gpu:
            pipe.enable_model_cpu_offload()
    length = pipe.transformer.config.get("max_text_seq_length")
    if length is not None:  # the position table of CogVideoX takes no other one
        call["max_sequence_length"] = length
    return pipe, call


def tiny_wan(vocabulary: str) -> tuple[WanPipeline, dict[str, Any]]:
    """A Wan pipeline of stock classes that runs in a second, and the arguments of its call.

    Its weights are random, so that it draws noise, and its words look at nothing in particular.

    Args:
        vocabulary: the words that it knows, with spaces between them.
    """
    torch.manual_seed(0)
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *dict.fromkeys(vocabulary.split())])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=_WIDTH, freq_dim=16, ffn_dim=64, num_layers=4, rope_max_seq_len=32,
    )  # fmt: skip
    with torch.no_grad():  # the default initialization looks everywhere alike
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 2 and "norm" not in name:
                parameter.mul_(2.0)
    text = UMT5Config(
        vocab_size=len(words), d_model=_WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    pipe = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ).eval(),
        transformer=transformer.eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )
    return pipe, {"height": 96, "width": 160, "num_frames": 17, "max_sequence_length": 16, "num_inference_steps": 6}
