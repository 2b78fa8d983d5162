"""Concept attention by splits of the keys, against float64 and as precise as the plain reference."""

from __future__ import annotations

import pytest
import torch

from concept_map_kernels._common import INTERPRETED, MAX_SPLITS, split
from concept_map_kernels.concept_attention import concept_attention, launch_shape, supports
from diffusers_concept_maps import reference

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def arguments(
    rows: int, heads: int, concepts: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Random query, key, value, image key and image value."""
    generator = torch.Generator().manual_seed(concepts * tokens + width)
    counts = (concepts, concepts, concepts, tokens, tokens)
    return [torch.randn(rows, heads, n, width, generator=generator).to(device, dtype) for n in counts]


def exact(tensors: list[torch.Tensor], multiplicity: torch.Tensor | None) -> torch.Tensor:
    """The softmax with every key written out as often as its multiplicity says, in float64."""
    query, key, value, image_key, image_value = (tensor.double() for tensor in tensors)
    count = torch.ones(key.shape[2], device=key.device) if multiplicity is None else multiplicity
    weight = torch.cat([count.double(), torch.ones(image_key.shape[2], device=key.device).double()])
    logits = query @ torch.cat([key, image_key], 2).mT / query.shape[-1] ** 0.5
    attention = (logits - logits.amax(-1, keepdim=True)).exp() * weight
    attention = attention / attention.sum(-1, keepdim=True)
    return attention @ torch.cat([value, image_value], 2)


def assert_as_precise(found: torch.Tensor, plain: torch.Tensor, wanted: torch.Tensor) -> None:
    """At most twice as far from float64 as the plain computation; the interpreter truncates what it casts to bf16."""
    error = (found.double() - wanted).abs().max()
    if INTERPRETED and found.dtype == torch.bfloat16:
        assert error <= 1.6e-2 * wanted.abs().max()
    else:
        assert error <= 2 * (plain.double() - wanted).abs().max() + 1e-6


def check(tensors: list[torch.Tensor], multiplicity: torch.Tensor | None = None) -> torch.Tensor:
    assert supports(*tensors, multiplicity)
    found = concept_attention(*tensors, multiplicity)
    assert found.dtype == tensors[0].dtype
    assert found.is_contiguous()
    assert_as_precise(found, reference.concept_attention(*tensors, multiplicity), exact(tensors, multiplicity))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "heads", "concepts", "tokens", "width"),
    [
        (1, 1, 1, 1, 32),
        (2, 2, 3, 77, 40),
        (1, 2, 16, 128, 64),
        (1, 1, 17, 63, 80),
        (2, 1, 5, 131, 96),
        (1, 1, 64, 45, 128),
        (1, 1, 20, 33, 256),
    ],
)
def test_every_mask_edge(
    rows: int, heads: int, concepts: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(arguments(rows, heads, concepts, tokens, width, dtype, device))


@pytest.mark.parametrize("concepts", [1, 17])
def test_without_image_tokens_concepts_read_one_another(concepts: int, device: torch.device) -> None:
    tensors = arguments(1, 1, concepts, 0, 64, torch.float32, device)
    multiplicity = torch.arange(1, concepts + 1, dtype=torch.float32, device=device)
    check(tensors)
    check(tensors, multiplicity)


@pytest.mark.parametrize("tokens", [50, 300])
def test_multiplicity_is_that_many_equal_keys(tokens: int, device: torch.device) -> None:
    tensors = arguments(1, 2, 3, tokens, 32, torch.float32, device)
    multiplicity = torch.tensor([1.0, 5.0, 40.0], device=device)
    found = check(tensors, multiplicity)
    for position in (1, 2):
        tensors[position] = tensors[position].repeat_interleave(multiplicity.long(), 2)
    torch.testing.assert_close(found.double(), exact(tensors, None), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log(0), as meant, in the interpreter
def test_a_concept_of_multiplicity_0_is_not_read(device: torch.device) -> None:
    tensors = arguments(1, 1, 3, 20, 32, torch.float32, device)
    found = check(tensors, torch.tensor([1.0, 0.0, 1.0], device=device))
    tensors[2][:, :, 1] = 1e6
    assert torch.equal(concept_attention(*tensors, torch.tensor([1.0, 0.0, 1.0], device=device)), found)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # log(0), as meant, in the interpreter
def test_blocks_of_multiplicity_0_before_the_first_key(device: torch.device) -> None:
    tensors = arguments(1, 1, 70, 0, 64, torch.float32, device)
    multiplicity = torch.ones(70, device=device)
    multiplicity[:66] = 0
    check(tensors, multiplicity)


def test_token_major_and_sliced_tensors(device: torch.device) -> None:
    """Projections give `[R, tokens, H, D]`, and text, image and concepts are slices of one buffer."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 7 + 50 + 3, 2, 40, generator=generator).to(device).transpose(2, 3)
    tensors = [query[:, :, 57:], key[:, :, 57:], value[:, :, 57:], key[:, :, 7:57], value[:, :, 7:57]]
    assert not any(tensor.is_contiguous() for tensor in tensors)
    found = check(tensors)
    assert torch.equal(found, concept_attention(*(tensor.contiguous() for tensor in tensors), None))


def test_rows_that_share_one_tensor(device: torch.device) -> None:
    tensors = arguments(1, 2, 3, 30, 32, torch.float32, device)
    check([tensor.expand(2, -1, -1, -1) for tensor in tensors])


def test_large_logits(device: torch.device) -> None:
    tensors = arguments(1, 1, 2, 40, 32, torch.float32, device)
    tensors[0] *= 200
    check(tensors)


def test_no_result_depends_on_the_run(device: torch.device) -> None:
    tensors = arguments(1, 1, 3, 300, 32, torch.float32, device)
    assert torch.equal(concept_attention(*tensors, None), concept_attention(*tensors, None))


@pytest.mark.parametrize("tokens", [0, 1, 64, 65, 17550])
@pytest.mark.parametrize("programs", [1, 48, 96, 1000])
def test_parts_hold_every_key_once(tokens: int, programs: int) -> None:
    parts, part = split(tokens, 64, programs)
    assert 1 <= parts <= MAX_SPLITS
    assert (parts - 1) * part < max(tokens, 1) <= max(parts * part, 1)
    assert part % 64 == 0


def test_what_is_enabled() -> None:
    enabled = [launch_shape(dtype, width, count) for dtype in DTYPES for width in (16, 40, 256) for count in (1, 64)]
    assert None not in enabled
    assert launch_shape(torch.float64, 64, 8) is None
    assert launch_shape(torch.float16, 512, 8) is None
    assert launch_shape(torch.float16, 60, 8) is None


def test_unsupported_arguments(device: torch.device) -> None:
    tensors = arguments(1, 1, 2, 20, 32, torch.float32, device)
    assert not supports(*(tensor.double() for tensor in tensors), None)
    assert not supports(*tensors[:4], tensors[4].half(), None)
    assert not supports(*tensors[:4], tensors[4].mT.contiguous().mT, None)
    assert not supports(*tensors, torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="concept_attention is not enabled for torch.float64, head width 32, 2 conc"):
        concept_attention(*(tensor.double() for tensor in tensors), None)


@pytest.mark.parametrize("position", range(5))
def test_last_axis_with_gaps(position: int, device: torch.device) -> None:
    tensors = arguments(1, 1, 2, 20, 32, torch.float32, device)
    tensors[position] = tensors[position].mT.contiguous().mT
    name = ("query", "key", "value", "image_key", "image_value")[position]
    with pytest.raises(ValueError, match=rf"the last axis of {name} has stride \d+; expected 1"):
        concept_attention(*tensors, None)
