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
_CHUNK = 512  # rows of a matrix of all pairs of tokens that exist at a time


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
    return functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias).contiguous()  # [R, H, C, D]


def query_key_argmax(
    image_query: torch.Tensor, concept_key: torch.Tensor, frames: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per frame, the token whose query best matches the key, all `[R, H, C, F]`.

    Its place in the frame (the lowest on ties), its logit `q k / sqrt(D)`, and by how much it leads the runner-up.
    """
    scale = image_query.shape[-1] ** -0.5
    matches = []
    for head in range(image_query.shape[1]):
        query = image_query[:, head].float().unflatten(1, (frames, -1))  # [R, F, P, D]
        logits = (concept_key[:, head, None].float() @ query.mT).transpose(1, 2)  # [R, C, F, P]
        index = logits.argmax(-1, keepdim=True)
        best = logits.gather(-1, index)
        runner_up = logits.scatter(-1, index, -torch.inf).amax(-1, keepdim=True)
        matches.append((index[..., 0], best[..., 0] * scale, (best - runner_up)[..., 0] * scale))
    index, value, gap = (torch.stack(heads, 1) for heads in zip(*matches, strict=True))
    return index, value, gap


def gram_columns(
    image_output: torch.Tensor,
    index: torch.Tensor,
    head_weights: torch.Tensor,
    standardize: str,
    multiplicity: torch.Tensor | None,
) -> torch.Tensor:
    """`sum_h w_h <X_h[f, index_h], X_h[f, p]>` for every text row and token `[R, C, N]`; index is `[R, H, C, F]`."""
    frames = index.shape[3]

    def score(head: int) -> torch.Tensor:
        feature = image_output[:, head].float().unflatten(1, (frames, -1))  # [R, F, P, D]
        anchor = index[:, head].mT[..., None]  # [R, F, C, 1]
        column = feature.gather(2, anchor.expand(-1, -1, -1, feature.shape[-1]))  # [R, F, C, D]
        if standardize == "text":
            # A z-score does not change with a shift: texts of equal anchors get exactly 0, not magnified rounding.
            column = column - column[:, :, -1:]
        return torch.matmul(column, feature.mT).transpose(1, 2).flatten(2)

    return _weigh_heads(score, head_weights, standardize, multiplicity)


def similarity(
    concept: torch.Tensor,
    image: torch.Tensor,
    head_weights: torch.Tensor,
    scale: float,
    standardize: str,
    multiplicity: torch.Tensor | None,
) -> torch.Tensor:
    """`sum_h w_h scale <concept_h, image_h>` for every text row and token `[R, C, N]`."""

    def score(head: int) -> torch.Tensor:
        return torch.matmul(concept[:, head].float() * scale, image[:, head].float().mT)

    return _weigh_heads(score, head_weights, standardize, multiplicity)


def accumulate_similarity_(
    total: torch.Tensor, concept: torch.Tensor, image: torch.Tensor, head_weights: torch.Tensor, scale: float
) -> None:
    """Add `similarity` to `total` `[R, C, N]`."""
    total.add_(similarity(concept, image, head_weights, scale, "none", None))


def attention_probabilities(
    image_query: torch.Tensor,
    text_key: torch.Tensor,
    tokens: torch.Tensor,
    head_weights: torch.Tensor,
    image_key: torch.Tensor | None,
) -> torch.Tensor:
    """`sum_h w_h` times the probability that an image query gives to text key `tokens[c]`, `[R, C, N]`.

    The softmax is over the text keys, followed by the image keys where those are given.
    """
    scale = image_query.shape[-1] ** -0.5

    def score(head: int) -> torch.Tensor:
        keys = text_key[:, head] if image_key is None else torch.cat([text_key[:, head], image_key[:, head]], 1)
        queries = image_query[:, head].float() * scale
        parts = [torch.matmul(part, keys.float().mT).softmax(-1)[..., tokens] for part in queries.split(_CHUNK, 1)]
        return torch.cat(parts, 1).mT.contiguous()  # [R, C, N]

    return _weigh_heads(score, head_weights, "none", None)


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


def frame_statistics(image_output: torch.Tensor, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`mean` and `within` of `FrameStatistics` for the features `[R, H, N, D]` of every head."""
    means, withins = [], []
    for head in image_output.unbind(1):
        feature = _centered(head, frames)
        means.append(feature.mean(2))
        withins.append((feature - means[-1][:, :, None]).square().sum((1, 2, 3)))
    return torch.stack(means, 1), torch.stack(withins, 1)


def frame_spread(image_output: torch.Tensor, mean: torch.Tensor, frames: int) -> torch.Tensor:
    """Mean distance of the tokens of every frame to their mean, the `mean` of `frame_statistics`, `[R, H, F]`."""
    spreads = []
    for index, head in enumerate(image_output.unbind(1)):
        deviation = _centered(head, frames) - mean[:, index, :, None]
        spreads.append(torch.linalg.vector_norm(deviation, dim=-1).mean(-1))
    return torch.stack(spreads, 1)


def similarity_and_statistics(
    concept_output: torch.Tensor, image_output: torch.Tensor, head_weights: torch.Tensor, frames: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`similarity`, neither scaled nor standardized, and the two results of `frame_statistics`."""
    scores = similarity(concept_output, image_output, head_weights, 1.0, "none", None)
    return scores, *frame_statistics(image_output, frames)


def calinski_harabasz(statistics: FrameStatistics) -> torch.Tensor:
    """`[between / (F - 1)] / [within / (N - F)]` of every head `[R, H]`; 1.0 without spread within the frames."""
    frames = statistics.mean.shape[2]
    index = statistics.between / statistics.within * ((statistics.tokens - frames) / (frames - 1))
    return torch.where(statistics.within == 0, 1.0, index)


def fisher(statistics: FrameStatistics) -> torch.Tensor:
    """`between / (within + 1e-12)` of every head `[R, H]`."""
    return statistics.between / (statistics.within + 1e-12)


def davies_bouldin(statistics: FrameStatistics, spread: torch.Tensor) -> torch.Tensor:
    """`mean_f max_g (s_f + s_g) / |m_f - m_g|` of every head `[R, H]`, s the `frame_spread` `[R, H, F]`.

    Frames with the same mean are not compared; 0.0 where no two frames differ.
    """
    distance = _distances(statistics.mean, statistics.mean)  # [R, H, F, F]
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


def _weigh_heads(
    score: Callable[[int], torch.Tensor],
    head_weights: torch.Tensor,
    standardize: str,
    multiplicity: torch.Tensor | None,
) -> torch.Tensor:
    """Sum `score(head)` `[R, C, N]`, standardized where asked for, over the heads.

    A head of weight 0 is left out, NaN or not.
    """
    total: torch.Tensor | None = None
    for head in range(head_weights.shape[1]):
        weight = head_weights[:, head, None, None]
        map_of_head = _standardized(score(head), standardize, multiplicity) * weight
        map_of_head.masked_fill_(weight == 0, 0.0)
        total = map_of_head if total is None else total.add_(map_of_head)
    assert total is not None  # a model has at least one head
    return total


def _standardized(scores: torch.Tensor, standardize: str, multiplicity: torch.Tensor | None) -> torch.Tensor:
    """`(scores - mean) / (deviation + 1e-6)` of the map of a head `[R, C, N]`, or the map as it is for "none".

    "clip" is over all tokens (population deviation); "text" is over the C rows (unbiased deviation), each of which
    stands for `multiplicity` equal ones.
    """
    if standardize == "none":
        return scores
    if standardize == "clip":
        deviation, mean = torch.std_mean(scores, dim=-1, keepdim=True, correction=0)
    else:
        count = scores.new_ones(scores.shape[1]) if multiplicity is None else multiplicity
        weight = count[:, None] / count.sum()
        mean = (scores * weight).sum(1, keepdim=True)
        variance = ((scores - mean).square() * weight).sum(1, keepdim=True)
        deviation = (variance * count.sum() / (count.sum() - 1)).sqrt()
    return (scores - mean) / (deviation + _EPSILON)
