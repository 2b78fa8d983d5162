"""Every operation in float64, straight from its definition, and how far a result may be from it.

Heads are taken one at a time where an array of all pairs of tokens is needed. Shapes are those of `kernel_inputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

EPSILON = 1e-6
CHUNK = 1024  # queries of an attention matrix that exist at a time


def concept_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    image_key: torch.Tensor,
    image_value: torch.Tensor,
    multiplicity: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Softmax attention in which key c counts `multiplicity[c]` times."""
    keys, values = torch.cat([key, image_key], 2).double(), torch.cat([value, image_value], 2).double()
    weight = (query.double() @ keys.mT * query.shape[3] ** -0.5).softmax(-1)
    if multiplicity is not None:
        weight[..., : key.shape[2]] *= multiplicity
        weight /= weight.sum(-1, keepdim=True)
    return (weight @ values,)


def query_key_argmax(image_query: torch.Tensor, concept_key: torch.Tensor, frames: int) -> tuple[torch.Tensor, ...]:
    """The two largest logits of every frame."""
    logits = concept_key.double() @ image_query.double().mT * image_query.shape[3] ** -0.5
    best = logits.unflatten(3, (frames, -1)).topk(2, dim=-1)
    return best.indices[..., 0], best.values[..., 0], best.values[..., 0] - best.values[..., 1]


def _weighted(maps: Iterator[torch.Tensor], weights: torch.Tensor, **axis: Any) -> torch.Tensor:
    """Sum of `[R, C, N]` of every head, standardized."""
    return sum((_standardized(one, **axis) * weights[:, h, None, None] for h, one in enumerate(maps)), start=0.0)


def _standardized(scores: torch.Tensor, standardize: str, multiplicity: torch.Tensor | None) -> torch.Tensor:
    if standardize == "none":
        return scores
    if standardize == "clip":
        return (scores - scores.mean(-1, keepdim=True)) / (scores.std(-1, correction=0, keepdim=True) + EPSILON)
    counts = [1] * scores.shape[1] if multiplicity is None else [int(count) for count in multiplicity]
    rows = scores.repeat_interleave(torch.tensor(counts, device=scores.device), 1)  # every row as often as it counts
    return (scores - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + EPSILON)


def gram_columns(
    image_output: torch.Tensor,
    index: torch.Tensor,
    head_weights: torch.Tensor,
    standardize: str,
    multiplicity: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Columns of the Gram matrix of every frame."""
    frames = index.shape[3]

    def columns() -> Iterator[torch.Tensor]:
        for head in range(image_output.shape[1]):
            feature = image_output[:, head].double().unflatten(1, (frames, -1))
            anchors = index[:, head].transpose(1, 2)  # [R, F, C]
            picked = torch.take_along_dim(feature, anchors[..., None], 2)
            yield torch.einsum("rfcd,rfpd->rcfp", picked, feature).flatten(2)

    return (_weighted(columns(), head_weights, standardize=standardize, multiplicity=multiplicity),)


def similarity(
    concept: torch.Tensor,
    image: torch.Tensor,
    head_weights: torch.Tensor,
    scale: float,
    standardize: str,
    multiplicity: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Dot products."""
    maps = (concept[:, h].double() @ image[:, h].double().mT * scale for h in range(image.shape[1]))
    return (_weighted(maps, head_weights, standardize=standardize, multiplicity=multiplicity),)


def accumulate_similarity_(
    total: torch.Tensor, concept: torch.Tensor, image: torch.Tensor, head_weights: torch.Tensor, scale: float
) -> tuple[torch.Tensor, ...]:
    """The sum that `total` becomes."""
    return (total + similarity(concept, image, head_weights, scale, "none", None)[0],)


def frame_statistics(image_output: torch.Tensor, frames: int) -> tuple[torch.Tensor, ...]:
    """Means of the frames less that of the clip, and squared distances to them."""
    feature = image_output.double().unflatten(2, (frames, -1))
    mean = feature.mean(3)
    return mean - mean.mean(2, keepdim=True), (feature - mean[..., None, :]).square().sum((2, 3, 4))


def frame_spread(image_output: torch.Tensor, mean: torch.Tensor, frames: int) -> tuple[torch.Tensor, ...]:
    """Mean distance to a mean that is relative to that of the clip."""
    feature = image_output.double()
    feature = (feature - feature.mean(2, keepdim=True)).unflatten(2, (frames, -1))
    return ((feature - mean[..., None, :].double()).norm(dim=-1).mean(-1),)


def similarity_and_statistics(
    concept_output: torch.Tensor, image_output: torch.Tensor, head_weights: torch.Tensor, frames: int
) -> tuple[torch.Tensor, ...]:
    """Both."""
    scores = similarity(concept_output, image_output, head_weights, 1.0, "none", None)
    return *scores, *frame_statistics(image_output, frames)


def attention_probabilities(
    image_query: torch.Tensor,
    text_key: torch.Tensor,
    tokens: torch.Tensor,
    head_weights: torch.Tensor,
    image_key: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Columns of the attention matrix."""
    keys = text_key if image_key is None else torch.cat([text_key, image_key], 2)

    def probabilities() -> Iterator[torch.Tensor]:
        for head in range(image_query.shape[1]):
            key = keys[:, head].double().mT * image_query.shape[3] ** -0.5
            parts = image_query[:, head].double().split(CHUNK, 1)
            yield torch.cat([(part @ key).softmax(-1)[..., tokens] for part in parts], 1).mT

    return (_weighted(probabilities(), head_weights, standardize="none", multiplicity=None),)


def temporal_matching(
    source_query: torch.Tensor,
    source_key: torch.Tensor,
    target_query: torch.Tensor,
    target_key: torch.Tensor,
    tokens: torch.Tensor,
    head_weights: torch.Tensor,
    frames: int,
    width: int,
    scale: float,
    direction: str,
    radius: int,
) -> tuple[torch.Tensor, ...]:
    """Matches by the weights `[R, Q, F, P]`, which exist here."""
    total: Any = 0.0
    for head in range(head_weights.shape[1]):
        sq, sk, tq, tk = (x[:, head].double() for x in (source_query, source_key, target_query, target_key))
        forward = (sq @ tk.mT * scale).unflatten(2, (frames, -1)).softmax(-1)  # [R, S, F, P]
        backward = (sk @ tq.mT * scale).softmax(1).unflatten(2, (frames, -1))  # over the source keys
        weight = {"forward": forward, "backward": backward, "both": (forward + backward) / 2}[direction]
        total = total + head_weights[:, head, None, None, None] * weight.take_along_dim(tokens[..., None, None], 1)
    value, index = total.max(-1)
    share = total / total.sum(-1, keepdim=True)
    entropy = -torch.xlogy(share, share).sum(-1)
    return index, value, entropy, _window_mean(total, index, width, radius)


def _window_mean(weight: torch.Tensor, index: torch.Tensor, width: int, radius: int) -> torch.Tensor:
    """Mean `(x, y)` of the tokens around the match, as far as the frame reaches on both of its sides."""
    height = weight.shape[-1] // width
    y, x = torch.arange(height, device=index.device), torch.arange(width, device=index.device)
    at_y, at_x = index // width, index % width
    reach_y = torch.minimum(at_y, height - 1 - at_y).clamp(max=radius)[..., None]
    reach_x = torch.minimum(at_x, width - 1 - at_x).clamp(max=radius)[..., None]
    inside_y = (y - at_y[..., None]).abs() <= reach_y  # [R, Q, F, height]
    inside_x = (x - at_x[..., None]).abs() <= reach_x
    kept = weight.unflatten(-1, (height, width)) * (inside_y[..., None] & inside_x[..., None, :])
    kept = kept / kept.sum((-2, -1), keepdim=True)
    return torch.stack([(kept.sum(-2) * x).sum(-1), (kept.sum(-1) * y).sum(-1)], -1)


def segment_attention(
    image_query: torch.Tensor,
    tokens: torch.Tensor,
    text_key: torch.Tensor,
    image_key: torch.Tensor,
    text_mask: torch.Tensor | None,
    head_weights: torch.Tensor,
    frames: int,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Sums and maxima of the rows of the attention matrix."""
    total: Any = 0.0
    text = text_key.shape[2]
    for head in range(head_weights.shape[1]):
        query = image_query[:, head].double().take_along_dim(tokens[..., None], 1)
        logits = query @ torch.cat([text_key[:, head], image_key[:, head]], 1).double().mT * scale
        if text_mask is not None:
            logits[..., :text].masked_fill_(~text_mask[:, None], -torch.inf)
        total = total + head_weights[:, head, None, None] * logits.softmax(-1)
    own, image = total[..., :text], total[..., text:].unflatten(-1, (frames, -1))
    most = own.amax(-1, keepdim=True) if text else own.new_zeros(*own.shape[:2], 1)
    return torch.cat([own.sum(-1, keepdim=True), image.sum(-1)], -1), torch.cat([most, image.amax(-1)], -1)


ORACLES: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    function.__name__: function
    for function in (
        concept_attention,
        query_key_argmax,
        gram_columns,
        similarity,
        accumulate_similarity_,
        frame_statistics,
        frame_spread,
        similarity_and_statistics,
        attention_probabilities,
        temporal_matching,
        segment_attention,
    )
}


def distances(results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> list[float]:
    """Per result, how far it is from the expected one, relative to that; of indices, the share that differs.

    Where an index differs, what was computed for it is not compared.
    """
    agree = torch.ones((), dtype=torch.bool)
    found = []
    for result, exact in zip(results, expected, strict=True):
        if not result.is_floating_point():
            agree = result == exact
            found.append(1 - agree.double().mean().item())
            continue
        at = agree.reshape(agree.shape + (1,) * (exact.dim() - agree.dim())) if agree.dim() else agree.to(exact.device)
        error = torch.where(at, result.double() - exact, 0.0)
        found.append((error.norm() / exact.norm()).item())
    return found
