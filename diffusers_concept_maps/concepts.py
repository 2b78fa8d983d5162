"""Concept text to embeddings, with the pipeline's own tokenizer and text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffusers_concept_maps.backbones import Backbone
from diffusers_concept_maps.errors import ConceptMapsValueError

TOKEN_POLICIES = ("mean", "first", "last")
"""How the states of a concept's tokens become one: their mean, or the first or last of them."""


def check_concepts(concepts: Sequence[str] | None) -> tuple[str, ...]:
    """The concepts without surrounding blanks.

    Raises:
        ConceptMapsValueError: none given, a bare string, or a concept that is blank, no string or there twice.
    """
    if isinstance(concepts, str):
        raise ConceptMapsValueError(f"concepts is the string {concepts!r}; expected a list such as [{concepts!r}]")
    if not concepts:
        raise ConceptMapsValueError("no concepts; pass at least one, such as concepts=['dog']")
    clean: list[str] = []
    for concept in concepts:
        if not isinstance(concept, str) or not concept.strip():
            raise ConceptMapsValueError(
                f"concept {concept!r} is blank or no string; expected a word or a short phrase"
            )
        if concept.strip() in clean:
            raise ConceptMapsValueError(f"concept {concept.strip()!r} is there twice; name every concept once")
        clean.append(concept.strip())
    return tuple(clean)


def check_token_policy(token_policy: str) -> None:
    """Raise `ConceptMapsValueError` unless the policy is one of `TOKEN_POLICIES`."""
    if token_policy not in TOKEN_POLICIES:
        raise ConceptMapsValueError(
            f"unknown token_policy {token_policy!r}; expected one of {', '.join(TOKEN_POLICIES)}"
        )


def encode_concepts(
    backbone: Backbone, pipe: Any, concepts: Sequence[str], token_policy: str, length: int | None = None
) -> torch.Tensor:
    """Embed every concept on its own.

    Args:
        backbone: of the pipeline's transformer.
        pipe: whose text encoder to use.
        concepts: words or phrases.
        token_policy: one of `TOKEN_POLICIES`; end marks and padding are never part of it.
        length: tokens to pad to; None is what suits the model.

    Returns:
        `[concept, width]` in text-encoder space.

    Raises:
        ConceptMapsError: the pipeline has no text encoder, or a concept does not fit or has no known word.
    """
    states, counts = backbone.encode(pipe, list(concepts), length)
    pooled = []
    for state, count in zip(states, counts, strict=True):
        words = state[:count]
        pooled.append(words.mean(0) if token_policy == "mean" else words[0 if token_policy == "first" else -1])
    return torch.stack(pooled)


def check_embeds(embeds: torch.Tensor, concepts: Sequence[str] | None, width: int) -> tuple[str, ...]:
    """The names of given embeddings: the concepts, or "concept 0", "concept 1", ... where there are none.

    Args:
        embeds: floating tensor `[concept, width]` or `[batch, concept, width]`.
        concepts: their names.
        width: of the text encoder states that the transformer takes.

    Raises:
        ConceptMapsValueError: wrong shape or dtype, or another number of names.
    """
    if not isinstance(embeds, torch.Tensor):
        raise ConceptMapsValueError(f"concept_embeds is {type(embeds).__name__}; expected a tensor [concept, {width}]")
    if embeds.ndim not in (2, 3) or embeds.shape[-1] != width or not embeds.is_floating_point() or 0 in embeds.shape:
        raise ConceptMapsValueError(
            f"concept_embeds has shape {tuple(embeds.shape)} and dtype {embeds.dtype}; expected a floating tensor "
            f"[concept, {width}] or [batch, concept, {width}]"
        )
    count = embeds.shape[-2]
    if concepts is None:
        return tuple(f"concept {i}" for i in range(count))
    names = check_concepts(concepts)
    if len(names) != count:
        raise ConceptMapsValueError(f"{len(names)} concepts for {count} concept_embeds; expected one name for each")
    return names
