"""The ops as PyTorch knows them, and which code runs them: the reference, or on a GPU a kernel that is enabled.

They are custom ops of the namespace `diffusers_concept_maps`, so that `torch.compile` keeps them whole. Arguments are
those of the functions of the same name in `reference` or `reference_matching`, and in `concept_map_kernels`; `ops` and
`ops_matching` check them.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from diffusers.utils import logging

from diffusers_concept_maps import reference, reference_matching
from diffusers_concept_maps.errors import ConceptMapsValueError

__all__ = [
    "BACKENDS",
    "NAMESPACE",
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
    "temporal_matching",
    "use_backend",
]

NAMESPACE = "diffusers_concept_maps"
BACKENDS = ("auto", "kernels", "reference")
_OLDEST_TRITON = (3, 6)
_FAILURES = (AttributeError, ImportError, OSError, RuntimeError, TypeError)  # of the import of a broken triton
_backend: ContextVar[str] = ContextVar("backend", default="auto")

logger = logging.get_logger(__name__)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the code of the ops inside of a `with` block.

    Args:
        name: "auto", kernels for tensors on a GPU alone; "reference"; or "kernels", which treats every device like a
            GPU: tensors on the CPU need Triton's interpreter, that is TRITON_INTERPRET=1 before triton is imported.
            What no kernel is enabled for runs on the reference in any case.

    Raises:
        ConceptMapsValueError: unknown name.
    """
    if name not in BACKENDS:
        raise ConceptMapsValueError(f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def _kernels_for(device: torch.device) -> ModuleType | None:
    """The kernel package if tensors on the device are for kernels, and there is one that can be imported."""
    backend = _backend.get()
    if backend == "reference" or (backend == "auto" and device.type != "cuda"):  # "cuda" is ROCm's name, too
        return None
    kernels = _load_kernels()
    return kernels if kernels is not None and _runs(kernels, device) else None


@functools.cache
def _runs(kernels: ModuleType, device: torch.device) -> bool:
    """Whether a kernel can be launched on a device, tried once; if not, a warning says why.

    A compiler that is missing or fails shows at the first launch, which is inside of a user's pipeline.
    """
    try:
        tokens = torch.zeros(1, 1, 16, 32, dtype=torch.float16, device=device)
        kernels.similarity(tokens, tokens, torch.ones(1, 1, device=device), 1.0, "none", None)
    except Exception as error:  # noqa: BLE001  # whatever a compiler raises must not reach the frames
        logger.warning(
            f"Concept maps run on PyTorch alone on {device}, slower than with their Triton kernels, because a kernel "
            f"cannot be launched there ({type(error).__name__}: {str(error)[:200]}). To use the kernels, mend the "
            f"installation of triton; it needs a C compiler and a GPU that it supports."
        )
        return False
    return True


@functools.cache
def _load_kernels() -> ModuleType | None:
    """The kernel package; None, after a warning, where it cannot be imported or triton is missing, old or broken."""
    oldest = ".".join(map(str, _OLDEST_TRITON))
    package, remedy = "triton", f"install triton {oldest} or newer: pip install 'diffusers-concept-maps[kernels]'"
    try:
        triton = importlib.import_module(package)
        version = re.match(r"(\d+)\.(\d+)", triton.__version__)
        if version is not None and tuple(map(int, version.groups())) >= _OLDEST_TRITON:
            package = "concept_map_kernels"
            remedy = f"reinstall diffusers-concept-maps, or try another release of triton than {triton.__version__}"
            return importlib.import_module(package)
        reason = f"triton {triton.__version__} is too old"
    except _FAILURES as error:
        reason = f"{package} cannot be imported ({type(error).__name__}: {error})"
    logger.warning(
        f"Concept maps run on PyTorch alone, slower than with their Triton kernels: {reason}. To use the kernels, "
        f"{remedy}"
    )
    return None


def _register(
    function: Callable[..., Any],
    fake: Callable[..., Any],
    mutates: tuple[str, ...] = (),
    parts: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Make a custom op of a reference function.

    Args:
        function: of the reference; the op has its name and arguments, all of them positional.
        fake: empty tensors like its results.
        mutates: names of the arguments that it writes to.
        parts: the same by ops of which each may have a kernel, where the op itself has none; None is the reference.
    """
    name, home = function.__name__, sys.modules[function.__module__]

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        kernels = _kernels_for(arguments[0].device)
        if kernels is not None and kernels.supports(name, *arguments):
            return getattr(kernels, name)(*arguments)
        if kernels is not None and parts is not None:
            return parts(*arguments)
        return getattr(home, name)(*arguments)

    op = torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=mutates)
    op.register_fake(fake)
    return op


def _fake_argmax(
    image_query: torch.Tensor, concept_key: torch.Tensor, frames: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (*concept_key.shape[:3], frames)
    index = concept_key.new_empty(shape, dtype=torch.int64)
    return index, _floats(index, shape), _floats(index, shape)


def _fake_statistics(image_output: torch.Tensor, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, _, width = image_output.shape
    return _floats(image_output, (rows, heads, frames, width)), _floats(image_output, (rows, heads))


def _fake_matching(
    source_query: torch.Tensor,
    source_key: torch.Tensor,
    target_query: torch.Tensor,
    target_key: torch.Tensor,
    tokens: torch.Tensor,
    head_weights: torch.Tensor,
    frames: int,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (*tokens.shape, frames)
    return tokens.new_empty(shape), _floats(tokens, shape), _floats(tokens, shape), _floats(tokens, (*shape, 2))


def _fake_segments(
    image_query: torch.Tensor,
    tokens: torch.Tensor,
    text_key: torch.Tensor,
    image_key: torch.Tensor,
    text_mask: torch.Tensor | None,
    head_weights: torch.Tensor,
    frames: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*tokens.shape, 1 + frames)
    return _floats(tokens, shape), _floats(tokens, shape)


def _floats(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _map(texts: int, image: torch.Tensor) -> torch.Tensor:
    return _floats(image, (image.shape[0], texts, image.shape[2]))


concept_attention = _register(reference.concept_attention, lambda query, *_: query.new_empty(query.shape))
query_key_argmax = _register(reference.query_key_argmax, _fake_argmax)
gram_columns = _register(reference.gram_columns, lambda output, index, *_: _map(index.shape[2], output))
similarity = _register(reference.similarity, lambda concept, image, *_: _map(concept.shape[2], image))
accumulate_similarity_ = _register(reference.accumulate_similarity_, lambda *_: None, mutates=("total",))
attention_probabilities = _register(
    reference.attention_probabilities, lambda query, key, tokens, *_: _map(tokens.shape[0], query)
)
frame_statistics = _register(reference.frame_statistics, _fake_statistics)
frame_spread = _register(reference.frame_spread, lambda output, mean, frames: _floats(output, mean.shape[:3]))
similarity_and_statistics = _register(
    reference.similarity_and_statistics,
    lambda concept, image, weights, frames: (_map(concept.shape[2], image), *_fake_statistics(image, frames)),
    parts=lambda concept, image, weights, frames: (
        similarity(concept, image, weights, 1.0, "none", None),
        *frame_statistics(image, frames),
    ),
)
temporal_matching = _register(reference_matching.temporal_matching, _fake_matching)
segment_attention = _register(reference_matching.segment_attention, _fake_segments)
