"""The ops as short PyTorch: the specification, the path of every device without a kernel, and the kernels' oracle.

Notation of the shape comments: R recorded rows of the batch, H heads, C concepts, N image tokens in F frames of P,
D head width. Scores are float32 whatever the model's dtype; nothing of shape `[H, C, N]` is ever stored, heads are
taken one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

SILHOUETTE_TOKENS = 5000
SILHOUETTE_SEED = 0
_EPSILON = 1e-6  # keeps a constant map at zero when it is standardized
_NO_SPREAD = 1e-10  # of squares: a spread 100,000 times smaller than the other one is rounding
_CHUNK = 512  # rows of the pairwise distances that exist at a time


@dataclass(frozen=True)
class Axis:
    """The axis along which the map of a head `[R, C, N]` is standardized.

    Attributes:
        name: "clip", over all tokens (population deviation); "text", over the C rows (unbiased deviation); or "none".
        multiplicity: `[C]`, how many equal rows of the text axis each row stands for; None is one each.
    """

    name: str
    multiplicity: torch.Tensor | None

    def standardized(self, scores: torch.Tensor) -> torch.Tensor:
        """`(scores - mean) / (deviation + 1e-6)` along the axis."""
        if self.name == "none":
            return scores
        if self.name == "clip":
            deviation, mean = torch.std_mean(scores, dim=-1, keepdim=True, correction=0)
        else:
            count = scores.new_ones(scores.shape[1]) if self.multiplicity is None else self.multiplicity
            weight = count[:, None] / count.sum()
            mean = (scores * weight).sum(1, keepdim=True)
            variance = ((scores - mean).square() * weight).sum(1, keepdim=True)
            deviation = (variance * count.sum() / (count.sum() - 1)).sqrt()
        return (scores - mean) / (deviation + _EPSILON)


def concept_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    image_key: torch.Tensor,
    image_value: torch.Tensor,
    multiplicity: torch.Tensor | None,
) -> torch.Tensor:
    """`softmax(query [key; image_key]^T / sqrt(D)) [value; image_value]`: concepts read concepts and image."""
    keys = torch.cat([key, image_key], dim=2)  # [R, H, C + N, D]
    values = torch.cat([value, image_value], dim=2)
    bias = None
    if multiplicity is not None:  # a key that stands for m equal ones has m times their weight
        bias = query.new_zeros(keys.shape[2])
        bias[: key.shape[2]] = multiplicity.log()
        bias = bias.expand(query.shape[2], -1)
    return functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias)  # [R, H, C, D]


def output_similarity(
    concept_output: torch.Tensor, image_output: torch.Tensor, head_weights: torch.Tensor, axis: Axis
) -> torch.Tensor:
    """`sum_h w_h <concept_output_h, image_output_h>` for every concept and token `[R, C, N]`."""

    def score(head: int) -> torch.Tensor:
        return torch.matmul(concept_output[:, head].float(), image_output[:, head].float().mT)

    return _weigh_heads(score, head_weights, axis)


def query_key_similarity(
    image_query: torch.Tensor, concept_key: torch.Tensor, head_weights: torch.Tensor, axis: Axis
) -> torch.Tensor:
    """`sum_h w_h <concept_key_h, image_query_h> / sqrt(D)` for every concept and token `[R, C, N]`."""
    scale = image_query.shape[-1] ** -0.5

    def score(head: int) -> torch.Tensor:
        return torch.matmul(concept_key[:, head].float() * scale, image_query[:, head].float().mT)

    return _weigh_heads(score, head_weights, axis)


def gram_columns(
    image_query: torch.Tensor,
    concept_key: torch.Tensor,
    image_output: torch.Tensor,
    head_weights: torch.Tensor,
    frames: int,
    axis: Axis,
) -> torch.Tensor:
    """`sum_h w_h <X_h[f, a], X_h[f, p]>` with `a = argmax_p <q_h[f, p], k_h>`, per concept and token `[R, C, N]`."""

    def score(head: int) -> torch.Tensor:
        query = image_query[:, head].float().unflatten(1, (frames, -1))  # [R, F, P, D]
        feature = image_output[:, head].float().unflatten(1, (frames, -1))
        key = concept_key[:, head, None].float()  # [R, 1, C, D]
        anchor = (key @ query.mT).argmax(-1)  # [R, F, C], the lowest index on ties
        column = feature.gather(2, anchor[..., None].expand(-1, -1, -1, feature.shape[-1]))  # [R, F, C, D]
        if axis.name == "text":
            # A z-score does not change with a shift: texts of equal anchors get exactly 0, not magnified rounding.
            column = column - column[:, :, -1:]
        return torch.matmul(column, feature.mT).transpose(1, 2).flatten(2)

    return _weigh_heads(score, head_weights, axis)


@dataclass(frozen=True)
class FrameStatistics:
    """What one read of the features of every head tells about the frames as clusters.

    Attributes:
        mean: `[R, H, F, D]`, mean feature of every frame, relative to the mean of the clip.
        within: `[R, H]`, squared distances of the tokens to the mean of their frame, summed over all N tokens.
        tokens: N.
    """

    mean: torch.Tensor
    within: torch.Tensor
    tokens: int

    @property
    def between(self) -> torch.Tensor:
        """Squared distances of the frame means to the mean of the clip, summed over all N tokens `[R, H]`."""
        return self.mean.square().sum((2, 3)) * (self.tokens // self.mean.shape[2])

    @property
    def separable(self) -> torch.Tensor:
        """Bool `[R, H]`: there is spread within the frames and between them, and no NaN."""
        ratio = self.between / self.within
        return (ratio > _NO_SPREAD) & (ratio < 1 / _NO_SPREAD)


def frame_statistics(image_output: torch.Tensor, frames: int) -> FrameStatistics:
    """The statistics of the features `[R, H, N, D]` of every head."""
    means, withins = [], []
    for head in image_output.unbind(1):
        feature = _centered(head, frames)
        means.append(feature.mean(2))
        withins.append((feature - means[-1][:, :, None]).square().sum((1, 2, 3)))
    return FrameStatistics(torch.stack(means, 1), torch.stack(withins, 1), image_output.shape[2])


def calinski_harabasz(statistics: FrameStatistics) -> torch.Tensor:
    """`[between / (F - 1)] / [within / (N - F)]` of every head `[R, H]`; 1.0 without spread within the frames."""
    frames = statistics.mean.shape[2]
    index = statistics.between / statistics.within * ((statistics.tokens - frames) / (frames - 1))
    return torch.where(statistics.within == 0, 1.0, index)


def fisher(statistics: FrameStatistics) -> torch.Tensor:
    """`between / (within + 1e-12)` of every head `[R, H]`."""
    return statistics.between / (statistics.within + 1e-12)


def davies_bouldin(image_output: torch.Tensor, statistics: FrameStatistics) -> torch.Tensor:
    """`mean_f max_g (s_f + s_g) / |m_f - m_g|` of every head `[R, H]`, s_f the mean distance of the tokens to m_f.

    Frames with the same mean are not compared; 0.0 where no two frames differ.
    """
    mean, frames = statistics.mean, statistics.mean.shape[2]
    spreads = []
    for index, head in enumerate(image_output.unbind(1)):
        deviation = _centered(head, frames) - mean[:, index, :, None]
        spreads.append(torch.linalg.vector_norm(deviation, dim=-1).mean(-1))
    spread = torch.stack(spreads, 1)  # [R, H, F]
    distance = _distances(mean, mean)  # [R, H, F, F]
    ratio = (spread[..., None] + spread[..., None, :]) / distance.masked_fill(distance == 0, torch.inf)
    return ratio.amax(-1).mean(-1)


def silhouette(image_output: torch.Tensor, frames: int) -> torch.Tensor:
    """Mean over the tokens of `(b - a) / max(a, b)` of every head `[R, H]`.

    a is the mean distance of a token to the other tokens of its frame, b the least mean distance to those of another
    frame. The only token of a frame scores 0. Of more than 5000 tokens a sample speaks for all.
    """
    tokens = _sampled_tokens(image_output.shape[2], image_output.device)
    own = tokens[:, None] // (image_output.shape[2] // frames)  # [S, 1], the frame of every token
    member = (own == torch.arange(frames, device=own.device)).float()  # [S, F]
    scores = [_silhouette_sum(head[:, tokens].float(), own, member) for head in image_output.unbind(1)]
    return torch.stack(scores, 1) / len(tokens)


def _silhouette_sum(feature: torch.Tensor, own: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """Sum of the silhouettes of the tokens of one head, `[R, S, D]` to `[R]`."""
    count = member.sum(0)  # [F]
    total = feature.new_zeros(len(feature))
    for part, frame in zip(feature.split(_CHUNK, 1), own.split(_CHUNK), strict=True):
        summed = _distances(part, feature) @ member  # [R, chunk, F]
        frame = frame.expand(len(feature), -1, -1)
        others = count[frame] - 1
        a = summed.gather(2, frame) / others
        b = (summed / count).masked_fill(count == 0, torch.inf).scatter(2, frame, torch.inf).amin(2, keepdim=True)
        largest = torch.maximum(a, b)
        total += torch.where((others == 0) | (largest == 0), 0.0, (b - a) / largest).sum((1, 2))
    return total


def _sampled_tokens(count: int, device: torch.device) -> torch.Tensor:
    """Indices of all tokens, or of 5000 random ones `[S]`: the same ones in every head, layer and step."""
    if count <= SILHOUETTE_TOKENS:
        return torch.arange(count, device=device)
    drawn = torch.from_numpy(np.random.RandomState(SILHOUETTE_SEED).permutation(count)[:SILHOUETTE_TOKENS])
    return drawn.to(device, non_blocking=True)  # a blocking copy would wait for the device


def _centered(head: torch.Tensor, frames: int) -> torch.Tensor:
    """Features of one head less their mean `[R, F, P, D]`; an offset that all share would cost the sums their digits.

    The first token goes first: it leaves no rounding error where all tokens are equal.
    """
    feature = head.float() - head[:, :1].float()
    feature = feature - feature.mean(1, keepdim=True)
    return feature.view(len(feature), frames, -1, feature.shape[-1])


def _distances(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Euclidean distances from differences: the expansion by dot products cancels where features share an offset."""
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")


def _weigh_heads(score: Callable[[int], torch.Tensor], head_weights: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum `score(head)`, standardized where asked for, over the heads."""
    total: torch.Tensor | None = None
    for head in range(head_weights.shape[1]):
        map_of_head = axis.standardized(score(head)) * head_weights[:, head, None, None]
        total = map_of_head if total is None else total.add_(map_of_head)
    assert total is not None  # a model has at least one head
    return total
