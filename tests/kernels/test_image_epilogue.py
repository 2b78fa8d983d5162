"""Similarity and head statistics in one read: the values of the two kernels that read twice, and of float64."""

from __future__ import annotations

import pytest
import torch

from concept_map_kernels.frame_statistics import frame_statistics
from concept_map_kernels.image_epilogue import similarity_and_statistics, supports
from concept_map_kernels.similarity import similarity
from diffusers_concept_maps import reference

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [
    # rows, heads, concepts, frames, places, head width
    (1, 2, 5, 2, 70, 64),
    (2, 1, 1, 3, 45, 40),
    (1, 1, 3, 4, 1, 96),
    (2, 2, 16, 1, 33, 32),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def features(
    rows: int, heads: int, tokens: int, width: int, seed: int, dtype: torch.dtype, offset: float = 0.5
) -> torch.Tensor:
    """`[R, H, N, D]`, a slice of a joint buffer of tokens."""
    generator = torch.Generator().manual_seed(seed)
    joint = torch.randn(rows, 3 + tokens, heads, width, generator=generator) + offset
    return joint.to(dtype).transpose(1, 2)[:, :, 3:]


def weights(rows: int, heads: int) -> torch.Tensor:
    return torch.rand(rows, heads, generator=torch.Generator().manual_seed(2)) + 0.5


def exact(
    concept: torch.Tensor, image: torch.Tensor, weight: torch.Tensor, frames: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    score = (concept.double() @ image.double().mT * weight.double()[:, :, None, None]).sum(1)
    feature = image.double().unflatten(2, (frames, -1))
    mean = feature.mean(3)
    within = (feature - mean[:, :, :, None]).square().sum((2, 3, 4))
    return score, mean - mean.mean(2, keepdim=True), within


def assert_results(concept: torch.Tensor, image: torch.Tensor, frames: int, device: torch.device) -> None:
    """At most twice as far from the truth as the plain computation."""
    weight = weights(*image.shape[:2])
    at = concept.to(device), image.to(device), weight.to(device), frames
    assert supports(*at)
    actual = similarity_and_statistics(*at)
    plain = reference.similarity_and_statistics(concept, image, weight, frames)
    for ours, theirs, truth in zip(actual, plain, exact(concept, image, weight, frames), strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == truth.shape
        size = truth.norm() if truth.abs().max() > 1e-12 else 1.0
        bound = 2 * (theirs.double() - truth).norm() + 1e-6 * size
        assert (ours.cpu().double() - truth).norm() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results(shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    rows, heads, concepts, frames, places, width = shape
    concept = features(rows, heads, concepts, width, 0, dtype)
    assert_results(concept, features(rows, heads, frames * places, width, 1, dtype), frames, device)


@pytest.mark.parametrize(("concepts", "width"), [(17, 64), (64, 128), (2, 256)])
def test_wide_heads_and_many_concepts(concepts: int, width: int, device: torch.device) -> None:
    dtype = torch.float16
    assert_results(features(1, 1, concepts, width, 0, dtype), features(1, 1, 70, width, 1, dtype), 2, device)


@pytest.mark.parametrize("offset", [1e2, -1e6])
def test_statistics_of_features_far_from_zero(offset: float, device: torch.device) -> None:
    concept = features(1, 2, 3, 64, 0, torch.float32)
    image = features(1, 2, 140, 64, 1, torch.float32, offset)
    image[:, :, :70] += 1
    at = concept.to(device), image.to(device), weights(1, 2).to(device), 2
    _, mean, within = similarity_and_statistics(*at)
    _, true_mean, true_within = exact(concept, image, weights(1, 2), 2)
    between, true_between = mean.cpu().double().square().sum((2, 3)), true_mean.square().sum((2, 3))
    torch.testing.assert_close(between / within.cpu(), true_between / true_within, rtol=1e-6, atol=0)


def test_the_same_as_in_two_reads(device: torch.device) -> None:
    concept, image = features(1, 2, 5, 64, 0, torch.float16).to(device), features(1, 2, 140, 64, 1, torch.float16)
    image, weight = image.to(device), weights(1, 2).to(device)
    once = similarity_and_statistics(concept, image, weight, 2)
    twice = similarity(concept, image, weight, 1.0, "none", None), *frame_statistics(image, 2)
    for one, other in zip(once, twice, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_equal_tokens_have_no_statistics(device: torch.device) -> None:
    concept, image = features(1, 1, 2, 64, 0, torch.float32), features(1, 1, 140, 64, 1, torch.float32)
    image[:] = image[:, :, :1].clone()
    _, mean, within = similarity_and_statistics(concept.to(device), image.to(device), weights(1, 1).to(device), 2)
    assert not mean.any()
    assert not within.any()


def test_a_head_of_weight_0_counts_in_the_statistics_alone(device: torch.device) -> None:
    concept, image = features(2, 2, 3, 64, 0, torch.float32), features(2, 2, 50, 64, 1, torch.float32)
    weight = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    score, mean, within = (result.float() for result in exact(concept, image, weight, 2))
    image[1, 1, 3] = torch.nan
    actual = similarity_and_statistics(concept.to(device), image.to(device), weight.to(device), 2)
    torch.testing.assert_close(actual[0].cpu(), score, rtol=1e-5, atol=1e-5)
    assert actual[1].isnan().any((2, 3)).tolist() == [[False, False], [False, True]]
    assert actual[2].isnan().tolist() == [[False, False], [False, True]]
    torch.testing.assert_close(actual[1][0].cpu(), mean[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual[2][0].cpu(), within[0], rtol=1e-5, atol=0)


def test_equal_results_of_equal_calls(device: torch.device) -> None:
    concept, image = features(1, 2, 3, 64, 0, torch.float16).to(device), features(1, 2, 70, 64, 1, torch.float16)
    arguments = concept, image.to(device), weights(1, 2).to(device), 2
    first, second = (similarity_and_statistics(*arguments) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_what_is_enabled(device: torch.device) -> None:
    concept, image = torch.zeros(1, 1, 65, 64, device=device), torch.zeros(1, 1, 6, 64, device=device)
    weight = torch.ones(1, 1, device=device)
    assert supports(concept[:, :, :16], image, weight, 2)
    assert supports(concept[:, :, :64].half(), image.half(), weight, 2)
    assert not supports(concept.half(), image.half(), weight, 2)
    assert not supports(concept[:, :, :16].half(), image, weight, 2)
    assert not supports(concept[:, :, :16].int(), image.int(), weight, 2)
    assert not supports(concept[:, :, :16], image.mT.contiguous().mT, weight, 2)
    assert not supports(concept[:, :, :16], image, weight.to("meta"), 2)


def test_what_is_not_enabled_is_refused() -> None:
    concept, image, weight = torch.zeros(1, 1, 65, 64), torch.zeros(1, 1, 6, 64), torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"not enabled for torch.float32, head width 64, 65 concepts"):
        similarity_and_statistics(concept, image, weight, 2)
    with pytest.raises(ValueError, match=r"the last axis of concept_output has stride 65; expected 1"):
        similarity_and_statistics(concept.mT.contiguous().mT, image, weight, 2)
