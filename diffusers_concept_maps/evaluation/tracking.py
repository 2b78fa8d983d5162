"""Scores of point tracks as TAP-Vid defines them, and the queries they are asked for.

Source: Doersch et al., "TAP-Vid: A Benchmark for Tracking Any Point in a Video", NeurIPS 2022 (arXiv 2211.03726).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from diffusers_concept_maps.errors import ConceptMapsValueError

THRESHOLDS = (1, 2, 4, 8, 16)
"""Distances of the benchmark, in pixels of its 256 x 256 frames."""

RESOLUTION = (256, 256)
"""Height and width of the frames whose pixels the thresholds count."""

STRIDE = 5
"""Frames from one query frame of "strided" to the next."""

QueryMode = Literal["first", "strided"]


@dataclass(frozen=True)
class Queries:
    """What a tracker is asked, and which track of the ground truth answers it.

    Attributes:
        points: float32 `[query, 3]`: frame, x and y, in the coordinates of the tracks they were taken from.
        track: int64 `[query]`: the track of each query; `tracks[track]` is the ground truth of all queries.
    """

    points: torch.Tensor
    track: torch.Tensor


def sample_queries(
    tracks: torch.Tensor, visibility: torch.Tensor, mode: QueryMode, *, stride: int = STRIDE
) -> Queries:
    """The queries of the benchmark.

    "first" asks for every track once, where it is first visible; a track that never is has no query. "strided" asks at
    frames 0, `stride`, 2 `stride` and so on for every track visible there.

    Args:
        tracks: ground truth `[point, frame, 2]`, (x, y).
        visibility: bool `[point, frame]`.
        mode: "first" or "strided".
        stride: frames between the query frames of "strided".

    Returns:
        The queries, by track for "first", by frame and then by track for "strided".

    Raises:
        ConceptMapsValueError: shapes or types that do not fit, an unknown mode, or a stride below 1.
    """
    _check_tracks(tracks, visibility, "the ground truth")
    _check_mode(mode)
    if stride < 1:
        raise ConceptMapsValueError(f"stride is {stride}; expected at least 1 frame from one query frame to the next")
    if mode == "first":
        track = visibility.any(1).nonzero()[:, 0]
        frame = visibility[track].int().argmax(1) if len(track) else track
    else:
        frame, track = visibility[:, ::stride].T.nonzero().unbind(1)
        frame = frame * stride
    points = torch.cat([frame[:, None].float(), tracks[track, frame].float()], dim=1)
    return Queries(points, track)


@dataclass(frozen=True)
class TrackScores:
    """Scores of one video, or their mean over videos; from 0 to 1, and higher is better.

    Attributes:
        within: delta^x per threshold, `{1: ..., 2: ..., ...}`: of the places visible in the ground truth, the share
            that was tracked to a distance below the threshold, whether or not it was said to be visible.
        jaccard: per threshold, true positives over true positives, false positives and false negatives, where a place
            is positive if it is visible and a true positive if it is also predicted as such, below the threshold.
        occlusion_accuracy: OA, the share of places whose visibility was predicted right.
    """

    within: dict[int, float]
    jaccard: dict[int, float]
    occlusion_accuracy: float

    @property
    def average_within(self) -> float:
        """delta^x_avg: the mean of `within` over the thresholds."""
        return sum(self.within.values()) / len(self.within)

    @property
    def average_jaccard(self) -> float:
        """AJ: the mean of `jaccard` over the thresholds."""
        return sum(self.jaccard.values()) / len(self.jaccard)

    def as_dict(self) -> dict[str, float]:
        """All scores by name: `average_jaccard`, `average_within`, `occlusion_accuracy`, `within_1`, ..."""
        scores = {
            "average_jaccard": self.average_jaccard,
            "average_within": self.average_within,
            "occlusion_accuracy": self.occlusion_accuracy,
        }
        scores |= {f"within_{threshold}": score for threshold, score in self.within.items()}
        return scores | {f"jaccard_{threshold}": score for threshold, score in self.jaccard.items()}


def score_tracks(
    tracks: torch.Tensor,
    visibility: torch.Tensor,
    true_tracks: torch.Tensor,
    true_visibility: torch.Tensor,
    query_frames: torch.Tensor,
    mode: QueryMode,
    *,
    size: tuple[int, int],
) -> TrackScores:
    """The scores of one video.

    In mode "first" the frames after a query's own count, in mode "strided" all but its own. Where nothing counts, such
    as delta^x without a visible place, the score is not a number, as in the published definition.

    Args:
        tracks: predictions `[query, frame, 2]`, (x, y) in pixels of frames of `size`.
        visibility: bool `[query, frame]`, what the tracker says of it.
        true_tracks: ground truth of the same queries, `[query, frame, 2]`; anything where it is not visible.
        true_visibility: bool `[query, frame]`.
        query_frames: int `[query]`, the frame of each query.
        mode: "first" or "strided", as the queries were sampled.
        size: height and width of the frames whose pixels the tracks are in; distances are measured in 256 x 256.

    Raises:
        ConceptMapsValueError: shapes or types that do not fit, an unknown mode, a query frame outside the video, or a
            size below one pixel.
    """
    _check_tracks(tracks, visibility, "the prediction")
    _check_tracks(true_tracks, true_visibility, "the ground truth")
    _check_mode(mode)
    _check_queries(tracks, true_tracks, query_frames, size)
    frames = torch.arange(tracks.shape[1], device=query_frames.device)
    query_frames = query_frames[:, None]
    counted = frames > query_frames if mode == "first" else frames != query_frames
    to_protocol = torch.tensor([RESOLUTION[1] / size[1], RESOLUTION[0] / size[0]], dtype=torch.float64)
    distance = ((tracks.double() - true_tracks.double()) * to_protocol.to(tracks.device)).square().sum(-1)
    positives = (true_visibility & counted).sum()
    within, jaccard = {}, {}
    for threshold in THRESHOLDS:
        near = distance < threshold**2
        hit = near & true_visibility & counted
        false_positives = (visibility & counted & ~(near & true_visibility)).sum()
        within[threshold] = _ratio(hit.sum(), positives)
        # True positives and false negatives together are the places visible in the ground truth.
        jaccard[threshold] = _ratio((hit & visibility).sum(), positives + false_positives)
    right = ((visibility == true_visibility) & counted).sum()
    return TrackScores(within, jaccard, _ratio(right, counted.sum()))


def mean_scores(scores: Sequence[TrackScores]) -> TrackScores:
    """The scores of a benchmark: the plain mean over its videos, each counting the same however many points it has.

    A score that one of the videos does not have (not a number) the benchmark does not have either.

    Args:
        scores: of each video.

    Raises:
        ConceptMapsValueError: there are none.
    """
    if not scores:
        raise ConceptMapsValueError("no scores to average; pass those of at least one video")

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return TrackScores(
        {threshold: mean([video.within[threshold] for video in scores]) for threshold in THRESHOLDS},
        {threshold: mean([video.jaccard[threshold] for video in scores]) for threshold in THRESHOLDS},
        mean([video.occlusion_accuracy for video in scores]),
    )


def _ratio(count: torch.Tensor, of: torch.Tensor) -> float:
    return int(count) / int(of) if of else float("nan")


def _check_mode(mode: str) -> None:
    if mode not in get_args(QueryMode):
        raise ConceptMapsValueError(f'query mode is {mode!r}; expected "first" or "strided"')


def _check_tracks(tracks: torch.Tensor, visibility: torch.Tensor, whose: str) -> None:
    if tracks.ndim != 3 or tracks.shape[2] != 2 or not tracks.is_floating_point():
        raise ConceptMapsValueError(
            f"the tracks of {whose} are {tracks.dtype} of shape {tuple(tracks.shape)}; expected floats "
            f"[point, frame, 2], (x, y)"
        )
    if visibility.shape != tracks.shape[:2] or visibility.dtype != torch.bool:
        raise ConceptMapsValueError(
            f"the visibility of {whose} is {visibility.dtype} of shape {tuple(visibility.shape)}; expected bool of "
            f"shape {tuple(tracks.shape[:2])}, as its tracks"
        )


def _check_queries(
    tracks: torch.Tensor, true_tracks: torch.Tensor, query_frames: torch.Tensor, size: tuple[int, int]
) -> None:
    if tracks.shape != true_tracks.shape:
        raise ConceptMapsValueError(
            f"the predicted tracks have shape {tuple(tracks.shape)}, those of the ground truth "
            f"{tuple(true_tracks.shape)}; expected one true track per query, as true_tracks[queries.track]"
        )
    queries, frames, _ = tracks.shape
    if query_frames.shape != (queries,) or query_frames.is_floating_point():
        raise ConceptMapsValueError(
            f"query_frames is {query_frames.dtype} of shape {tuple(query_frames.shape)}; expected integers of shape "
            f"({queries},), as queries.points[:, 0].long()"
        )
    first, last = (int(query_frames.min()), int(query_frames.max())) if queries else (0, 0)
    if queries and (first < 0 or last >= frames):
        raise ConceptMapsValueError(f"query_frames run from {first} to {last}; expected 0 to {frames - 1}")
    if min(size) < 1:
        raise ConceptMapsValueError(f"size is {size}; expected height and width of at least one pixel")
