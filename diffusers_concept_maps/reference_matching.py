"""Matching between frames as short PyTorch: the specification, and the path of every device without a kernel.

Notation of the shape comments: R rows of the batch, H heads, S tokens of the source frame, F target frames of P
tokens, Q query tokens, D head width. Scores are float32 whatever the model's dtype. Heads and frames are taken one at
a time and queries in chunks, so that memory is linear in tokens.
"""

from __future__ import annotations

import torch

_CHUNK = 512  # queries whose scores exist at a time


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Match tokens of one frame, the source, with the tokens of others (DiffTrack, arXiv 2506.17220).

    In a head, the forward weight of query i and target j is the probability of key j for query i among the keys of
    j's frame; the backward weight is the probability of key i for query j among the keys of the source. Unlike the
    official code, the sum over heads is float32 and the scale is the caller's.

    Args:
        source_query: `[R, H, S, D]`; not read backward.
        source_key: `[R, H, S, D]`; not read forward.
        target_query: `[R, H, F * P, D]`; not read forward.
        target_key: `[R, H, F * P, D]`; not read backward.
        tokens: int64 `[R, Q]`, which of the S tokens.
        head_weights: float32 `[R, H]`, not negative; heads of weight 0 are left out.
        frames: F.
        width: tokens in a line of a target frame; it divides P.
        scale: factor of the logits, `D**-0.5` in attention.
        direction: "forward", "backward", or "both" for their mean.
        radius: of the window, in tokens.

    Returns:
        Of the weighted sum over heads, all `[R, Q, F]`: int64 index of the largest weight in its frame, the lowest on
        ties; float32 that weight; and float32 entropy, in nats, of the weights of the frame relative to their sum.
        Then float32 position `[R, Q, F, 2]`, (x, y) in tokens: the mean, by weight, of the tokens of a window around
        the index, as large as `radius` and the frame allow it to be in both senses of an axis, so that the border
        draws nothing inward.
    """
    targets = target_key.shape[2] // frames
    rows = []
    for row, row_tokens in enumerate(tokens):
        sides = (source_query[row], source_key[row], target_query[row], target_key[row])
        sums = None
        if direction != "forward":
            sums = log_sums(target_query[row], source_key[row], scale)  # [H, F * P]
        chunks = []
        for chunk in row_tokens.split(_CHUNK):
            found = []
            for frame in range(frames):
                place = slice(frame * targets, (frame + 1) * targets)
                weights = frame_weights(sides, chunk, place, head_weights[row].float(), scale, direction, sums)
                found.append(read_out(weights, width, radius))
            chunks.append([torch.stack(results, dim=1) for results in zip(*found, strict=True)])  # [Q, F, ..]
        rows.append([torch.cat(results) for results in zip(*chunks, strict=True)])
    index, value, entropy, position = (torch.stack(results) for results in zip(*rows, strict=True))
    return index, value, entropy, position


def segment_attention(
    image_query: torch.Tensor,
    tokens: torch.Tensor,
    text_key: torch.Tensor,
    image_key: torch.Tensor,
    text_mask: torch.Tensor | None,
    head_weights: torch.Tensor,
    frames: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and maxima of attention over the text and over each frame (DiffTrack, arXiv 2506.17220).

    Args:
        image_query: `[R, H, N, D]`.
        tokens: int64 `[R, Q]`, which of the N tokens.
        text_key: `[R, H, T, D]`; T may be 0.
        image_key: `[R, H, F * P, D]`.
        text_mask: bool `[R, T]`, False where a text key is padding; None for no padding.
        head_weights: float32 `[R, H]`; heads of weight 0 are left out.
        frames: F.
        scale: factor of the logits, `D**-0.5` in attention.

    Returns:
        Sum and maximum, float32 `[R, Q, 1 + F]`, of the weighted sum over heads of the probabilities of one softmax
        over all keys: first over the text (0 where there is none), then over every frame.
    """
    sums, maxima = [], []
    for row, row_tokens in enumerate(tokens):
        for chunk in row_tokens.split(_CHUNK):
            keys = torch.cat([text_key[row], image_key[row]], dim=1)  # [H, T + F * P, D]
            attention = image_key.new_zeros(len(chunk), keys.shape[1], dtype=torch.float32)
            for query, key, weight in zip(image_query[row], keys, head_weights[row].float(), strict=True):
                logits = query[chunk].float() @ key.float().mT * scale
                if text_mask is not None:
                    logits[:, : text_mask.shape[1]].masked_fill_(~text_mask[row], -torch.inf)
                attention += _weighed(logits.softmax(-1), weight)
            text, image = attention.split([text_key.shape[2], image_key.shape[2]], dim=1)
            image = image.unflatten(1, (frames, -1))  # [Q, F, P]
            text = torch.cat([text, text.new_zeros(len(text), 1)], dim=1)  # a maximum of nothing is 0
            sums.append(torch.cat([text.sum(1, keepdim=True), image.sum(2)], dim=1))
            maxima.append(torch.cat([text.amax(1, keepdim=True), image.amax(2)], dim=1))
    shape = (*tokens.shape, 1 + frames)
    return torch.cat(sums).view(shape), torch.cat(maxima).view(shape)


def log_sums(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """`log(sum_j exp(scale <query_i, key_j>))` of queries `[H, N, D]` and keys `[H, S, D]`: float32 `[H, N]`."""
    heads = []
    for head_query, head_key in zip(query, key, strict=True):
        logits = (chunk.float() @ head_key.float().mT * scale for chunk in head_query.split(_CHUNK))
        heads.append(torch.cat([chunk.logsumexp(-1) for chunk in logits]))
    return torch.stack(heads)


def frame_weights(
    sides: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    tokens: torch.Tensor,
    place: slice,
    head_weights: torch.Tensor,
    scale: float,
    direction: str,
    sums: torch.Tensor | None,
) -> torch.Tensor:
    """Matching weights of the source tokens for some of the targets, all of one frame.

    Args:
        sides: source query and key `[H, S, D]`, target query and key `[H, F * P, D]`.
        tokens: int64 `[Q]`, which of the S tokens.
        place: of the P targets among all.
        head_weights: float32 `[H]`.
        scale: factor of the logits.
        direction: "forward", "backward", or "both" for their mean.
        sums: `log_sums` of the target queries and source keys, `[H, F * P]`; None forward.

    Returns:
        Float32 `[Q, P]`, the weighted sum over heads.
    """
    source_query, source_key, target_query, target_key = sides
    total = target_key.new_zeros(len(tokens), place.stop - place.start, dtype=torch.float32)
    for head, weight in enumerate(head_weights / (2 if direction == "both" else 1)):
        if direction != "backward":
            logits = source_query[head, tokens].float() @ target_key[head, place].float().mT * scale
            total += _weighed(logits.softmax(-1), weight)
        if sums is not None:
            logits = source_key[head, tokens].float() @ target_query[head, place].float().mT * scale
            total += _weighed((logits - sums[head, place]).exp(), weight)
    return total


def _weighed(shares: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Times the weight of the head; a head of weight 0 is left out, NaN or not."""
    return (shares * weight).masked_fill_(weight == 0, 0.0)


def read_out(
    weights: torch.Tensor, width: int, radius: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index, value, entropy `[Q]` and position `[Q, 2]`, as `temporal_matching` has them, of weights `[Q, P]`."""
    value, index = weights.amax(1), weights.argmax(1)
    mass = weights.sum(1, keepdim=True)
    share = torch.where(mass > 0, weights / mass, 1 / weights.shape[1])
    entropy = torch.special.entr(share).sum(1)
    cell = torch.arange(weights.shape[1], device=weights.device)
    size = weights.new_tensor([width, weights.shape[1] // width])
    cells = torch.stack([cell % width, cell // width], dim=1).float()  # (x, y)
    match = cells[index]
    reach = torch.minimum(match, size - 1 - match).clamp(max=radius)
    offset = cells - match[:, None]  # [Q, P, 2]
    window = weights * (offset.abs() <= reach[:, None]).all(-1)
    drift = (window[..., None] * offset).sum(1) / window.sum(1, keepdim=True)
    return index, value, entropy, match + torch.where(value[:, None] > 0, drift, 0.0)
