"""A tiny pipeline with T5's own tokenizer, over a few pieces, so that many words are several tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from backbones import tiny_cogvideox as tiny
from diffusers import CogVideoXPipeline
from transformers import T5Config, T5EncoderModel, T5Tokenizer

PIECES = (
    *("▁a", "▁the", "▁red", "▁dog", "▁sky", "▁on", "▁run", "ning", "▁rock", "et", "s", "dog", "▁"),
    *(",", '"', "(", ")"),
)
ROCKET = "a red rocket, the dog running"
ROCKET_WORDS = {"a": [0], "red": [1], "rocket": [2, 3], "the": [5], "dog": [6], "running": [7, 8]}
QUOTED = 'the "dog" running on a rocket'
QUOTED_WORDS = {"the": [0], "dog": [3], "running": [5, 6], "on": [7], "a": [8], "rocket": [9, 10]}
REPEATED = "dog dogs dog rockets rock"


def make_tokenizer() -> T5Tokenizer:
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    return T5Tokenizer(vocab=marks + [(piece, -float(len(piece) == 1) - 1) for piece in PIECES], extra_ids=0)


@cache
def pipeline(rope: bool = True) -> CogVideoXPipeline:
    pipe = tiny.make_pipeline(rope=rope)
    tiny.shake(pipe.transformer)
    torch.manual_seed(3)
    config = T5Config(**{**pipe.text_encoder.config.to_dict(), "vocab_size": 3 + len(PIECES)})
    pipe.register_modules(tokenizer=make_tokenizer(), text_encoder=T5EncoderModel(config).eval())
    return pipe


def call(pipe: CogVideoXPipeline, prompt: Any = ROCKET, **options: Any) -> torch.Tensor:
    """Two steps, with a seed that makes no near tie of anchors."""
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(7), **options}
    return tiny.call(pipe, prompt, **settings)
