"""Triton kernels for the operations of diffusers_concept_maps, one module per operation; `__all__` is the public API.

Every function takes the arguments of the PyTorch function of the same name in diffusers_concept_maps, which is its
specification. Tensors come with any strides but a contiguous last axis, in float32, float16 or bfloat16; sums are
float32. Equal inputs give equal outputs on one device: nothing is atomic, and nothing is tuned at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .attention_probabilities import attention_probabilities
from .attention_probabilities import supports as _attention_probabilities
from .concept_attention import concept_attention
from .concept_attention import supports as _concept_attention
from .frame_statistics import frame_spread, frame_statistics
from .frame_statistics import supports as _frame_statistics
from .gram_columns import gram_columns
from .gram_columns import supports as _gram_columns
from .image_epilogue import similarity_and_statistics
from .image_epilogue import supports as _similarity_and_statistics
from .query_key_argmax import query_key_argmax
from .query_key_argmax import supports as _query_key_argmax
from .segment_attention import segment_attention
from .segment_attention import supports as _segment_attention
from .similarity import accumulate_similarity_, similarity
from .similarity import supports as _similarity
from .similarity import supports_accumulate as _accumulate_similarity
from .temporal_matching import supports as _temporal_matching
from .temporal_matching import temporal_matching

__version__ = "0.1.0"

__all__ = [
    "accumulate_similarity_",
    "attention_probabilities",
    "concept_attention",
    "frame_spread",
    "frame_statistics",
    "gram_columns",
    "query_key_argmax",
    "segment_attention",
    "similarity",
    "similarity_and_statistics",
    "supports",
    "temporal_matching",
]


def supports(op: str, *arguments: Any) -> bool:
    """Whether the kernel of an op is enabled for these arguments; nothing is launched, and no device is waited for.

    Args:
        op: name of a function of `__all__`.
        arguments: what that function would be called with, by position.

    Raises:
        ValueError: there is no such function.
    """
    if op not in _SUPPORTS:
        raise ValueError(f"unknown op {op!r}; expected one of {', '.join(sorted(_SUPPORTS))}")
    return _SUPPORTS[op](*arguments)


def _frame_spread(image_output: torch.Tensor, mean: torch.Tensor, frames: int) -> bool:
    return _frame_statistics(image_output, frames)


_SUPPORTS: dict[str, Callable[..., bool]] = {
    "accumulate_similarity_": _accumulate_similarity,
    "attention_probabilities": _attention_probabilities,
    "concept_attention": _concept_attention,
    "frame_spread": _frame_spread,
    "frame_statistics": _frame_statistics,
    "gram_columns": _gram_columns,
    "query_key_argmax": _query_key_argmax,
    "segment_attention": _segment_attention,
    "similarity": _similarity,
    "similarity_and_statistics": _similarity_and_statistics,
    "temporal_matching": _temporal_matching,
}
