"""Scores of maps against exact masks, and intervals for them. Chance is one half unless said otherwise."""

from __future__ import annotations

import numpy as np
import torch

from diffusers_concept_maps.shapes.scenes import FRAMES

_COVERED = 0.5  # share of a token that an object must cover for the token to count as the object's


def contrast_hits(maps: torch.Tensor, weights: torch.Tensor) -> np.ndarray:
    """Whether a pair of maps is on the right one of two objects; what both maps share cancels out.

    A hit is a clip in which the map of object A's word minus that of object B's is larger, on average, over A's tokens
    than over B's.

    Args:
        maps: `[..., clip, concept, token]`, the first two concepts being the words of both objects.
        weights: share of every token in an object `[clip, 2, token]`.

    Returns:
        Bool array `[..., clip]`.
    """
    contrast = maps[..., 0, :] - maps[..., 1, :]
    mean = (contrast[..., None, :] * weights).sum(-1) / weights.sum(-1)
    hits: np.ndarray = (mean[..., 0] > mean[..., 1]).numpy()
    return hits


def late_hits(maps: torch.Tensor, weights: torch.Tensor, start: np.ndarray) -> np.ndarray:
    """Whether the maps of two motion words part on an object when that object starts to move.

    What rises is the map of the object's word minus that of the other object's word, as a mean over the object's
    tokens, from its waiting to its moving frames: a map of motion that knows no word gains nothing. The rise between
    the same frames on the other object, which does not start then, is taken off: neither does a map that favors late
    frames. A hit is a rise that is left.

    Args:
        maps: `[..., clip, concept, token]`, the first two concepts being the motions of both objects.
        weights: share of every token in an object `[clip, 2, token]`.
        start: frame in which the object of slot 0 starts `[clip]`, at least 1.

    Returns:
        Bool array `[..., clip]`.
    """
    scores = (maps[..., 0, :] - maps[..., 1, :]).unflatten(-1, (FRAMES, -1))[
        ..., None, :, :
    ]  # [..., clip, 1, frame, token of a frame]
    shares = weights.unflatten(-1, (FRAMES, -1))
    per_frame = (scores * shares).sum(-1) / shares.sum(-1)  # [..., clip, 2, frame]
    moves = torch.from_numpy(np.arange(FRAMES) >= start[:, None])[:, None]
    rise = (per_frame * moves).sum(-1) / moves.sum(-1) - (per_frame * ~moves).sum(-1) / (~moves).sum(-1)
    hits: np.ndarray = (rise[..., 0] > rise[..., 1]).numpy()
    return hits


def localization(maps: torch.Tensor, weights: torch.Tensor) -> np.ndarray:
    """Average precision of each clip's first word for the tokens of its object.

    Every concept's map is brought to mean 0 and deviation 1 over the clip; the score of a token is that of the word
    less the mean of the other concepts'.

    Args:
        maps: `[clip, concept, token]`.
        weights: share of every token in an object `[clip, 2, token]`.

    Returns:
        float array `[clip]`; chance is the share of the object's tokens in the clip.
    """
    standard = (maps - maps.mean(-1, keepdim=True)) / (maps.std(-1, keepdim=True) + 1e-6)
    score = standard[:, 0] - standard[:, 1:].mean(1)
    return average_precisions(score.numpy(), (weights[:, 0] > _COVERED).numpy())


def objectness(weights: torch.Tensor) -> np.ndarray:
    """Average precision of a perfect map that does not know the words: 1 on either object, 0 elsewhere `[clip]`."""
    covered = (weights > _COVERED).numpy()
    return average_precisions(covered.any(1).astype(float), covered[:, 0])


def average_precisions(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Average precision of every row, equal scores counting as one threshold (scikit-learn's definition).

    Args:
        scores: `[row, token]`.
        positives: bool `[row, token]`, at least one of them True in each row.

    Returns:
        float array `[row]`.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(positives, order, 1)
    values = np.take_along_axis(scores, order, 1)
    precision = ranked.cumsum(1) / np.arange(1, ranked.shape[1] + 1)
    last = np.concatenate([values[:, 1:] != values[:, :-1], np.ones((len(values), 1), bool)], 1)
    found = np.where(last, ranked.cumsum(1), 0)
    recalled = np.diff(np.maximum.accumulate(found, axis=1), axis=1, prepend=0)
    result: np.ndarray = (precision * recalled).sum(1) / ranked.sum(1)
    return result


def bootstrap_interval(
    values: np.ndarray, *, clusters: np.ndarray | None = None, level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean.

    Args:
        values: `[n]`.
        clusters: `[n]`, which values belong together and are drawn together; None draws each by itself.
        level: of the interval.
        draws: number of resamples.
    """
    names, member = (None, np.arange(len(values))) if clusters is None else np.unique(clusters, return_inverse=True)
    count = len(values) if names is None else len(names)
    total, size = np.bincount(member, values.astype(float), count), np.bincount(member, minlength=count)
    drawn = np.random.default_rng(0).integers(count, size=(draws, count))
    means = total[drawn].sum(1) / size[drawn].sum(1)
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
