"""Head statistics in the kernels' one read, and in a second one, against float64 and scikit-learn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score

from concept_map_kernels import _common
from concept_map_kernels.frame_statistics import LAUNCHES, frame_spread, frame_statistics, supports
from diffusers_concept_maps import reference

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [
    # rows, heads, frames, places, head width
    (1, 2, 3, 45, 64),
    (2, 1, 2, 131, 40),
    (1, 1, 5, 1, 128),
    (1, 1, 18, 3, 32),
    (1, 1, 1, 70, 96),
    (1, 1, 2, 33, 256),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def outputs(
    rows: int,
    heads: int,
    frames: int,
    places: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    offset: float = 0.0,
) -> torch.Tensor:
    """Image tokens `[R, H, N, D]`, a slice of a joint buffer of tokens, with a drift from frame to frame."""
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn(rows, 3 + frames * places, heads, width, generator=generator)
    drift = torch.randn(rows, frames, 1, heads, width, generator=generator)
    joint[:, 3:].unflatten(1, (frames, places)).add_(0.5 * drift)
    joint += offset * torch.linspace(-1, 1, width)
    return joint.to(dtype).transpose(1, 2)[:, :, 3:]


def exact(output: torch.Tensor, frames: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Relative means of the frames, spread within them, and mean distance to the mean, in float64."""
    feature = output.double().unflatten(2, (frames, -1))
    mean = feature.mean(3)
    deviation = feature - mean[:, :, :, None]
    return mean - mean.mean(2, keepdim=True), deviation.square().sum((2, 3, 4)), deviation.norm(dim=-1).mean(-1)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    difference = (actual.cpu().double() - expected).norm()
    return float(difference / expected.norm()) if expected.any() else float(difference)


def assert_statistics(output: torch.Tensor, frames: int, device: torch.device) -> None:
    at = output.to(device)
    mean, within = frame_statistics(at, frames)
    spread = frame_spread(at, mean, frames)
    expected = exact(output, frames)
    if frames == 1:
        assert not mean.any()
    plain_mean, plain_within = reference.frame_statistics(output, frames)
    plain = plain_mean, plain_within, reference.frame_spread(output, plain_mean, frames)
    for ours, theirs, truth in zip((mean, within, spread), plain, expected, strict=True):
        if truth.abs().max() > 1e-12:
            assert error(ours, truth) <= 2 * error(theirs, truth) + 1e-6
        else:
            assert error(ours, torch.zeros_like(truth)) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    assert_statistics(outputs(*shape, dtype, offset=2.0), shape[2], device)


def test_a_program_with_several_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few programs to share the work one walks through a frame; the last tile is not full."""
    output = outputs(1, 1, 2, 300, 64, offset=3.0)
    many = frame_statistics(output.to(device), 2)
    monkeypatch.setattr(_common, "PROGRAMS", 1)
    few = frame_statistics(output.to(device), 2)
    for one, other in zip(many, few, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert_statistics(output, 2, device)


def test_more_chunks_than_are_merged_at_a_time(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAUNCHES, (4, 32), (16, 4))
    monkeypatch.setattr(_common, "MAX_SPLITS", 64)
    assert_statistics(outputs(1, 1, 1, 16 * 32 + 5, 32, offset=5.0), 1, device)


def scores(output: torch.Tensor, frames: int, device: torch.device) -> dict[str, torch.Tensor]:
    at = output.to(device)
    mean, within = frame_statistics(at, frames)
    spread = frame_spread(at, mean, frames)
    statistics = reference.FrameStatistics(mean, within, output.shape[2])
    return {
        "calinski_harabasz": reference.calinski_harabasz(statistics).cpu(),
        "fisher": reference.fisher(statistics).cpu(),
        "davies_bouldin": reference.davies_bouldin(statistics, spread).cpu(),
    }


def fisher_ratio(feature: torch.Tensor, labels: torch.Tensor) -> float:
    clusters = [feature[labels == label] for label in labels.unique()]
    between = sum(len(cluster) * (cluster.mean(0) - feature.mean(0)).square().sum() for cluster in clusters)
    within = sum((cluster - cluster.mean(0)).square().sum() for cluster in clusters)
    return float(between / within)


ORACLES: dict[str, Callable[[torch.Tensor, torch.Tensor], float]] = {
    "calinski_harabasz": calinski_harabasz_score,
    "fisher": fisher_ratio,
    "davies_bouldin": davies_bouldin_score,
}


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, -1e6])
def test_scores_of_features_far_from_zero(offset: float, device: torch.device) -> None:
    output = outputs(1, 2, 3, 70, 64, offset=offset)
    near = output.double() - output[:, :, :1].double()  # far from zero scikit-learn's own distances cancel
    labels = torch.arange(3).repeat_interleave(70)
    for name, actual in scores(output, 3, device).items():
        expected = torch.tensor([[ORACLES[name](head, labels) for head in row] for row in near], dtype=torch.float64)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("place", [0, 35, 69, -1])
def test_scores_with_a_token_far_from_the_others(place: int, device: torch.device) -> None:
    output = outputs(1, 1, 3, 70, 64)
    output[:, :, place] = 1e3
    labels = torch.arange(3).repeat_interleave(70)
    for name, actual in scores(output, 3, device).items():
        torch.testing.assert_close(actual.item(), ORACLES[name](output[0, 0].double(), labels), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("zero", {"calinski_harabasz": 1.0, "davies_bouldin": 0.0, "fisher": 0.0}),
        ("constant", {"calinski_harabasz": 1.0, "davies_bouldin": 0.0, "fisher": 0.0}),
        ("equal frames", {"calinski_harabasz": 0.0, "davies_bouldin": 0.0, "fisher": 0.0}),
        ("one value per frame", {"calinski_harabasz": 1.0, "davies_bouldin": 0.0}),
    ],
)
def test_scores_of_features_without_spread(kind: str, expected: dict[str, float], device: torch.device) -> None:
    """What scikit-learn defines where it meets exact zeros."""
    output = outputs(1, 2, 2, 45, 64)
    frame = output.unflatten(2, (2, 45))[:, 1]
    if kind == "zero":
        frame.zero_()
    elif kind == "constant":
        frame[:] = torch.linspace(0.1, 7, 64)
    elif kind == "equal frames":
        frame[:] = frame[:, :1].clone()
    else:
        frame[:] = frame[:, :, :1].clone()
    actual = scores(output, 2, device)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name][:, 1], torch.full((1,), value), rtol=0, atol=1e-6)
        assert actual[name][:, 0].isfinite().all()
    if kind in ("zero", "constant"):
        plain = reference.frame_statistics(output, 2)
        ours = frame_statistics(output.to(device), 2)
        assert torch.equal(ours[0][:, 1].cpu(), plain[0][:, 1])
        assert torch.equal(ours[1][:, 1].cpu(), plain[1][:, 1])


def test_nan_stays_in_its_head(device: torch.device) -> None:
    output = outputs(2, 2, 2, 17, 64)
    output[0, 1, 5, 2] = torch.nan
    for score in scores(output, 2, device).values():
        assert score.isnan().nonzero().tolist() == [[0, 1]]


def test_equal_results_of_equal_calls(device: torch.device) -> None:
    output = outputs(1, 2, 3, 70, 64, torch.float16).to(device)
    first, second = (frame_statistics(output, 3) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_what_is_enabled(device: torch.device) -> None:
    output = outputs(1, 1, 2, 3, 64).to(device)
    assert supports(output, 2)
    assert not supports(output.double(), 2)
    assert not supports(output.int(), 2)
    assert not supports(output.mT.contiguous().mT, 2)
    assert not supports(torch.zeros(1, 1, 4, 320, device=device), 2)
    assert not supports(output.to("meta"), 2)


def test_what_is_not_enabled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not enabled for torch.float64 and head width 64"):
        frame_statistics(outputs(1, 1, 2, 3, 64).double(), 2)
    with pytest.raises(ValueError, match=r"not enabled for torch.float32 and head width 320"):
        frame_spread(outputs(1, 1, 2, 3, 320), torch.zeros(1, 1, 2, 320), 2)
    with pytest.raises(ValueError, match=r"the last axis of image_output has stride 6; expected 1"):
        frame_statistics(outputs(1, 1, 2, 3, 64).mT.contiguous().mT, 2)
