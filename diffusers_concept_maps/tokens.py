"""Words and tokens of a text: which there are, and which characters each covers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import logging
from torch import nn

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError

logger = logging.get_logger(__name__)

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def words_of(prompt: str) -> tuple[str, ...]:
    """The different words of a prompt in order of appearance, without punctuation."""
    return tuple(dict.fromkeys(_WORD.findall(prompt)))


def token_spans(tokenizer: Any, prompt: str, length: int, **options: Any) -> list[tuple[int, int]]:
    """The characters `(start, stop)` of a prompt that each of its tokens covers; marks that are added cover none.

    Args:
        tokenizer: the pipeline's.
        prompt: the text that is encoded.
        length: number of tokens that it is cut to.
        options: further arguments of the tokenizer.

    Raises:
        ConceptMapsError: the tokenizer cannot tell.
    """
    if not tokenizer.is_fast:
        raise ConceptMapsError(
            f"{type(tokenizer).__name__} does not tell which characters a token covers; pass "
            f"prompt_tokens={{word: positions}}"
        )
    encoded = tokenizer(prompt, truncation=True, max_length=length, return_offsets_mapping=True, **options)
    return list(encoded.offset_mapping)


def spans_inside(spans: Sequence[tuple[int, int]], start: int, prompt: str) -> list[tuple[int, int]]:
    """What each token of a template covers of the prompt in it; a token that covers none of it has `(0, 0)`.

    Args:
        spans: the characters `(start, stop)` of the filled template that each token covers.
        start: where the prompt begins in that.
        prompt: the text.
    """
    inside = [(max(begin - start, 0), min(stop - start, len(prompt))) for begin, stop in spans]
    return [(begin, stop) if begin < stop else (0, 0) for begin, stop in inside]


def find_tokens(spans: Sequence[tuple[int, int]], prompt: str, word: str) -> list[list[int]]:
    """Positions of a word or phrase in the tokenized prompt, one list of sub-words per occurrence.

    Characters are compared, not tokens: punctuation next to a word may change its tokens, a longer word may begin with
    the same ones, and all unknown words share one.

    Args:
        spans: of the prompt's tokens, by `token_spans`.
        prompt: the text.
        word: what to find, as a whole word.

    Raises:
        ConceptMapsValueError: the prompt does not contain it, or not within its tokens.
    """
    pattern = r"\s+".join(re.escape(part) for part in word.split())
    places = [match.span() for match in re.finditer(rf"(?<![^\W_]){pattern}(?![^\W_])", prompt)]
    if not places:
        raise ConceptMapsValueError(f"{word!r} is not a word of the prompt {prompt!r}; name words that are in it")
    if places[-1][1] > max(stop for _, stop in spans):
        raise ConceptMapsValueError(
            f"{word!r} lies beyond the {len(spans)} tokens of the prompt that the transformer sees; use a larger "
            f"max_sequence_length or a shorter prompt"
        )
    return [
        [token for token, (begin, end) in enumerate(spans) if begin < stop and start < end] for start, stop in places
    ]


def tokenizer_of(pipe: Any) -> Any:
    """The tokenizer of a pipeline, also of one that has it in a processor for images too."""
    return getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)


def check_encoders(pipe: Any, *names: str) -> None:
    """Refuse a pipeline that lacks what encodes concepts.

    Args:
        pipe: the pipeline.
        names: its tokenizers and text encoders that are needed.

    Raises:
        ConceptMapsError: one of them is missing.
    """
    missing = [name for name in names if getattr(pipe, name, None) is None]
    if missing:
        raise ConceptMapsError(
            f"this {type(pipe).__name__} has no tokenizer or text encoder to encode the concepts with; pass "
            f"concept_embeds instead, or load the pipeline with its {', '.join(missing)}"
        )


@contextmanager
def undisturbed(*encoders: nn.Module) -> Iterator[None]:
    """Within the context, dropout of encoders that are being trained draws nothing from the global random state.

    Args:
        encoders: what is going to be called; nothing that it does is differentiated.
    """
    with torch.no_grad(), torch.random.fork_rng(enabled=any(encoder.training for encoder in encoders)):
        yield


def word_tokens(tokenizer: Any, text: str, limit: int | None) -> int:
    """Number of tokens of a concept, without the marks that a tokenizer adds.

    Args:
        tokenizer: the pipeline's.
        text: a word or phrase.
        limit: tokens that the model takes, one of them an end mark; None does not check it.

    Raises:
        ConceptMapsValueError: it does not fit, or the tokenizer knows none of its words.
    """
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    if limit is not None and len(tokens) > limit - 1:
        raise ConceptMapsValueError(
            f"concept {text!r} has {len(tokens)} tokens; expected at most {limit - 1}. Shorten it."
        )
    # Where the unknown token is the end mark as well (CLIP), tokens tell nothing.
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id != tokenizer.eos_token_id else None
    if unknown is not None and all(token == unknown for token in tokens):
        raise ConceptMapsValueError(
            f"concept {text!r} has no word that the tokenizer knows; use words the model was trained with"
        )
    if unknown is not None and unknown in tokens:
        logger.warning(
            f"Concept {text!r} has words that the tokenizer does not know; its map will say little of them."
        )
    return len(tokens)


def words_first(states: torch.Tensor, spans: Sequence[Sequence[tuple[int, int]]]) -> tuple[torch.Tensor, list[int]]:
    """States of texts behind a template, with those of the words in front.

    Args:
        states: `[text, token, width]`.
        spans: the characters of its text that each token covers, for every text.

    Returns:
        `[text, token, width]` and the number of tokens of every text that cover some of its characters.
    """
    rows = [[row for row, (start, stop) in enumerate(own) if stop > start] for own in spans]
    moved = [state.roll(-own[0], 0) for state, own in zip(states, rows, strict=True)]
    return torch.stack(moved), [len(own) for own in rows]
