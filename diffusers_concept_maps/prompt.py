"""Words of the prompt as targets: which tokens of the prompt each word is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_concept_maps.backbones import Backbone
from diffusers_concept_maps.concepts import check_concepts
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.indices import check_indices
from diffusers_concept_maps.tokens import find_tokens, words_of


def check_words(
    pipe: Any | None, words: Sequence[str] | None, positions: Mapping[str, Sequence[int]] | None
) -> tuple[str, ...] | None:
    """Names of the target words; None where they are all words of a prompt that is not known yet.

    Args:
        pipe: the pipeline; None for a bare transformer.
        words: the words; None for those of `positions`, or for all.
        positions: token positions of every word, where the caller knows them.

    Raises:
        ConceptMapsValueError: they cannot be found, or a word or position is none.
    """
    if pipe is None and positions is None:
        raise ConceptMapsValueError("a bare transformer has no tokenizer; pass prompt_tokens={word: positions}")
    if positions is not None:
        for word, tokens in positions.items():
            check_indices(f"token of {word!r}", tokens, None)
        words = list(positions) if words is None else words
    names = None if words is None else check_concepts(words)
    if positions is not None and names is not None and set(names) - set(positions):
        raise ConceptMapsValueError(f"prompt_tokens has no positions of {sorted(set(names) - set(positions))}")
    return names


@dataclass(frozen=True)
class TextRows:
    """Rows of the text axis that are scored, and how they become words.

    Attributes:
        indices: the rows `[T]`; None is all of them.
        weights: float32 `[R, word, T]`, the mean over the tokens of each word.
        length: number of text tokens of the transformer's input.
    """

    indices: torch.Tensor | None
    weights: torch.Tensor
    length: int

    def fits(self, videos: int, length: int) -> bool:
        """Whether they are those of so many videos, with so many text tokens."""
        return (self.weights.shape[0], self.length) == (videos, length)

    def last(self, text: torch.Tensor) -> torch.Tensor:
        """Text `[R, H, text, D]` as cross-attention reads it, without what stands before the prompt in it.

        Raises:
            ConceptMapsError: the attention is not given the whole prompt.
        """
        if text.shape[2] < self.length:
            raise ConceptMapsError(
                f"the transformer takes {self.length} text tokens and its attention reads the last {text.shape[2]} of "
                f"them, so that the words of the prompt cannot be told; use max_sequence_length={text.shape[2]}"
            )
        return text[:, :, text.shape[2] - self.length :]

    def select(self, text: torch.Tensor) -> torch.Tensor:
        """The scored rows of `[R, H, text, D]`."""
        return text if self.indices is None else text.index_select(2, self.indices)

    def merge(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores of rows `[R, T, N]` to scores of words `[R, word, N]`."""
        return torch.bmm(self.weights, scores)


class _Encoded:
    """One call of `encode_prompt`: its prompts, None for embeddings, and the tensors it has returned.

    `misleading` is the argument that keeps their words from being found, if there is one.
    """

    def __init__(self, prompt: str | list[str] | None, encoded: Any, misleading: str | None) -> None:
        self.prompts = [prompt] if isinstance(prompt, str) else prompt
        self.misleading = misleading
        returned = encoded if isinstance(encoded, tuple | list) else (encoded,)
        self._tensors = [tensor for tensor in returned if isinstance(tensor, torch.Tensor)]

    def is_text(self, text: object) -> bool:
        """Whether one of the tensors is what the transformer was handed as text."""
        return isinstance(text, torch.Tensor) and any(
            tensor.shape == text.shape and torch.equal(tensor.to(text), text) for tensor in self._tensors
        )


class PromptTokens:
    """Where each target word is in the prompt of the current run.

    Either given as positions, or found when the pipeline encodes its prompt: for the time of the capture
    `encode_prompt` is shadowed in the pipeline's own `__dict__` by a function that calls the original and notes the
    prompt. Pipelines whose negative prompt is encoded by a call of its own make several; the prompt is the one whose
    embeddings the transformer is handed. Where they were changed on the way it is the first, and the last for families
    with batched guidance, which make one call in a run.

    Attributes:
        names: the target words; known from the first run on where none were given.
    """

    def __init__(
        self,
        pipe: Any | None,
        backbone: Backbone,
        names: tuple[str, ...] | None,
        positions: Mapping[str, Sequence[int]] | None,
        *,
        official: bool,
    ) -> None:
        """Assign only.

        Args:
            pipe: the pipeline; None for a bare transformer.
            backbone: of its transformer.
            names: the target words; None for all words of the prompt.
            positions: token positions of every word, where the caller knows them.
            official: as official code, a word is the first sub-word of its first occurrence, and all rows of the text
                axis, padding included, are scored beside it.
        """
        self.names: tuple[str, ...] = names or tuple(positions or ())
        self._pipe = pipe
        self._backbone = backbone
        self._chosen = names
        self._given = positions
        self._official = official
        self._prompts: list[str] | None = None
        self._misleading: str | None = None
        self._encoded: list[_Encoded] = []  # since the last run whose words were asked for
        self._listener: Callable[..., Any] | None = None
        self._before: Any = None

    def listen(self) -> None:
        """Start to note the prompts that the pipeline encodes."""
        if self._given is None and self._pipe is not None:
            original = self._pipe.encode_prompt

            @functools.wraps(original)
            def encode_prompt(*args: Any, **kwargs: Any) -> Any:
                given = inspect.signature(original).bind(*args, **kwargs).arguments
                prompts = [given[name] for name in self._backbone.prompt_arguments if given.get(name) is not None]
                encoded = original(*args, **kwargs)
                misleading = self._backbone.misleading(self._pipe, given)
                self._encoded.append(_Encoded(prompts[0] if prompts else None, encoded, misleading))
                return encoded

            self._before, self._listener = self._pipe.__dict__.get("encode_prompt"), encode_prompt
            self._pipe.__dict__["encode_prompt"] = encode_prompt

    def stop(self) -> None:
        """Take the note-taking out of the pipeline again, and let go of the pipeline."""
        if self._pipe is not None and self._listener is not None:
            own = self._pipe.__dict__
            if own.get("encode_prompt") is self._listener:  # otherwise somebody has set another one since
                del own["encode_prompt"]
                if self._before is not None:
                    own["encode_prompt"] = self._before
        self._pipe = self._listener = self._before = None
        self._encoded = []

    def rows(self, videos: int, length: int, device: torch.device, text: object = None) -> TextRows:
        """Which text rows the words are, and how they are joined.

        Args:
            videos: number of videos; those of one prompt follow one another.
            length: number of text tokens of the transformer's input.
            device: where to put the indices and weights.
            text: what the transformer was handed as text in this forward pass.

        Raises:
            ConceptMapsError: the prompts or their tokens are not known, a word is not in one of them, or lies beyond
                `length`.
        """
        if self._encoded:
            handed = [entry for entry in self._encoded if entry.is_text(text)] if len(self._encoded) > 1 else []
            likely = self._encoded[-1 if self._backbone.batched_guidance else 0]
            chosen = (handed or [likely])[0]
            self._prompts, self._misleading = chosen.prompts, chosen.misleading
            self._encoded = []
        tables = self._tables(length)
        if videos % len(tables):
            raise ConceptMapsError(
                f"{videos} videos were generated from {len(tables)} prompts; their words are not known"
            )
        weights = torch.zeros(len(tables), len(self.names), length)
        for row, table in enumerate(tables):
            for column, name in enumerate(self.names):
                if max(table[name]) >= length:
                    raise ConceptMapsValueError(
                        f"prompt_tokens has token {max(table[name])} for {name!r}; the transformer sees {length} "
                        f"tokens, 0 to {length - 1}"
                    )
                weights[row, column, table[name]] = 1 / len(table[name])
        weights = weights.repeat_interleave(videos // len(tables), 0)
        if self._official:
            return TextRows(None, weights.to(device), length)
        used = weights.sum((0, 1)).nonzero().flatten()
        return TextRows(used.to(device), weights[:, :, used].to(device), length)

    def _tables(self, length: int) -> list[dict[str, list[int]]]:
        """Positions per prompt and word."""
        if self._given is not None:
            return [{name: sorted(set(positions)) for name, positions in self._given.items()}]
        if self._prompts is None or self._pipe is None:
            raise ConceptMapsError(
                "the words of the prompt are not known, because this run was given prompt_embeds; pass "
                "prompt_tokens={word: positions}"
            )
        if self._misleading is not None:
            raise ConceptMapsError(
                f"{self._misleading} gives the text of this run other tokens than those of the prompt alone, so that "
                f"its words cannot be found; leave it out, or pass prompt_tokens={{word: positions}}"
            )
        prompts = [self._backbone.clean(prompt) for prompt in self._prompts]
        if self._chosen is None:
            self.names = words_of(prompts[0])
        if not self.names:
            raise ConceptMapsValueError(f"the prompt {prompts[0]!r} has no words to make maps of")
        tables = []
        for prompt in prompts:
            spans = self._backbone.token_spans(self._pipe, prompt, length)
            tables.append({name: self._join(find_tokens(spans, prompt, name)) for name in self.names})
        return tables

    def _join(self, occurrences: list[list[int]]) -> list[int]:
        return occurrences[0][:1] if self._official else sorted(set().union(*occurrences))
