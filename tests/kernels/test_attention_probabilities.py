"""Probabilities of chosen text keys, summed over heads, against the softmax of the whole matrix in float64."""

from __future__ import annotations

import pytest
import torch

from concept_map_kernels.attention_probabilities import (
    attention_probabilities,
    joint_launch_shape,
    launch_shape,
    supports,
)

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
JOINT = pytest.mark.parametrize("joint", [False, True], ids=["text", "joint"])


def arguments(
    rows: int,
    heads: int,
    concepts: int,
    texts: int,
    images: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Random image query, text key, tokens, head weights and image key."""
    generator = torch.Generator().manual_seed(texts * images + width)
    query, image_key = torch.randn(2, rows, heads, images, width, generator=generator).to(device, dtype)
    key = torch.randn(rows, heads, texts, width, generator=generator).to(device, dtype)
    tokens = torch.randint(texts, (concepts,), generator=generator).to(device)
    weights = torch.rand(rows, heads, generator=generator).to(device) + 0.5
    return [query, key, tokens, weights, image_key]


def matrix_softmax(
    image_query: torch.Tensor,
    text_key: torch.Tensor,
    tokens: torch.Tensor,
    head_weights: torch.Tensor,
    image_key: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same from the whole attention matrix, computed in `dtype`."""
    keys = text_key if image_key is None else torch.cat([text_key, image_key], 2)
    attention = (image_query.to(dtype) @ keys.to(dtype).mT / keys.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("rhnc,rh->rcn", attention[..., tokens], head_weights.to(dtype))


def check(given: list[torch.Tensor], joint: bool) -> torch.Tensor:
    given = given if joint else [*given[:4], None]
    assert supports(*given)
    found = attention_probabilities(*given)
    assert found.dtype == torch.float32
    wanted = matrix_softmax(*given, torch.float64)
    plain = matrix_softmax(*given, torch.float32)
    assert (found.double() - wanted).abs().max() <= 2 * (plain.double() - wanted).abs().max() + 1e-6
    return found


@JOINT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "heads", "concepts", "texts", "images", "width"),
    [
        (1, 1, 1, 1, 1, 32),
        (2, 3, 3, 19, 77, 40),
        (1, 2, 16, 64, 128, 64),
        (1, 1, 17, 65, 63, 48),
        (2, 1, 5, 226, 33, 56),
        (1, 1, 31, 40, 45, 64),
    ],
)
def test_every_mask_edge(
    rows: int,
    heads: int,
    concepts: int,
    texts: int,
    images: int,
    width: int,
    dtype: torch.dtype,
    joint: bool,
    device: torch.device,
) -> None:
    check(arguments(rows, heads, concepts, texts, images, width, device, dtype), joint)


@JOINT
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("concepts", "width"), [(17, 80), (5, 96), (64, 128), (2, 256)])
def test_wide_heads_in_half_precision(
    concepts: int, width: int, dtype: torch.dtype, joint: bool, device: torch.device
) -> None:
    check(arguments(1, 2, concepts, 65, 40, width, device, dtype), joint)


@JOINT
def test_heads_of_weight_0_are_not_read(joint: bool, device: torch.device) -> None:
    given = arguments(2, 3, 2, 9, 40, 32, device)
    given[3] = torch.tensor([[0.0, 2.0, -1.0], [1.0, 0.0, 0.0]], device=device)
    found = check(given, joint)
    unread = (given[3] == 0)[..., None, None]
    for position in (0, 1, 4):
        given[position] = given[position].masked_fill(unread, torch.nan)
    assert torch.equal(attention_probabilities(*given if joint else [*given[:4], None]), found)


@JOINT
def test_no_head_at_all(joint: bool, device: torch.device) -> None:
    given = arguments(1, 2, 2, 9, 40, 32, device)
    given[3].zero_()
    assert torch.equal(check(given, joint), torch.zeros(1, 2, 40, device=device))


def test_probabilities_of_all_text_keys_add_up_to_1(device: torch.device) -> None:
    given = arguments(1, 1, 1, 20, 50, 32, device)
    found = attention_probabilities(given[0], given[1], torch.arange(20, device=device), given[3] * 0 + 1, None)
    torch.testing.assert_close(found.sum(1), torch.ones(1, 50, device=device), rtol=0, atol=1e-6)


@JOINT
def test_large_logits(joint: bool, device: torch.device) -> None:
    """Whole numbers, whose dot products are exact in any order: what is left is the rounding of the softmax."""
    given = arguments(1, 1, 3, 20, 50, 32, device)
    for position, size in ((0, 30), (1, 4), (4, 4)):
        given[position] = (given[position] * size).round()
    check(given, joint)


@JOINT
def test_token_major_and_sliced_tensors(joint: bool, device: torch.device) -> None:
    """Projections give `[R, tokens, H, D]`, and text and image are slices of one buffer."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 7 + 50, 2, 40, generator=generator).to(device).transpose(2, 3)
    _, _, tokens, weights, _ = arguments(2, 2, 4, 7, 50, 40, device)
    given = [query[:, :, 7:], key[:, :, :7], tokens[::2], weights[:1, :1].expand(2, 2), key[:, :, 7:]]
    assert not any(given[position].is_contiguous() for position in range(5))
    check(given, joint)


@JOINT
def test_rows_that_share_one_tensor(joint: bool, device: torch.device) -> None:
    given = arguments(1, 2, 3, 9, 30, 32, device)
    for position in (0, 1, 4):
        given[position] = given[position].expand(2, -1, -1, -1)
    given[3] = given[3].expand(2, -1)
    check(given, joint)


def test_what_is_enabled() -> None:
    for width in (16, 40, 256):
        assert None not in [launch_shape(dtype, width, count) for dtype in DTYPES[1:] for count in (1, 64)]
        assert None not in [joint_launch_shape(dtype, width) for dtype in DTYPES[1:]]
    assert launch_shape(torch.float16, 72, 8) is None  # spills registers
    for dtype, width in ((torch.float64, 64), (torch.float16, 512), (torch.float16, 60)):
        assert launch_shape(dtype, width, 8) is None
        assert joint_launch_shape(dtype, width) is None
    assert launch_shape(torch.float16, 64, 65) is None
    assert launch_shape(torch.float32, 64, 33) is None  # spills registers, as do wider heads
    assert launch_shape(torch.float32, 128, 1) is None
    assert joint_launch_shape(torch.float32, 128) is None


def test_unsupported_arguments(device: torch.device) -> None:
    query, key, tokens, weights, image_key = arguments(1, 1, 2, 9, 20, 32, device)
    assert not supports(query.double(), key.double(), tokens, weights, None)
    assert not supports(query, key.half(), tokens, weights, None)
    assert not supports(query, key, tokens, weights, image_key.half())
    assert not supports(query, key, tokens, weights, image_key.mT.contiguous().mT)
    assert not supports(query, key, torch.arange(65, device=device), weights, None)
    assert not supports(*(t.repeat(1, 1, 1, 4) for t in (query, key)), tokens, weights, image_key.repeat(1, 1, 1, 4))
    assert not supports(query, key, tokens.to("meta"), weights, None)
    message = "attention_probabilities is not enabled for torch.float64, head width 32, 2 tokens"
    with pytest.raises(ValueError, match=message):
        attention_probabilities(query.double(), key.double(), tokens, weights, None)


@pytest.mark.parametrize(("position", "name"), [(0, "image_query"), (1, "text_key"), (4, "image_key")])
def test_last_axis_with_gaps(position: int, name: str, device: torch.device) -> None:
    given = arguments(1, 1, 2, 9, 20, 32, device)
    given[position] = given[position].mT.contiguous().mT
    with pytest.raises(ValueError, match=rf"the last axis of {name} has stride \d+; expected 1"):
        attention_probabilities(*given)
