"""`torch.compile` takes every op into one graph, and PyTorch's own checks of custom ops pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import op_arguments
import pytest
import torch

from diffusers_concept_maps import dispatch, ops, ops_matching

BACKENDS = ("reference", "kernels")
every_op = pytest.mark.parametrize("name", op_arguments.OPS)


def public(name: str, tensors: tuple[Any, ...]) -> Any:
    """The call of the function behind which an op is."""
    if name == "segment_attention":
        *first, mask, weights, frames, scale = tensors
        return ops_matching.segment_attention(*first, weights, frames, text_mask=mask, scale=scale)
    if name == "temporal_matching":
        *first, scale, direction, radius = tensors
        return ops_matching.temporal_matching(*first, scale=scale, direction=direction, radius=radius)
    if name == "accumulate_similarity_":
        return ops.accumulate_similarity_(*tensors[:4], scale=tensors[4])
    if name == "frame_spread":
        return ops.frame_separability(tensors[0], tensors[2], "davies_bouldin")
    if name == "frame_statistics":
        statistics = ops.frame_statistics(*tensors)
        return statistics.mean, statistics.within
    if name == "gram_columns":
        return ops.gram_columns(*tensors[:3], standardize=tensors[3], multiplicity=tensors[4])
    if name == "similarity":
        return ops.query_key_similarity(tensors[1], tensors[0], tensors[2], standardize=tensors[4])
    if name == "similarity_and_statistics":
        scores, statistics = ops.similarity_and_statistics(*tensors)
        return scores, statistics.mean, statistics.within
    function: Callable[..., Any] = getattr(ops, name)
    return function(*tensors)


def run(function: Callable[..., Any], name: str, device: torch.device) -> tuple[torch.Tensor, ...]:
    given = op_arguments.arguments(name, device)
    return op_arguments.results(function(name, given), given)


@every_op
def test_one_graph(name: str, device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(public, fullgraph=True, backend="aot_eager", dynamic=True)
    for backend in BACKENDS:
        with dispatch.use_backend(backend):
            expected, actual = run(public, name, device), run(compiled, name, device)
        assert len(actual) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@every_op
@pytest.mark.parametrize("backend", BACKENDS)
def test_pytorch_accepts_the_op(name: str, backend: str, device: torch.device) -> None:
    op = getattr(torch.ops.diffusers_concept_maps, name).default
    with dispatch.use_backend(backend):
        torch.library.opcheck(op, op_arguments.arguments(name, device))


@every_op
@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors_are_like_the_real_ones(name: str, backend: str, device: torch.device) -> None:
    """Strides too: a compiled graph relies on them."""
    given = op_arguments.arguments(name, device)
    function = getattr(dispatch, name)
    with dispatch.use_backend(backend):
        real = op_arguments.results(function(*given), given)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = op_arguments.results(function(*given), given)
    described = [[(t.shape, t.stride(), t.dtype, t.device) for t in tensors] for tensors in (fake, real)]
    assert described[0] == described[1]


@pytest.mark.parametrize("name", [name for name in op_arguments.OPS if name != "accumulate_similarity_"])
def test_an_op_says_that_it_has_no_gradient(name: str, device: torch.device) -> None:
    given = op_arguments.arguments(name, device)
    given[0].requires_grad_()
    function = getattr(dispatch, name)
    result = op_arguments.results(function(*given), given)[-1]
    with pytest.raises(RuntimeError, match=f"backward through diffusers_concept_maps.{name}"):
        result.sum().backward()
    with torch.no_grad():
        assert not any(tensor.requires_grad for tensor in op_arguments.results(function(*given), given))
