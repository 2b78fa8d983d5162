"""Similarity maps, standardized or not, against float64 and against the reference."""

from __future__ import annotations

import pytest
import torch

from concept_map_kernels import _columns, _common
from concept_map_kernels.similarity import (
    accumulate_similarity_,
    launch_shape,
    similarity,
    supports,
    supports_accumulate,
)
from diffusers_concept_maps import reference

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [
    # rows, heads, texts, tokens, head width
    (1, 2, 5, 135, 64),
    (2, 1, 2, 67, 40),
    (1, 1, 20, 33, 128),
    (2, 3, 3, 1, 32),
    (1, 1, 9, 35, 256),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STANDARDS = ["none", "clip", "text"]


def features(rows: int, heads: int, tokens: int, width: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """`[R, H, N, D]` with a mean, a slice of a joint buffer of tokens."""
    generator = torch.Generator().manual_seed(seed)
    joint = torch.randn(rows, 3 + tokens, heads, width, generator=generator) + 0.5
    return joint.to(dtype).transpose(1, 2)[:, :, 3:]


def weights(rows: int, heads: int) -> torch.Tensor:
    return torch.rand(rows, heads, generator=torch.Generator().manual_seed(2)) + 0.5


def exact(
    concept: torch.Tensor,
    image: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    standardize: str,
    count: torch.Tensor,
) -> torch.Tensor:
    """The map in float64, all heads at once; "text" with every row repeated as often as it counts."""
    score = concept.double() @ image.double().mT * scale  # [R, H, C, N]
    if standardize == "clip":
        score = (score - score.mean(3, keepdim=True)) / (score.std(3, correction=0, keepdim=True) + 1e-6)
    if standardize == "text":
        every = score.repeat_interleave(count, 2)
        score = (score - every.mean(2, keepdim=True)) / (every.std(2, keepdim=True) + 1e-6)
    return (score * weight.double()[:, :, None, None]).sum(1)


def assert_as_exact_as(actual: torch.Tensor, plain: torch.Tensor, expected: torch.Tensor) -> None:
    """At most twice as far from the truth as the plain computation."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    size = expected.norm()
    assert (actual.cpu().double() - expected).norm() <= 2 * (plain.double() - expected).norm() + 1e-6 * size


def assert_map(
    concept: torch.Tensor,
    image: torch.Tensor,
    standardize: str,
    device: torch.device,
    count: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> None:
    weight = weights(*image.shape[:2]) if weight is None else weight
    multiplicity = None if count is None else count.float()
    plain = reference.similarity(concept, image, weight, 0.125, standardize, multiplicity)
    at = concept.to(device), image.to(device), weight.to(device), 0.125, standardize
    counts = None if multiplicity is None else multiplicity.to(device)
    assert supports(*at, counts)
    actual = similarity(*at, counts)
    once = torch.ones(concept.shape[2], dtype=torch.int64) if count is None else count
    assert_as_exact_as(actual, plain, exact(concept, image, weight, 0.125, standardize, once))


@pytest.mark.parametrize("standardize", STANDARDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_maps(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, standardize: str, device: torch.device
) -> None:
    rows, heads, texts, tokens, width = shape
    if tokens == 1 and standardize == "clip":
        return  # of one token nothing is left
    concept = features(rows, heads, texts, width, 0, dtype)
    assert_map(concept, features(rows, heads, tokens, width, 1, dtype), standardize, device)


@pytest.mark.parametrize("texts", [1, 16, 17, 70])
@pytest.mark.parametrize("standardize", ["none", "clip"])
def test_numbers_of_rows(texts: int, standardize: str, device: torch.device) -> None:
    """One, a full block, one more than a block, and more than one program."""
    dtype = torch.float16
    assert_map(features(1, 1, texts, 32, 0, dtype), features(1, 1, 40, 32, 1, dtype), standardize, device)


@pytest.mark.parametrize("texts", [2, 16, 70, 300])
def test_numbers_of_rows_of_the_text_axis(texts: int, device: torch.device) -> None:
    dtype = torch.float16
    assert_map(features(1, 1, texts, 32, 0, dtype), features(1, 1, 40, 32, 1, dtype), "text", device)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_one_row_has_no_deviation(device: torch.device) -> None:
    """As the reference: the unbiased variance of one number is 0 / 0."""
    concept, image = features(1, 1, 1, 32, 0, torch.float32), features(1, 1, 20, 32, 1, torch.float32)
    arguments = concept.to(device), image.to(device), weights(1, 1).to(device), 1.0, "text", None
    assert similarity(*arguments).isnan().all()
    assert reference.similarity(concept, image, weights(1, 1), 1.0, "text", None).isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_one_row_of_a_head_of_weight_0(device: torch.device) -> None:
    concept, image = features(1, 1, 1, 32, 0, torch.float32), features(1, 1, 20, 32, 1, torch.float32)
    assert not similarity(
        concept.to(device), image.to(device), torch.zeros(1, 1, device=device), 1.0, "text", None
    ).any()


def test_rows_that_stand_for_many(device: torch.device) -> None:
    count = torch.tensor([1, 3, 1, 217])
    concept, image = features(2, 2, 4, 64, 0, torch.float32), features(2, 2, 50, 64, 1, torch.float32)
    assert_map(concept, image, "text", device, count)


@pytest.mark.parametrize("standardize", STANDARDS)
def test_a_head_of_weight_0_is_not_read(standardize: str, device: torch.device) -> None:
    concept, image = features(2, 3, 4, 64, 0, torch.float32), features(2, 3, 50, 64, 1, torch.float32)
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -0.5]])
    clean = reference.similarity(concept, image, weight, 1.0, standardize, None)
    concept[0, 1], image[0, 1], image[1, 0, 7] = torch.nan, torch.nan, torch.inf
    actual = similarity(concept.to(device), image.to(device), weight.to(device), 1.0, standardize, None)
    torch.testing.assert_close(actual.cpu(), clean, rtol=1e-5, atol=1e-5)


def test_equal_tokens_are_constant_zero_over_the_clip(device: torch.device) -> None:
    concept, image = features(1, 2, 4, 64, 0, torch.float32), features(1, 2, 135, 64, 1, torch.float32)
    image[:] = image[:, :, :1].mul(40).round()  # dot products of whole numbers are exact in any order
    arguments = concept.mul(40).round().to(device), image.to(device), weights(1, 2).to(device), 0.1, "clip", None
    assert not similarity(*arguments).any()


@pytest.mark.parametrize("programs", [1, 396])
def test_moments_of_many_tiles(programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program walks through many tiles, or every tile has its own."""
    monkeypatch.setattr(_common, "PROGRAMS", programs)
    concept, image = features(1, 1, 3, 32, 0, torch.float32), features(1, 1, 300, 32, 1, torch.float32)
    concept[:] += 20  # scores far from zero
    assert_map(concept, image, "clip", device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_are_added_in_place(dtype: torch.dtype, device: torch.device) -> None:
    """Into a view with gaps between its rows, which stay as they are."""
    concept, image, weight = features(2, 2, 5, 40, 0, dtype), features(2, 2, 67, 40, 1, dtype), weights(2, 2)
    buffer = torch.arange(2 * 7 * 80.0, device=device).view(2, 7, 80) / 100
    before = buffer.clone()
    arguments = concept.to(device), image.to(device), weight.to(device), 0.125
    total = buffer[:, 1:6, 3:70]
    assert supports_accumulate(total, *arguments)
    accumulate_similarity_(total, *arguments)
    expected = exact(concept, image, weight, 0.125, "none", torch.ones(5, dtype=torch.int64))
    expected += before[:, 1:6, 3:70].cpu().double()
    torch.testing.assert_close(total.cpu().double(), expected, rtol=1e-6, atol=1e-5)
    before[:, 1:6, 3:70] = total
    assert torch.equal(buffer, before)


def test_equal_results_of_equal_calls(device: torch.device) -> None:
    concept, image = features(1, 2, 5, 64, 0, torch.float16), features(1, 2, 70, 64, 1, torch.float16)
    arguments = concept.to(device), image.to(device), weights(1, 2).to(device), 1.0, "clip", None
    assert torch.equal(similarity(*arguments), similarity(*arguments))


def test_what_is_enabled(device: torch.device) -> None:
    concept, image = torch.zeros(1, 1, 600, 64, device=device), torch.zeros(1, 1, 5, 64, device=device)
    weight, total = torch.ones(1, 1, device=device), torch.zeros(1, 600, 5, device=device)
    assert supports(concept, image, weight, 1.0, "clip", None)
    assert not supports(concept, image, weight, 1.0, "text", None)
    assert not supports(concept.half(), image, weight, 1.0, "none", None)
    assert not supports(concept.double(), image.double(), weight, 1.0, "none", None)
    assert not supports(concept.short(), image.short(), weight, 1.0, "none", None)
    assert not supports(concept, image.mT.contiguous().mT, weight, 1.0, "none", None)
    assert not supports(concept, image, weight.to("meta"), 1.0, "none", None)
    assert supports_accumulate(total, concept, image, weight, 1.0)
    assert not supports_accumulate(total, concept.to("meta"), image.to("meta"), weight.to("meta"), 1.0)
    assert not supports_accumulate(total.half(), concept, image, weight, 1.0)
    assert not supports_accumulate(total.mT.contiguous().mT, concept, image, weight, 1.0)


def test_what_is_not_enabled_is_refused() -> None:
    concept, image, weight = torch.zeros(1, 1, 600, 64), torch.zeros(1, 1, 5, 64), torch.ones(1, 1)
    with pytest.raises(
        ValueError, match=r"not enabled for torch.float32, head width 64, 600 text rows, standardize 't"
    ):
        similarity(concept, image, weight, 1.0, "text", None)
    with pytest.raises(ValueError, match=r"standardize is 'time'; expected 'none', 'clip' or 'text'"):
        similarity(concept, image, weight, 1.0, "time", None)
    with pytest.raises(ValueError, match=r"the last axis of image has stride 5; expected 1"):
        similarity(concept, image.mT.contiguous().mT, weight, 1.0, "none", None)
    with pytest.raises(ValueError, match=r"the last axis of total has stride 600; expected 1"):
        accumulate_similarity_(torch.zeros(1, 5, 600).mT, concept, image, weight, 1.0)
    with pytest.raises(TypeError, match=r"total is torch.float64; expected torch.float32"):
        accumulate_similarity_(torch.zeros(1, 600, 5, dtype=torch.float64), concept, image, weight, 1.0)


def test_every_launch_has_a_shape() -> None:
    for table, standardize in ((_columns.LAUNCHES, "none"), (_columns.TEXT_LAUNCHES, "text")):
        for (size, width), blocks in table.items():
            for dtype in (dtype for dtype in _columns.PARTS if dtype.itemsize == size):
                shapes = [launch_shape(dtype, width, block, standardize) for block in blocks]
                assert [shape and shape["BLOCK_C"] for shape in shapes] == list(blocks)
