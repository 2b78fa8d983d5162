"""Maps of any stock model in float64, by brute force: concepts are text rows of the model itself, seen by nobody.

Nothing of the package is used. PyTorch's attention is replaced by one that materializes everything and hides concept
columns from all other rows; concept rows see concepts and image. What it is handed is what maps are made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch
from backbones._case import Case, Inputs, in_double
from naive import Taps

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and output of one attention call `[R, H, token, D]`."""


def layer_taps(case: Case, inputs: Inputs, embeds: torch.Tensor) -> list[Taps]:
    """What every layer shows, from float64 copies of the model and its inputs.

    Args:
        case: the model.
        inputs: arguments of its forward pass.
        embeds: text encoder states of the concepts `[concept, text_width]`.
    """
    transformer, inputs = in_double(case, inputs)
    count = embeds.shape[0]
    joining = case.joining(transformer, inputs, embeds.double())
    with torch.no_grad(), joining as joined, recorded_attention(case, count) as layers:
        transformer(**joined)
    calls = inputs["hidden_states"].shape[0] if case.row_by_row else 1
    expected = calls * case.layers
    assert len(layers) == expected, f"{len(layers)} attention calls with concepts, expected {expected}"
    taps = [_split(case, layer, count) for layer in layers]
    return [_join_rows(taps[start : start + calls]) for start in range(0, expected, calls)]


def _join_rows(rows: list[Taps]) -> Taps:
    """The taps of calls that had a part of the batch each."""
    names = [field.name for field in fields(Taps)]
    return Taps(**{name: torch.cat([getattr(row, name) for row in rows]) for name in names})


@contextmanager
def recorded_attention(case: Case, concepts: int) -> Iterator[list[Layer]]:
    """Within the context, attention hides the concepts, and the calls that have some are noted."""
    layers: list[Layer] = []

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        assert not is_causal
        logits = query @ key.mT * (scale if scale is not None else 1 / math.sqrt(query.shape[-1]))
        if attn_mask is not None:
            logits = logits + (_as_bias(attn_mask, logits) if attn_mask.dtype == torch.bool else attn_mask)
        noted = _has_concepts(case, query, key)
        if noted:
            logits = _hide(case, logits, concepts)
        blind = logits.isneginf().all(-1, keepdim=True)  # padding: it reads nothing, as in PyTorch
        output = logits.softmax(-1).masked_fill(blind, 0) @ value
        if noted:
            layers.append((query, key, output))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        yield layers


def _as_bias(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=like.dtype).masked_fill(~mask, -math.inf)


def _has_concepts(case: Case, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Joint attention of more than the image, or cross-attention of the image to something shorter or longer."""
    if case.joint:
        return query.shape[2] == key.shape[2] and key.shape[2] > case.start + case.tokens
    return query.shape[2] >= case.tokens and query.shape[2] != key.shape[2]


def _hide(case: Case, logits: torch.Tensor, concepts: int) -> torch.Tensor:
    """Concept columns are seen by concept rows alone, and these see no text."""
    rows, columns = logits.shape[-2:]
    if not case.joint:
        return logits.index_fill(-1, torch.arange(columns - concepts, columns), -math.inf)
    own, text, _ = _places(case, columns, concepts)
    hidden = torch.zeros(rows, columns, dtype=torch.bool)
    hidden[:, own] = True
    hidden[own, own] = False
    hidden[own, text] = True
    return logits.masked_fill(hidden, -math.inf)


def _places(case: Case, tokens: int, concepts: int) -> tuple[slice, slice, slice]:
    """Where concepts, text and image grid are in a joint sequence."""
    if case.image_first:
        image = tokens - concepts - _text_of(case, tokens, concepts)
        text = slice(image, tokens - concepts)
        return slice(tokens - concepts, tokens), text, slice(case.start, case.start + case.tokens)
    text_count = _text_of(case, tokens, concepts)
    first = text_count + concepts + case.start
    return slice(text_count, text_count + concepts), slice(0, text_count), slice(first, first + case.tokens)


def _text_of(case: Case, tokens: int, concepts: int) -> int:
    return tokens - concepts - case.start - case.tokens - case.behind


def _split(case: Case, layer: Layer, concepts: int) -> Taps:
    query, key, output = layer
    if not case.joint:
        image = slice(case.start, case.start + case.tokens)
        return Taps(query[:, :, image], output[:, :, image], key[:, :, -concepts:], torch.empty(0))
    own, _, image = _places(case, query.shape[2], concepts)
    return Taps(query[:, :, image], output[:, :, image], key[:, :, own], output[:, :, own])


def embeds_of(case: Case, concepts: int = 3) -> torch.Tensor:
    """Text encoder states for concepts `[concept, text_width]`."""
    return torch.randn(concepts, case.text_width, generator=torch.Generator().manual_seed(99))


def kept_state(transformer: Any) -> list[tuple[str, object, tuple[str, ...]]]:
    """Processors, hooks and attributes of all modules, to compare before and after a capture."""
    state = []
    for name, module in transformer.named_modules():
        hooks = tuple(str(len(getattr(module, kind))) for kind in ("_forward_pre_hooks", "_forward_hooks"))
        state.append((name, getattr(module, "processor", None), (*sorted(module.__dict__), *hooks)))
    return state
