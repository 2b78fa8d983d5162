"""Self-attention among video tokens, in families whose video reads its text by another attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

if TYPE_CHECKING:
    from diffusers_concept_maps.compiled import Relay
    from diffusers_concept_maps.listener import PassListener


def attend_video(
    listener: PassListener[Any] | Relay,
    attn: Any,
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    attend: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Attention output of video tokens `[batch, S, H, D]`, shown to who listens, or what that puts in its place.

    Args:
        listener: who is to be told of the call.
        attn: the attention module.
        heads: query, key and value `[batch, S, H, D]`, after norms and rotary embedding.
        mask: see `PassListener.restrict`.
        attend: the stock attention of these three.
    """
    query, key, value = (tensor.transpose(1, 2) for tensor in heads)
    text, image = slice(0, 0), slice(0, None)
    if listener.restricts:
        output = listener.restrict(query, key, value, text=text, image=image, mask=mask).transpose(1, 2)
    else:
        output = attend(*heads)
    listener.observe(attn, query, key, value, output.transpose(1, 2), text=text, image=image, mask=mask)
    return output


def dispatch(
    processor: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    splits: bool = True,
) -> torch.Tensor:
    """The host's attention `[batch, N, H, D]` with the backend and the context parallelism that a processor was told.

    Args:
        processor: with `_attention_backend` and `_parallel_config`.
        query: `[batch, N, H, D]`.
        key: `[batch, T, H, D]`.
        value: likewise.
        mask: as the host takes it.
        splits: context parallelism applies to this attention.
    """
    return cast(
        torch.Tensor,
        dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
            backend=processor._attention_backend,
            parallel_config=processor._parallel_config if splits else None,
        ),
    )


def rotate_pairs(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Neighboring channels of `[batch, S, H, D]`, turned by angles that both of a pair have `[1, S, 1, D]`."""
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosines[..., 0::2], sines[..., 1::2]
    turned = (first * cosine - second * sine, first * sine + second * cosine)
    return torch.stack(turned, dim=-1).flatten(-2).type_as(states)
