"""The ops as short PyTorch: the specification, the path of every device without a kernel, and the kernels' oracle.

Notation of the shape comments: R recorded rows of the batch, H heads, C concepts, N image tokens in F frames of P,
D head width. Scores are float32 whatever the model's dtype; nothing of shape `[H, C, N]` is ever stored, heads are
taken one at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

_EPSILON = 1e-6  # keeps a constant map at zero when it is standardized


def concept_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, image_key: torch.Tensor, image_value: torch.Tensor
) -> torch.Tensor:
    """`softmax(query [key; image_key]^T / sqrt(D)) [value; image_value]`: concepts read concepts and image."""
    keys = torch.cat([key, image_key], dim=2)  # [R, H, C + N, D]
    values = torch.cat([value, image_value], dim=2)
    return functional.scaled_dot_product_attention(query, keys, values)  # [R, H, C, D]


def output_similarity(
    concept_output: torch.Tensor, image_output: torch.Tensor, head_weights: torch.Tensor, standardize: bool
) -> torch.Tensor:
    """`sum_h w_h <concept_output_h, image_output_h>` for every concept and token `[R, C, N]`."""

    def score(head: int) -> torch.Tensor:
        return torch.matmul(concept_output[:, head].float(), image_output[:, head].float().mT)

    return _weigh_heads(score, head_weights, standardize)


def query_key_similarity(
    image_query: torch.Tensor, concept_key: torch.Tensor, head_weights: torch.Tensor, standardize: bool
) -> torch.Tensor:
    """`sum_h w_h <concept_key_h, image_query_h> / sqrt(D)` for every concept and token `[R, C, N]`."""
    scale = image_query.shape[-1] ** -0.5

    def score(head: int) -> torch.Tensor:
        return torch.matmul(concept_key[:, head].float() * scale, image_query[:, head].float().mT)

    return _weigh_heads(score, head_weights, standardize)


def gram_columns(
    image_query: torch.Tensor,
    concept_key: torch.Tensor,
    image_output: torch.Tensor,
    head_weights: torch.Tensor,
    frames: int,
    standardize: bool,
) -> torch.Tensor:
    """`sum_h w_h <X_h[f, a], X_h[f, p]>` with `a = argmax_p <q_h[f, p], k_h>`, per concept and token `[R, C, N]`."""

    def score(head: int) -> torch.Tensor:
        query = image_query[:, head].float().unflatten(1, (frames, -1))  # [R, F, P, D]
        feature = image_output[:, head].float().unflatten(1, (frames, -1))
        key = concept_key[:, head, None].float()  # [R, 1, C, D]
        anchor = (key @ query.mT).argmax(-1)  # [R, F, C], the lowest index on ties
        column = feature.gather(2, anchor[..., None].expand(-1, -1, -1, feature.shape[-1]))  # [R, F, C, D]
        return torch.matmul(column, feature.mT).transpose(1, 2).flatten(2)

    return _weigh_heads(score, head_weights, standardize)


def frame_separability(image_output: torch.Tensor, frames: int) -> torch.Tensor:
    """Calinski-Harabasz index of every head with the frames as clusters `[R, H]`.

    `[P sum_f |m_f - m|^2 / (F - 1)] / [sum_fp |x_fp - m_f|^2 / (N - F)]`; 1.0 where the features of every frame are
    all equal, as scikit-learn defines it.
    """
    scores = []
    for head in image_output.unbind(1):
        feature = head.float().unflatten(1, (frames, -1))  # [R, F, P, D]
        frame_mean = feature.mean(2, keepdim=True)
        mean = frame_mean.mean(1, keepdim=True)
        tokens = feature.shape[2]
        between = (frame_mean - mean).square().sum((1, 2, 3)) * tokens / (frames - 1)
        within = (feature - frame_mean).square().sum((1, 2, 3)) / (frames * tokens - frames)
        scores.append(torch.where(within > 0, between / within, 1.0))
    return torch.stack(scores, dim=1)


def _weigh_heads(score: Callable[[int], torch.Tensor], head_weights: torch.Tensor, standardize: bool) -> torch.Tensor:
    """Sum `score(head)` over the heads; standardized scores have mean 0 and deviation 1 over the clip's tokens."""
    total: torch.Tensor | None = None
    for head in range(head_weights.shape[1]):
        map_of_head = score(head)
        if standardize:
            deviation, mean = torch.std_mean(map_of_head, dim=-1, keepdim=True, correction=0)
            map_of_head = (map_of_head - mean) / (deviation + _EPSILON)
        map_of_head = map_of_head * head_weights[:, head, None, None]
        total = map_of_head if total is None else total.add_(map_of_head)
    assert total is not None  # a model has at least one head
    return total
