"""How every kernel is called: the arguments that the compile matrix and the benchmark hand to it and to its reference.

Tensors of heads are views of token-major storage, as the projections of a model leave them, or head-major, as what
norms them may leave them. Shapes: R rows, H heads,
C text rows, T prompt tokens, N image tokens in F frames, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

OPS = {
    # operation: module of `concept_map_kernels` that holds it
    "concept_attention": "concept_attention",
    "query_key_argmax": "query_key_argmax",
    "gram_columns": "gram_columns",
    "similarity": "similarity",
    "accumulate_similarity_": "similarity",
    "frame_statistics": "frame_statistics",
    "frame_spread": "frame_statistics",
    "similarity_and_statistics": "image_epilogue",
    "attention_probabilities": "attention_probabilities",
    "temporal_matching": "temporal_matching",
    "segment_attention": "segment_attention",
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call.

    Attributes:
        rows: R.
        heads: H.
        frames: F.
        height: rows of image tokens of a frame.
        width: columns of image tokens of a frame.
        head_width: D.
        concepts: C.
        text: T.
    """

    rows: int
    heads: int
    frames: int
    height: int
    width: int
    head_width: int
    concepts: int
    text: int

    @property
    def in_frame(self) -> int:
        """Image tokens of a frame."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """N."""
        return self.frames * self.in_frame


@dataclass(frozen=True)
class Call:
    """One way to call an operation.

    Attributes:
        op: name of the operation.
        variant: what sets this call apart from the others of the operation.
        arguments: by name, the same for the kernel and for the reference.
    """

    op: str
    variant: str
    arguments: dict[str, Any]


class Inputs:
    """Random tensors of one size and dtype on one device; on "meta" they have no data."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: str, *, head_major: bool = False) -> None:
        self.sizes = sizes
        self.dtype = dtype
        self.device = device
        self._head_major = head_major
        self._generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def _random(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if self._generator is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randn(shape, dtype=torch.float32, device=self.device, generator=self._generator).to(dtype)

    def tokens(self, count: int) -> torch.Tensor:
        """A query, key, value or output `[R, H, count, D]`."""
        sizes = self.sizes
        heads = self._random(sizes.rows, count, sizes.heads, sizes.head_width, dtype=self.dtype).transpose(1, 2)
        return heads.contiguous() if self._head_major else heads

    def image(self) -> torch.Tensor:
        """A tensor of the image tokens `[R, H, N, D]`."""
        return self.tokens(self.sizes.tokens)

    def concepts(self) -> torch.Tensor:
        """A tensor of the text rows `[R, H, C, D]`."""
        return self.tokens(self.sizes.concepts)

    def indices(self, below: int, *shape: int) -> torch.Tensor:
        """Random int64 of a shape."""
        if self._generator is None:
            return torch.empty(shape, dtype=torch.int64, device=self.device)
        return torch.randint(below, shape, device=self.device, generator=self._generator)

    def head_weights(self) -> torch.Tensor:
        """The mean over heads, float32 `[R, H]`."""
        shape = (self.sizes.rows, self.sizes.heads)
        return torch.full(shape, 1 / self.sizes.heads, dtype=torch.float32, device=self.device)

    def multiplicity(self) -> torch.Tensor:
        """The last text row stands for three, float32 `[C]`."""
        counts = torch.ones(self.sizes.concepts, device=self.device)
        counts[-1] = 3
        return counts


def calls(op: str, inputs: Inputs) -> Iterator[Call]:
    """Every way in which the library calls an operation, with new inputs each."""
    for variant, arguments in _ARGUMENTS[op](inputs):
        yield Call(op, variant, arguments)


Variants = Iterator[tuple[str, dict[str, Any]]]


def _concept_attention(inputs: Inputs) -> Variants:
    for variant in ("", "multiplicity"):
        yield (
            variant,
            {
                "query": inputs.concepts(),
                "key": inputs.concepts(),
                "value": inputs.concepts(),
                "image_key": inputs.image(),
                "image_value": inputs.image(),
                "multiplicity": inputs.multiplicity() if variant else None,
            },
        )


def _query_key_argmax(inputs: Inputs) -> Variants:
    yield (
        "",
        {"image_query": inputs.image(), "concept_key": inputs.concepts(), "frames": inputs.sizes.frames},
    )


def _standardizations(inputs: Inputs) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "none", {"standardize": "none", "multiplicity": None}
    yield "clip", {"standardize": "clip", "multiplicity": None}
    if inputs.sizes.concepts > 1:
        yield "text", {"standardize": "text", "multiplicity": inputs.multiplicity()}


def _gram_columns(inputs: Inputs) -> Variants:
    sizes = inputs.sizes
    for variant, options in _standardizations(inputs):
        index = inputs.indices(sizes.in_frame, sizes.rows, sizes.heads, sizes.concepts, sizes.frames)
        features = {"image_output": inputs.image(), "index": index, "head_weights": inputs.head_weights()}
        yield variant, features | options


def _similarity(inputs: Inputs) -> Variants:
    for variant, options in _standardizations(inputs):
        pair = {"concept": inputs.concepts(), "image": inputs.image(), "head_weights": inputs.head_weights()}
        yield variant, pair | {"scale": inputs.sizes.head_width**-0.5} | options


def _accumulate_similarity(inputs: Inputs) -> Variants:
    sizes = inputs.sizes
    yield (
        "",
        {
            "total": torch.zeros(sizes.rows, sizes.concepts, sizes.tokens, device=inputs.device),
            "concept": inputs.concepts(),
            "image": inputs.image(),
            "head_weights": inputs.head_weights(),
            "scale": 1.0,
        },
    )


def _frame_statistics(inputs: Inputs) -> Variants:
    yield "", {"image_output": inputs.image(), "frames": inputs.sizes.frames}


def _frame_spread(inputs: Inputs) -> Variants:
    image = inputs.image()
    mean = image.float().unflatten(2, (inputs.sizes.frames, -1)).mean(3)
    mean -= mean.mean(2, keepdim=True)  # what `frame_statistics` returns
    yield "", {"image_output": image, "mean": mean, "frames": inputs.sizes.frames}


def _similarity_and_statistics(inputs: Inputs) -> Variants:
    yield (
        "",
        {
            "concept_output": inputs.concepts(),
            "image_output": inputs.image(),
            "head_weights": inputs.head_weights(),
            "frames": inputs.sizes.frames,
        },
    )


def _attention_probabilities(inputs: Inputs) -> Variants:
    sizes = inputs.sizes
    for variant in ("text keys", "all keys"):
        yield (
            variant,
            {
                "image_query": inputs.image(),
                "text_key": inputs.tokens(sizes.text),
                "tokens": inputs.indices(sizes.text, sizes.concepts),
                "head_weights": inputs.head_weights(),
                "image_key": inputs.image() if variant == "all keys" else None,
            },
        )


def _temporal_matching(inputs: Inputs) -> Variants:
    sizes = inputs.sizes
    for direction in ("forward", "backward", "both"):
        query, key = inputs.image(), inputs.image()
        first = slice(0, sizes.in_frame)
        yield (
            direction,
            {
                "source_query": query[:, :, first],
                "source_key": key[:, :, first],
                "target_query": query,
                "target_key": key,
                "tokens": inputs.indices(sizes.in_frame, sizes.rows, sizes.in_frame),
                "head_weights": inputs.head_weights(),
                "frames": sizes.frames,
                "width": sizes.width,
                "scale": sizes.head_width**-0.5,
                "direction": direction,
                "radius": 1,
            },
        )


def _segment_attention(inputs: Inputs) -> Variants:
    sizes = inputs.sizes
    for variant in ("no text", "text", "masked text"):
        mask = torch.ones(sizes.rows, sizes.text, dtype=torch.bool, device=inputs.device)
        yield (
            variant,
            {
                "image_query": inputs.tokens(sizes.in_frame),
                "tokens": inputs.indices(sizes.in_frame, sizes.rows, sizes.in_frame),
                "text_key": inputs.tokens(0 if variant == "no text" else sizes.text),
                "image_key": inputs.image(),
                "text_mask": mask if variant == "masked text" else None,
                "head_weights": inputs.head_weights(),
                "frames": sizes.frames,
                "scale": sizes.head_width**-0.5,
            },
        )


_ARGUMENTS: dict[str, Callable[[Inputs], Variants]] = {
    "concept_attention": _concept_attention,
    "query_key_argmax": _query_key_argmax,
    "gram_columns": _gram_columns,
    "similarity": _similarity,
    "accumulate_similarity_": _accumulate_similarity,
    "frame_statistics": _frame_statistics,
    "frame_spread": _frame_spread,
    "similarity_and_statistics": _similarity_and_statistics,
    "attention_probabilities": _attention_probabilities,
    "temporal_matching": _temporal_matching,
    "segment_attention": _segment_attention,
}
