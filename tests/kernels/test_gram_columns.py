"""Gram columns of given anchors, standardized or not, against float64 and against the reference."""

from __future__ import annotations

import pytest
import torch

from concept_map_kernels import _common
from concept_map_kernels.gram_columns import gram_columns, supports
from diffusers_concept_maps import reference

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [
    # rows, heads, texts, frames, places, head width
    (1, 2, 5, 3, 45, 64),
    (2, 1, 2, 2, 67, 40),
    (1, 1, 20, 1, 33, 128),
    (2, 2, 3, 3, 2, 32),
    (1, 1, 9, 2, 5, 256),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STANDARDS = ["none", "clip", "text"]


def features(
    rows: int, heads: int, frames: int, places: int, width: int, dtype: torch.dtype, mean: float = 0.5
) -> torch.Tensor:
    """`[R, H, N, D]`, a slice of a joint buffer of tokens."""
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn(rows, 3 + frames * places, heads, width, generator=generator) + mean
    return joint.to(dtype).transpose(1, 2)[:, :, 3:]


def anchors(rows: int, heads: int, texts: int, frames: int, places: int) -> torch.Tensor:
    return torch.randint(places, (rows, heads, texts, frames), generator=torch.Generator().manual_seed(1))


def weights(rows: int, heads: int) -> torch.Tensor:
    return torch.rand(rows, heads, generator=torch.Generator().manual_seed(2)) + 0.5


def exact(
    image: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, standardize: str, count: torch.Tensor
) -> torch.Tensor:
    """The columns of the whole Gram matrix of every frame in float64; rows repeated as often as they count."""
    feature = image.double().unflatten(2, (index.shape[3], -1))  # [R, H, F, P, D]
    gram = feature @ feature.mT
    column = gram.gather(3, index.transpose(2, 3)[..., None].expand(-1, -1, -1, -1, gram.shape[-1]))
    score = column.transpose(2, 3).flatten(3)  # [R, H, C, N]
    if standardize == "clip":
        score = (score - score.mean(3, keepdim=True)) / (score.std(3, correction=0, keepdim=True) + 1e-6)
    if standardize == "text":
        every = score.repeat_interleave(count, 2)
        score = (score - every.mean(2, keepdim=True)) / (every.std(2, keepdim=True) + 1e-6)
    return (score * weight.double()[:, :, None, None]).sum(1)


def assert_map(
    image: torch.Tensor,
    index: torch.Tensor,
    standardize: str,
    device: torch.device,
    count: torch.Tensor | None = None,
) -> None:
    """At most twice as far from the truth as the plain computation."""
    weight = weights(*image.shape[:2])
    multiplicity = None if count is None else count.float()
    plain = reference.gram_columns(image, index, weight, standardize, multiplicity)
    at = image.to(device), index.to(device), weight.to(device), standardize
    counts = None if multiplicity is None else multiplicity.to(device)
    assert supports(*at, counts)
    actual = gram_columns(*at, counts)
    once = torch.ones(index.shape[2], dtype=torch.int64) if count is None else count
    expected = exact(image, index, weight, standardize, once)
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    bound = 2 * (plain.double() - expected).norm() + 1e-6 * expected.norm()
    assert (actual.cpu().double() - expected).norm() <= bound


@pytest.mark.parametrize("standardize", STANDARDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_maps(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, standardize: str, device: torch.device
) -> None:
    rows, heads, texts, frames, places, width = shape
    image = features(rows, heads, frames, places, width, dtype)
    index = anchors(rows, heads, texts, frames, places)
    index[:, :, -1] = (index[:, :, 0] + 1) % places  # not all anchors of a frame are the same
    assert_map(image, index, standardize, device)


@pytest.mark.parametrize("texts", [2, 16, 70, 300])
@pytest.mark.parametrize("standardize", ["none", "text"])
def test_numbers_of_rows(texts: int, standardize: str, device: torch.device) -> None:
    """More than a program takes are shared out, but for the text axis."""
    image = features(1, 1, 1, 40, 32, torch.float16)
    assert_map(image, anchors(1, 1, texts, 1, 40), standardize, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_texts_are_compared_before_they_are_multiplied(dtype: torch.dtype, device: torch.device) -> None:
    """Features with a large mean: columns differ in their last digits, the anchors do not."""
    image = features(1, 2, 2, 35, 64, dtype, mean=30.0)
    assert_map(image, anchors(1, 2, 4, 2, 35), "text", device)


def test_a_null_row_stands_for_many(device: torch.device) -> None:
    image, index = features(2, 2, 2, 25, 64, torch.float32), anchors(2, 2, 4, 2, 25)
    assert_map(image, index, "text", device, torch.tensor([1, 1, 2, 222]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_texts_of_equal_anchors_get_zero(dtype: torch.dtype, device: torch.device) -> None:
    image, index = features(1, 2, 2, 45, 64, dtype, mean=3.0), anchors(1, 2, 5, 2, 45)
    index[:] = index[:, :, :1].clone()
    count = torch.tensor([1.0, 1, 1, 1, 220], device=device)
    for multiplicity in (None, count):
        actual = gram_columns(image.to(device), index.to(device), weights(1, 2).to(device), "text", multiplicity)
        assert not actual.any()
        plain = None if multiplicity is None else multiplicity.cpu()
        assert torch.equal(actual.cpu(), reference.gram_columns(image, index, weights(1, 2), "text", plain))


def test_equal_tokens_are_constant_zero_over_the_clip(device: torch.device) -> None:
    image, index = features(1, 2, 2, 70, 64, torch.float32), anchors(1, 2, 5, 2, 70)
    image[:] = image[:, :, :1].mul(40).round() / 32  # whole parts: dot products are exact in any order
    assert not gram_columns(image.to(device), index.to(device), weights(1, 2).to(device), "clip", None).any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_one_text_has_no_deviation(device: torch.device) -> None:
    """As the reference: the unbiased variance of one number is 0 / 0."""
    image, index = features(1, 1, 2, 5, 32, torch.float32), anchors(1, 1, 1, 2, 5)
    arguments = image.to(device), index.to(device), weights(1, 1).to(device), "text", None
    assert gram_columns(*arguments).isnan().all()
    assert reference.gram_columns(image, index, weights(1, 1), "text", None).isnan().all()


@pytest.mark.parametrize("standardize", STANDARDS)
def test_a_head_of_weight_0_is_not_read(standardize: str, device: torch.device) -> None:
    image, index = features(2, 3, 2, 25, 64, torch.float32), anchors(2, 3, 4, 2, 25)
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -0.5]])
    clean = reference.gram_columns(image, index, weight, standardize, None)
    image[0, 1], image[1, 0, 7] = torch.nan, torch.inf
    actual = gram_columns(image.to(device), index.to(device), weight.to(device), standardize, None)
    torch.testing.assert_close(actual.cpu(), clean, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("programs", [1, 396])
def test_moments_of_many_tiles(programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program walks through the tiles of a frame, or every tile has its own."""
    monkeypatch.setattr(_common, "PROGRAMS", programs)
    assert_map(features(1, 1, 2, 150, 32, torch.float32), anchors(1, 1, 3, 2, 150), "clip", device)


def test_an_index_and_weights_with_strides(device: torch.device) -> None:
    image, index = features(2, 2, 2, 25, 64, torch.float32).to(device), anchors(2, 2, 4, 2, 25).to(device)
    weight = weights(1, 2).to(device).expand(2, 2)
    strided = index.transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous()
    plain = gram_columns(image, index, weight.contiguous(), "none", None)
    assert torch.equal(gram_columns(image, strided, weight, "none", None), plain)


def test_equal_results_of_equal_calls(device: torch.device) -> None:
    arguments = features(1, 2, 2, 70, 64, torch.float16).to(device), anchors(1, 2, 5, 2, 70).to(device)
    first, second = (gram_columns(*arguments, weights(1, 2).to(device), "clip", None) for _ in range(2))
    assert torch.equal(first, second)


def test_what_is_enabled(device: torch.device) -> None:
    image, index = torch.zeros(1, 1, 5, 64, device=device), torch.zeros(1, 1, 600, 1, dtype=torch.int64, device=device)
    weight = torch.ones(1, 1, device=device)
    assert supports(image, index, weight, "none", None)
    assert not supports(image, index, weight, "text", None)
    assert not supports(image.double(), index, weight, "none", None)
    assert not supports(torch.zeros(1, 1, 5, 320, device=device), index, weight, "none", None)
    assert not supports(image.mT.contiguous().mT, index, weight, "none", None)
    assert not supports(image, index.to("meta"), weight, "none", None)


def test_what_is_not_enabled_is_refused() -> None:
    image, index, weight = torch.zeros(1, 1, 5, 64), torch.zeros(1, 1, 600, 1, dtype=torch.int64), torch.ones(1, 1)
    with pytest.raises(
        ValueError, match=r"not enabled for torch.float32, head width 64, 600 text rows, standardize 't"
    ):
        gram_columns(image, index, weight, "text", None)
    with pytest.raises(ValueError, match=r"standardize is 'time'; expected 'none', 'clip' or 'text'"):
        gram_columns(image, index, weight, "time", None)
    with pytest.raises(ValueError, match=r"the last axis of image_output has stride 5; expected 1"):
        gram_columns(image.mT.contiguous().mT, index, weight, "none", None)
