"""Best token of every frame, its value and its lead, against float64."""

from __future__ import annotations

import pytest
import torch

from concept_map_kernels.query_key_argmax import launch_shape, query_key_argmax, supports

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def arguments(
    rows: int,
    heads: int,
    concepts: int,
    tokens: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random image query and concept key."""
    generator = torch.Generator().manual_seed(concepts * tokens + width)
    query = torch.randn(rows, heads, tokens, width, generator=generator)
    key = torch.randn(rows, heads, concepts, width, generator=generator)
    return query.to(device, dtype), key.to(device, dtype)


def best_two(
    image_query: torch.Tensor, concept_key: torch.Tensor, frames: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index, value and gap from the sorted logits, computed in `dtype`."""
    logits = concept_key.to(dtype) @ image_query.to(dtype).mT / image_query.shape[-1] ** 0.5
    ordered, index = logits.unflatten(-1, (frames, -1)).sort(dim=-1, descending=True, stable=True)
    single = ordered.shape[-1] == 1
    gap = torch.full_like(ordered[..., 0], torch.inf) if single else ordered[..., 0] - ordered[..., 1]
    return index[..., 0], ordered[..., 0], gap


def check(image_query: torch.Tensor, concept_key: torch.Tensor, frames: int) -> None:
    assert supports(image_query, concept_key, frames)
    index, value, gap = query_key_argmax(image_query, concept_key, frames)
    assert (index.dtype, value.dtype, gap.dtype) == (torch.int64, torch.float32, torch.float32)
    wanted = best_two(image_query, concept_key, frames, torch.float64)
    plain = best_two(image_query, concept_key, frames, torch.float32)
    assert torch.equal(index, wanted[0])
    for found, near, far in zip((value, gap), plain[1:], wanted[1:], strict=True):
        if far.isinf().all():
            assert torch.equal(found.double(), far)
        else:
            assert (found.double() - far).abs().max() <= 2 * (near.double() - far).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "heads", "concepts", "frames", "places", "width"),
    [
        (1, 1, 1, 1, 1, 32),
        (2, 2, 3, 2, 45, 40),
        (1, 2, 16, 1, 64, 64),
        (1, 1, 17, 2, 77, 80),
        (2, 1, 5, 1, 33, 96),
        (1, 1, 70, 2, 31, 128),
    ],
)
def test_every_mask_edge(
    rows: int,
    heads: int,
    concepts: int,
    frames: int,
    places: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    query, key = arguments(rows, heads, concepts, frames * places, width, device, dtype)
    check(query, key, frames)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_widest_heads_in_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    query, key = arguments(1, 2, 4, 3 * 9, 256, device, dtype)
    check(query, key, 3)


@pytest.mark.parametrize(("frames", "places"), [(1, 300), (2, 131)])
def test_frames_that_many_programs_share(frames: int, places: int, device: torch.device) -> None:
    query, key = arguments(2, 1, 3, frames * places, 64, device)
    check(query, key, frames)


@pytest.mark.parametrize("places", [4, 60, 64, 300])
def test_ties_go_to_the_lowest_index_and_lead_by_nothing(places: int, device: torch.device) -> None:
    """Whole numbers, whose dot products are exact in any order."""
    query, key = arguments(1, 1, 2, 2 * places, 32, device)
    query = query.round().clamp(-2, 2)
    query[:, :, [places // 2, places - 1, places + 1, places + 2, 2 * places - 1]] = 3.0
    key[:, :, 0] = 1.0
    key[:, :, 1] = 0.0  # all tokens tie
    index, value, gap = query_key_argmax(query, key, 2)
    assert index[0, 0].tolist() == [[places // 2, 1], [0, 0]]
    assert gap.count_nonzero() == 0
    torch.testing.assert_close(value[0, 0, 0], torch.full((2,), 96 / 32**0.5, device=device))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, whose numpy meets the NaN
def test_tokens_that_lose_everywhere_have_an_index(device: torch.device) -> None:
    """Nothing is larger than NaN: the index must still be one that a gather can use."""
    query, key = arguments(1, 1, 2, 300, 32, device)
    index, _, _ = query_key_argmax(torch.full_like(query, torch.nan), key, 2)
    assert ((index >= 0) & (index < 150)).all()


def test_negative_values(device: torch.device) -> None:
    """Padding must not win with its 0."""
    query, key = arguments(1, 1, 3, 30, 32, device)
    check(query.abs(), -key.abs(), 2)


def test_token_major_and_sliced_tensors(device: torch.device) -> None:
    """Projections give `[R, tokens, H, D]`, and text and image are slices of one buffer."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 7 + 50, 2, 40, generator=generator).to(device).transpose(2, 3)
    image, text = query[:, :, 7:], key[:, :, :7]
    assert not image.is_contiguous()
    assert not text.is_contiguous()
    check(image, text, 2)


def test_rows_that_share_one_tensor(device: torch.device) -> None:
    query, key = arguments(1, 2, 3, 30, 32, device)
    check(query.expand(2, -1, -1, -1), key.expand(2, -1, -1, -1), 3)


def test_what_is_enabled() -> None:
    enabled = [
        launch_shape(dtype, width, count) for dtype in DTYPES[1:] for width in (16, 40, 256) for count in (1, 512)
    ]
    assert None not in enabled
    assert launch_shape(torch.float32, 256, 1) is None  # spills registers
    assert launch_shape(torch.float64, 64, 8) is None
    assert launch_shape(torch.float16, 512, 8) is None
    assert launch_shape(torch.float16, 60, 8) is None


def test_unsupported_arguments(device: torch.device) -> None:
    query, key = arguments(1, 1, 2, 20, 32, device)
    assert not supports(query.double(), key.double(), 2)
    assert not supports(query, key.half(), 2)
    assert not supports(query, key.mT.contiguous().mT, 2)
    with pytest.raises(ValueError, match="query_key_argmax is not enabled for torch.float64, head width 32, 2 keys"):
        query_key_argmax(query.double(), key.double(), 2)
    with pytest.raises(ValueError, match="frames is 3, which does not divide the 20 image tokens"):
        query_key_argmax(query, key, 3)
    with pytest.raises(ValueError, match=r"the last axis of image_query has stride 20; expected 1"):
        query_key_argmax(query.mT.contiguous().mT, key, 2)
    with pytest.raises(ValueError, match=r"the last axis of concept_key has stride 2; expected 1"):
        query_key_argmax(query, key.mT.contiguous().mT, 2)
