"""What edits of the attention are to do: attention with all its weights in float64, in which some are written over."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from backbones._case import Case

Rule = Callable[[torch.Tensor], torch.Tensor]
"""From the shares of a word `[R, H, N]`, over the image tokens, to others."""


def give(weights: torch.Tensor, columns: Sequence[int], wanted: torch.Tensor) -> torch.Tensor:
    """Probabilities `[..., S]` in which some columns together have the share `[...]`, in their proportions."""
    inside = torch.zeros(weights.shape[-1], dtype=torch.bool)
    inside[list(columns)] = True
    share = (weights * inside).sum(-1)
    factor = torch.where(inside, (wanted / share)[..., None], ((1 - wanted) / (1 - share))[..., None])
    return weights * factor


def scaled(scale: float | torch.Tensor) -> Rule:
    """The share that a word has once its probabilities are multiplied and the row is made to sum to 1."""
    return lambda share: scale * share / (1 + (scale - 1) * share)


@contextmanager
def attention_edited(
    case: Case, text: int, rules: Sequence[tuple[Sequence[int], Rule]], *, layers: Sequence[int], rows: slice
) -> Iterator[None]:
    """Within the context PyTorch's attention is naive where image reads text, and edited in some layers."""
    stock, calls = torch.nn.functional.scaled_dot_product_attention, 0
    image = case.start + case.tokens + case.behind
    passed = {"Wan VACE": 2}.get(case.name, 0)  # the control blocks, which are no layers
    per_layer = 2 if case.row_by_row else 1

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, **options: Any
    ) -> torch.Tensor:
        nonlocal calls
        words = key.shape[2] - (image if case.joint else 0)
        sees_text = query.shape[2] == (key.shape[2] if case.joint else image) and 0 < words <= text
        if not sees_text or (words < text and not case.row_by_row):
            return stock(query, key, value, attn_mask=attn_mask, **options)
        logits = query.double() @ key.double().mT / math.sqrt(query.shape[-1])
        if attn_mask is not None:
            logits = (
                logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
            )
        weights = logits.softmax(-1)
        if calls // per_layer - passed in layers:
            first = (0 if case.image_first or not case.joint else text) + case.start
            own = slice(first, first + case.tokens)
            for columns, rule in rules:
                shift = image if case.joint and case.image_first else 0
                places = [column + shift for column in columns if column < words]
                part = weights[rows, :, own]
                weights[rows, :, own] = give(part, places, rule(part[..., places].sum(-1)))
        calls += 1
        return (weights @ value.double()).to(value.dtype)

    torch.nn.functional.scaled_dot_product_attention = attend
    try:
        yield
        assert calls == (case.layers + passed) * per_layer
    finally:
        torch.nn.functional.scaled_dot_product_attention = stock
