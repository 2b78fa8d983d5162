"""Tensors whose elements 32 bits cannot count."""

from __future__ import annotations

from collections.abc import Callable

import op_arguments
import pytest
import torch

import concept_map_kernels

FarApart = Callable[[torch.Tensor, int], torch.Tensor]


@pytest.mark.parametrize("axis", [1, 2])  # heads or text rows, and tokens
@pytest.mark.parametrize("name", op_arguments.OPS)
def test_offsets_beyond_32_bits(
    name: str, axis: int, device: torch.device, far_apart: FarApart, poisoned: None
) -> None:
    """Each tensor in turn is laid out with gaps: it holds the same, so the result is the same."""
    function = getattr(concept_map_kernels, name)
    given = op_arguments.arguments(name, device, torch.float16)
    expected = op_arguments.results(function(*given), given)
    places = [n for n, one in enumerate(given) if isinstance(one, torch.Tensor) and one.ndim > axis + 1]
    assert places
    for place in places:
        given = op_arguments.arguments(name, device, torch.float16)
        given = *given[:place], far_apart(given[place], axis), *given[place + 1 :]
        assert concept_map_kernels.supports(name, *given)
        for found, near in zip(op_arguments.results(function(*given), given), expected, strict=True):
            assert torch.equal(found, near)
