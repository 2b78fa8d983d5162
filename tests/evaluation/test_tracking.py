"""TAP-Vid's scores and queries against loops over every place, written from the definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.evaluation.tracking import TrackScores, mean_scores, sample_queries, score_tracks

MODES = ["first", "strided"]
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def random_case(seed: int, points: int = 9, frames: int = 13, visible: float = 0.6) -> Case:
    """Errors spread over all thresholds, some of them exactly at one."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(points, frames, 2, generator=generator) * 256
    error = torch.randn(points, frames, 2, generator=generator) * 2 ** torch.randint(
        -1, 5, (points, frames, 1), generator=generator
    )
    truth[0], error[0] = truth[0].round(), torch.tensor([4.0, 0.0])
    seen = torch.rand(points, frames, generator=generator) < visible
    said = torch.rand(points, frames, generator=generator) < 0.7
    queried = torch.randint(0, frames, (points,), generator=generator)
    return truth + error, said, truth, seen, queried


def counts(case: Case, mode: str, threshold: float) -> dict[str, int]:
    """Every place judged on its own."""
    tracks, said, truth, seen, queried = (value.double().numpy() for value in case)
    found = dict.fromkeys(["all", "right", "visible", "within", "tp", "fp", "fn"], 0)
    for point in range(tracks.shape[0]):
        for frame in range(tracks.shape[1]):
            if frame == queried[point] or (mode == "first" and frame < queried[point]):
                continue
            near = math.dist(tracks[point, frame], truth[point, frame]) < threshold
            visible, predicted = bool(seen[point, frame]), bool(said[point, frame])
            found["all"] += 1
            found["right"] += visible == predicted
            found["visible"] += visible
            found["within"] += visible and near
            found["tp"] += visible and predicted and near
            found["fp"] += predicted and not (visible and near)
            found["fn"] += visible and not (predicted and near)
    return found


def naive(case: Case, mode: str) -> dict[str, float]:
    scores: dict[str, float] = {}
    for threshold in (1, 2, 4, 8, 16):
        found = counts(case, mode, threshold)
        scores[f"within_{threshold}"] = np.float64(found["within"]) / found["visible"]
        scores[f"jaccard_{threshold}"] = np.float64(found["tp"]) / (found["tp"] + found["fp"] + found["fn"])
        scores["occlusion_accuracy"] = np.float64(found["right"]) / found["all"]
    scores["average_within"] = float(np.mean([scores[f"within_{t}"] for t in (1, 2, 4, 8, 16)]))
    scores["average_jaccard"] = float(np.mean([scores[f"jaccard_{t}"] for t in (1, 2, 4, 8, 16)]))
    return scores


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(8))
def test_scores_are_those_of_the_definition(mode: Any, seed: int) -> None:
    case = random_case(seed)
    scores = score_tracks(*case, mode, size=(256, 256)).as_dict()
    assert scores == pytest.approx(naive(case, mode), abs=1e-12)
    assert 0.1 < scores["average_jaccard"] < 0.9
    assert list(scores)[:4] == ["average_jaccard", "average_within", "occlusion_accuracy", "within_1"]


@pytest.mark.parametrize("mode", MODES)
def test_a_distance_equal_to_the_threshold_is_outside(mode: Any) -> None:
    tracks, truth = torch.full((1, 3, 2), 4.0), torch.tensor([0.0, 4.0]).expand(1, 3, 2)
    seen = torch.ones(1, 3, dtype=torch.bool)
    scores = score_tracks(tracks, seen, truth, seen, torch.tensor([0]), mode, size=(256, 256))
    assert scores.within == scores.jaccard == {1: 0, 2: 0, 4: 0, 8: 1, 16: 1}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("said", [False, True])
def test_without_a_visible_point(mode: Any, said: bool) -> None:
    """Nothing to find: no delta; a Jaccard only if something was claimed; the accuracy of occlusion as ever."""
    tracks, _, truth, _, queried = random_case(1)
    nothing = torch.zeros(tracks.shape[:2], dtype=torch.bool)
    predicted = nothing | said
    with np.errstate(invalid="ignore"):
        expected = naive((tracks, predicted, truth, nothing, queried), mode)
    scores = score_tracks(tracks, predicted, truth, nothing, queried, mode, size=(256, 256))
    assert scores.as_dict() == pytest.approx(expected, nan_ok=True)
    assert math.isnan(scores.average_within)
    assert scores.average_jaccard == 0 if said else math.isnan(scores.average_jaccard)
    assert scores.occlusion_accuracy == (0 if said else 1)


def test_where_no_frame_counts_there_is_no_score() -> None:
    tracks, said, truth, seen, _ = random_case(2)
    last = torch.full((tracks.shape[0],), tracks.shape[1] - 1)
    scores = score_tracks(tracks, said, truth, seen, last, "first", size=(256, 256))
    assert all(math.isnan(score) for score in scores.as_dict().values())
    empty = score_tracks(tracks[:0], said[:0], truth[:0], seen[:0], last[:0], "strided", size=(256, 256))
    assert all(math.isnan(score) for score in empty.as_dict().values())


@pytest.mark.parametrize("mode", MODES)
def test_places_that_are_occluded_may_be_anything(mode: Any) -> None:
    tracks, said, truth, seen, queried = random_case(3)
    unknown = torch.where(seen[..., None], truth, torch.nan)
    expected = naive((tracks, said, truth, seen, queried), mode)
    scores = score_tracks(tracks, said, unknown, seen, queried, mode, size=(256, 256))
    assert scores.as_dict() == pytest.approx(expected)


@pytest.mark.parametrize("mode", MODES)
def test_distances_are_measured_in_frames_of_256_pixels(mode: Any) -> None:
    tracks, said, truth, seen, queried = random_case(4)
    expected = naive((tracks, said, truth, seen, queried), mode)
    height, width = 480, 854
    wide = [((t.double() + 0.5) * torch.tensor([width / 256, height / 256]) - 0.5) for t in (tracks, truth)]
    wide[0][0, :, 0] += 1e-9  # the track exactly at a threshold stays outside, whatever the rounding
    scores = score_tracks(wide[0], said, wide[1], seen, queried, mode, size=(height, width))
    assert scores.as_dict() == pytest.approx(expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_benchmark_averages_videos_not_points(mode: Any) -> None:
    cases = [random_case(5, points=2), random_case(6, points=30), random_case(7, points=9, frames=4)]
    per_video = [naive(case, mode) for case in cases]
    expected = {name: float(np.mean([scores[name] for scores in per_video])) for name in per_video[0]}
    scores = mean_scores([score_tracks(*case, mode, size=(256, 256)) for case in cases])
    assert scores.as_dict() == pytest.approx(expected, abs=1e-12)
    pooled = naive(tuple(torch.cat([a, b]) for a, b in zip(cases[0], cases[1], strict=True)), mode)  # type: ignore[arg-type]
    of_two = mean_scores([score_tracks(*case, mode, size=(256, 256)) for case in cases[:2]])
    assert of_two.average_jaccard != pytest.approx(pooled["average_jaccard"])


def test_a_score_that_one_video_lacks_the_benchmark_lacks() -> None:
    full = TrackScores(dict.fromkeys((1, 2, 4, 8, 16), 0.5), dict.fromkeys((1, 2, 4, 8, 16), 0.25), 1.0)
    lacking = TrackScores(dict.fromkeys((1, 2, 4, 8, 16), float("nan")), full.jaccard, 0.0)
    mean = mean_scores([full, lacking])
    assert math.isnan(mean.average_within)
    assert (mean.average_jaccard, mean.occlusion_accuracy) == (0.25, 0.5)


def naive_queries(tracks: torch.Tensor, visibility: torch.Tensor, mode: str, stride: int) -> list[tuple[float, ...]]:
    points, frames = visibility.shape
    if mode == "strided":
        places = [(frame, point) for frame in range(0, frames, stride) for point in range(points)]
        places = [(frame, point) for frame, point in places if visibility[point, frame]]
    else:
        first = [[frame for frame in range(frames) if visibility[point, frame]] for point in range(points)]
        places = [(seen[0], point) for point, seen in enumerate(first) if seen]
    return [(frame, *tracks[point, frame].tolist(), point) for frame, point in places]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("frames", "stride", "visible"), [(13, 5, 0.3), (11, 3, 0.1), (4, 5, 0.5), (6, 1, 0.9)])
def test_queries(mode: Any, frames: int, stride: int, visible: float) -> None:
    _, _, tracks, seen, _ = random_case(frames, frames=frames, visible=visible)
    seen[1] = False
    queries = sample_queries(tracks, seen, mode, stride=stride)
    found = torch.cat([queries.points.double(), queries.track[:, None].double()], 1)
    assert [tuple(row) for row in found.tolist()] == naive_queries(tracks, seen, mode, stride)
    assert (queries.points.dtype, queries.track.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("mode", MODES)
def test_no_visible_point_no_query(mode: Any) -> None:
    queries = sample_queries(torch.zeros(3, 7, 2), torch.zeros(3, 7, dtype=torch.bool), mode)
    assert (queries.points.shape, queries.track.shape) == ((0, 3), (0,))


def test_the_stride_of_the_benchmark_is_five_frames() -> None:
    queries = sample_queries(torch.zeros(1, 24, 2), torch.ones(1, 24, dtype=torch.bool), "strided")
    assert queries.points[:, 0].tolist() == [0, 5, 10, 15, 20]


@pytest.mark.parametrize("mode", MODES)
def test_a_perfect_tracker_scores_one(mode: Any) -> None:
    _, _, tracks, seen, _ = random_case(9)
    queries = sample_queries(tracks, seen, mode)
    truth, visible = tracks[queries.track], seen[queries.track]
    frames = queries.points[:, 0].long()
    scores = score_tracks(truth, visible, truth, visible, frames, mode, size=(256, 256))
    assert set(scores.as_dict().values()) == {1.0}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tracks": torch.zeros(3, 4, 3)}, r"tracks of the prediction are torch.float32 of shape \(3, 4, 3\); exp"),
        ({"true_tracks": torch.zeros(3, 4, 2).long()}, "tracks of the ground truth are torch.int64"),
        ({"visibility": torch.ones(3, 4)}, r"visibility of the prediction is torch.float32 of shape \(3, 4\); exp"),
        ({"true_visibility": torch.ones(4, 3).bool()}, r"visibility of the ground truth is .* expected bool of shape"),
        (
            {"true_tracks": torch.zeros(2, 4, 2), "true_visibility": torch.ones(2, 4).bool()},
            r"shape \(3, 4, 2\), those of the ground truth \(2, 4, 2\); expected one true track per query",
        ),
        ({"query_frames": torch.zeros(3)}, r"query_frames is torch.float32 of shape \(3,\); expected integers"),
        ({"query_frames": torch.zeros(2).long()}, r"of shape \(2,\); expected integers of shape \(3,\)"),
        ({"query_frames": torch.tensor([0, 4, 1])}, "query_frames run from 0 to 4; expected 0 to 3"),
        ({"query_frames": torch.tensor([0, -1, 1])}, "query_frames run from -1 to 1; expected 0 to 3"),
        ({"mode": "last"}, """query mode is 'last'; expected "first" or "strided"$"""),
        ({"size": (0, 256)}, r"size is \(0, 256\); expected height and width of at least one pixel"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], message: str) -> None:
    places = torch.ones(3, 4, dtype=torch.bool)
    arguments = {
        "tracks": torch.zeros(3, 4, 2),
        "visibility": places,
        "true_tracks": torch.zeros(3, 4, 2),
        "true_visibility": places,
        "query_frames": torch.zeros(3).long(),
        "mode": "first",
        "size": (256, 256),
    }
    with pytest.raises(ConceptMapsValueError, match=message):
        score_tracks(**arguments | changed)


def test_queries_and_means_refuse_what_does_not_fit() -> None:
    tracks, seen = torch.zeros(3, 4, 2), torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ConceptMapsValueError, match="query mode is 'any'"):
        sample_queries(tracks, seen, "any")  # type: ignore[arg-type]
    with pytest.raises(ConceptMapsValueError, match="stride is 0; expected at least 1 frame"):
        sample_queries(tracks, seen, "strided", stride=0)
    with pytest.raises(ConceptMapsValueError, match="visibility of the ground truth is"):
        sample_queries(tracks, seen[:2], "first")
    with pytest.raises(ConceptMapsValueError, match="no scores to average; pass those of at least one video"):
        mean_scores([])
