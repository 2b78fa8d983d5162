"""Attention over `[text | image | concept]` in which concepts read the image and themselves, and nothing reads them.

One call of a backend that can express this, by giving every group of queries a range of keys of its own; else two
calls of PyTorch's attention on slices, since both groups of keys are contiguous in this order. Neither needs a mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.utils import logging
from torch.nn import functional

logger = logging.get_logger(__name__)

_FLASH = ("flash", "flash_hub", "flash_varlen", "flash_varlen_hub", "_native_flash")
"""The attention backends of diffusers that are FlashAttention 2, as PyTorch's varlen attention is."""
_HOMES = ("xformers.ops.fmha", "mslk.attention.fmha")
_unable: set[tuple[str, torch.device, torch.dtype, int]] = set()


class Layout(NamedTuple):
    """Numbers of tokens of a sequence `[text | image | concept]`."""

    text: int
    image: int
    concepts: int

    @property
    def main(self) -> int:
        """Text and image tokens, which attend to each other as if there were no concepts."""
        return self.text + self.image


def one_directional_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    *,
    mask: torch.Tensor | None = None,
    reads: str = "both",
    multiplicity: torch.Tensor | None = None,
) -> torch.Tensor:
    """Main attention of text and image, and concept attention (ConceptAttention, arXiv 2502.04320), out of one buffer.

    The one call is made where diffusers' active attention backend (`set_attention_backend`) can express it and the
    arguments below have their defaults; without a choice of the user both calls go to PyTorch's own attention.

    Args:
        query: `[B, H, S, D]` in the order of `layout`.
        key: likewise.
        value: likewise.
        layout: numbers of tokens.
        mask: of the main attention, as `scaled_dot_product_attention` takes it, over text and image alone.
        reads: what concepts attend to: "both", "image", "concepts" or "none" (each keeps its own value).
        multiplicity: float `[C]`, how many equal concepts each concept key stands for; None is one each.

    Returns:
        Outputs before the output projection `[B, H, S, D]`.
    """
    plain = mask is None and multiplicity is None and reads == "both" and query.dtype == key.dtype == value.dtype
    # None of the backends has a backward pass for ranges of keys that overlap.
    if plain and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)):
        output = _one_call(query, key, value, layout)
        if output is not None:
            return output
    main, own = slice(0, layout.main), slice(layout.main, None)
    attention = functional.scaled_dot_product_attention
    outputs = [attention(query[:, :, main], key[:, :, main], value[:, :, main], attn_mask=mask)]
    if reads == "none":
        outputs.append(value[:, :, own])
    else:
        seen = {"both": slice(layout.text, None), "image": slice(layout.text, layout.main), "concepts": own}[reads]
        bias = None
        if multiplicity is not None and reads != "image":  # a key for m equal ones has m times their weight
            bias = query.new_zeros(layout.concepts, key[:, :, seen].shape[2])
            bias[:, -layout.concepts :] = multiplicity.log()
        outputs.append(attention(query[:, :, own], key[:, :, seen], value[:, :, seen], attn_mask=bias))
    # Joined token by token: the output projection then reads them without a copy of its own.
    return torch.cat([output.transpose(1, 2) for output in outputs], 1).transpose(1, 2)


def key_ranges(layout: Layout, batch: int) -> tuple[list[int], list[int], list[int]]:
    """The groups of queries of a whole batch, packed into one sequence, and the range of keys that each one reads.

    Args:
        layout: of each row of the batch.
        batch: number of rows.

    Returns:
        Lengths of the groups of queries, main and concepts of row after row; where the keys of each group start, with
        the end of the sequence as last entry; and their number. The ranges overlap: both have the image.
    """
    starts = [row * sum(layout) + start for row in range(batch) for start in (0, layout.text)]
    return (
        [layout.main, layout.concepts] * batch,
        [*starts, batch * sum(layout)],
        [layout.main, layout.image + layout.concepts] * batch,
    )


@lru_cache(maxsize=8)  # made once per shape, because a copy from the host makes the device wait
def gappy_keys_mask(layout: Layout, batch: int, device: torch.device) -> Any:
    """The ranges as `BlockDiagonalGappyKeysMask`, for xformers' `memory_efficient_attention`.

    Raises:
        NotImplementedError: neither of its homes can be imported.
    """
    queries, starts, lengths = key_ranges(layout, batch)
    return _fmha().attn_bias.BlockDiagonalGappyKeysMask.from_seqlens(queries, starts, lengths, device=device)


@lru_cache(maxsize=8)
def varlen_arguments(layout: Layout, batch: int, device: torch.device) -> dict[str, Any]:
    """The ranges as arguments of `torch.nn.attention.varlen.varlen_attn`."""
    queries, starts, lengths = key_ranges(layout, batch)
    bounds = [sum(queries[:index]) for index in range(len(queries) + 1)]

    def on_device(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    return {
        "cu_seq_q": on_device(bounds),
        "cu_seq_k": on_device(starts),
        "max_q": max(queries),
        "max_k": max(lengths),
        "seqused_k": on_device(lengths),
    }


def _one_call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout) -> torch.Tensor | None:
    """All outputs by one call of the active backend; None where it cannot express it, which is said once."""
    backend = str(_AttentionBackendRegistry.get_active_backend()[0].value)
    call = _xformers_call if backend == "xformers" else _varlen_call if backend in _FLASH else None
    situation = (backend, query.device, query.dtype, query.shape[-1])
    if call is None or situation in _unable:
        return None
    try:
        packed = call(_packed(query), _packed(key), _packed(value), layout, len(query))
    except NotImplementedError as error:
        _unable.add(situation)
        logger.warning(
            f"The attention backend {backend!r} cannot take concepts and image in one call on {query.device} in "
            f"{query.dtype} with heads of width {query.shape[-1]}, so that PyTorch's own attention is called for "
            f"each: {error}"
        )
        return None
    output: torch.Tensor = torch.unflatten(packed, 0, (len(query), -1))
    return output.transpose(1, 2)


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """`[B, H, S, D]` as one sequence `[B * S, H, D]`."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _xformers_call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, batch: int
) -> torch.Tensor:
    """Of packed `[B * S, H, D]`, by `memory_efficient_attention`."""
    mask = gappy_keys_mask(layout, batch, query.device)
    output: torch.Tensor = _fmha().memory_efficient_attention(query[None], key[None], value[None], attn_bias=mask)
    return output[0]


def _varlen_call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, batch: int
) -> torch.Tensor:
    """Of packed `[B * S, H, D]`, by `varlen_attn`."""
    _expect_flash(query.device, query.dtype, query.shape[-1])
    output: torch.Tensor = _varlen_attn()(query, key, value, **varlen_arguments(layout, batch, query.device))
    return output


def _expect_flash(device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Refuse what FlashAttention would: its RuntimeError could as well be a lack of memory, so it is not caught."""
    if dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError("FlashAttention takes float16 and bfloat16")
    if width % 8 or width > 256:
        raise NotImplementedError("FlashAttention takes heads of a width up to 256 that 8 divides")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise NotImplementedError("FlashAttention needs a GPU of compute capability 8.0 or newer")


@cache
def _fmha() -> Any:
    """The module with `memory_efficient_attention` and its masks, which has moved from xformers to MSLK."""
    for home in _HOMES:
        try:
            return import_module(home)
        except ImportError as error:
            logger.info(f"{home}: {error}")
    raise NotImplementedError(f"none of {', '.join(_HOMES)} can be imported")


@cache
def _varlen_attn() -> Callable[..., Any]:
    """PyTorch's `varlen_attn`, if this version can be told how many keys of a range are used."""
    try:
        function: Callable[..., Any] = import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError as error:
        raise NotImplementedError(f"torch {torch.__version__} has no varlen_attn") from error
    if "seqused_k" not in inspect.signature(function).parameters:
        raise NotImplementedError(f"varlen_attn of torch {torch.__version__} has no seqused_k")
    return function
