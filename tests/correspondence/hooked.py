"""Queries and keys of stock runs, taken where PyTorch's attention is called and not by anything of the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from backbones import tiny_cogvideox_variants
from backbones._case import find_cases
from torch.nn import functional

SIZE, FRAMES, GRID = (48, 80), 9, (3, 3, 5)
TOKENS = 45
COVER = [0, 1, 1, 1, 1, 2, 2, 2, 2]
PROMPTS = ["a red dog running on the beach", "the sky on a rock"]


@dataclass(frozen=True)
class Family:
    """A pipeline, and how to call it for prompts; three steps.

    Attributes:
        image_first: image tokens come before the text, where that is in the same attention.
        passes: forward passes of a step; the first one is conditional.
        batched: the conditional rows are the second half of a batch.
    """

    make: Callable[[], Any]
    run: Callable[..., torch.Tensor]
    image_first: bool
    layers: int
    passes: int = 1
    batched: bool = False


def _families() -> dict[str, Family]:
    known = {case.name: case for case in find_cases()}
    found = {}
    for name in ("CogVideoX", "HunyuanVideo", "Wan 2.1", "Wan 2.2"):
        case = known[name]
        passes, batched = (2 if case.guidance == "two passes" else 1), case.guidance == "batched"
        found[name] = Family(case.pipeline, case.call, case.image_first, case.layers, passes, batched)
    variant = tiny_cogvideox_variants.VARIANTS["image"]

    def run(pipe: Any, prompts: list[str], **options: Any) -> torch.Tensor:
        return tiny_cogvideox_variants.call(pipe, variant, prompts, **options)

    make = partial(tiny_cogvideox_variants.make_pipeline, variant)
    return found | {"CogVideoX image-to-video": Family(make, run, False, 3, batched=True)}


FAMILIES = _families()


@cache
def pipeline(name: str) -> Any:
    return FAMILIES[name].make()


@dataclass
class Attention:
    """One call of self-attention over the video, in float64."""

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None


@dataclass
class Run:
    """What attention was called with, by forward pass and layer, and what the run returned."""

    latents: torch.Tensor
    passes: list[list[Attention]] = field(default_factory=list)


def hooked_run(pipe: Any, run: Callable[[], torch.Tensor]) -> Run:
    """A stock run whose attention calls over the video are noted."""
    noted = Run(torch.empty(0))
    attend = functional.scaled_dot_product_attention
    transformers = [pipe.transformer, getattr(pipe, "transformer_2", None)]

    def note(query: torch.Tensor, key: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        if noted.passes and query.shape == key.shape and query.shape[2] >= TOKENS:
            mask = options.get("attn_mask")
            noted.passes[-1].append(Attention(query.detach().double(), key.detach().double(), mask))
        return attend(query, key, *others, **options)

    hooks = [
        transformer.register_forward_pre_hook(lambda *_: noted.passes.append([]))
        for transformer in transformers
        if transformer is not None
    ]
    functional.scaled_dot_product_attention = note
    try:
        noted.latents = run()
    finally:
        functional.scaled_dot_product_attention = attend
        for hook in hooks:
            hook.remove()
    return noted


@dataclass
class Seen:
    """Conditional rows of one layer in one step, float64 `[R, H, token, D]`; text that is seen, bool `[R, T]`."""

    query: torch.Tensor
    key: torch.Tensor
    text_key: torch.Tensor
    text_mask: torch.Tensor


def conditional(family: Family, run: Run, step: int, layer: int, rows: int) -> Seen:
    """What a layer has had in a step."""
    call = run.passes[step * family.passes if len(run.passes) > 3 else step][layer]
    own = slice(rows, None) if family.batched and len(call.query) > rows else slice(None)
    length = call.query.shape[2]
    image = slice(0, TOKENS) if family.image_first else slice(length - TOKENS, length)
    text = slice(TOKENS, length) if family.image_first else slice(0, length - TOKENS)
    text_key = call.key[own, :, text]
    mask = torch.ones(len(text_key), text_key.shape[2], dtype=torch.bool)
    if call.mask is not None:
        mask = call.mask.expand(-1, 1, length, length)[own, 0, image, text][:, 0]
    return Seen(call.query[own, :, image], call.key[own, :, image], text_key, mask)
