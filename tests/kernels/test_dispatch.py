"""Which code runs an op, and that a whole capture through the kernels equals the reference's."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from types import ModuleType
from typing import Any, NoReturn

import op_arguments
import pytest
import torch
from backbones import tiny_cogvideox as tiny

import concept_map_kernels
import diffusers_concept_maps as dcm
from diffusers_concept_maps import ConceptMapsValueError, dispatch, reference, reference_matching

METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")
every_op = pytest.mark.parametrize("name", op_arguments.OPS)


REFERENCES = (reference, reference_matching)
KERNELS = (concept_map_kernels,)


@pytest.fixture(autouse=True, scope="module")
def _launched(device: torch.device) -> None:
    """Whether the device runs kernels is tried once, and must not be while they are forbidden."""
    with dispatch.use_backend("kernels"):
        assert dispatch._kernels_for(device) is concept_map_kernels


@contextmanager
def forbidden(sources: tuple[ModuleType, ...]) -> Iterator[None]:
    """The ops of these modules fail when they are called."""

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("an op ran that must not")

    with pytest.MonkeyPatch.context() as patch:
        for source, name in product(sources, op_arguments.OPS):
            if hasattr(source, name):
                patch.setattr(source, name, refuse)
        yield


def plain(name: str) -> Any:
    """The function of the reference."""
    return getattr(reference, name, None) or getattr(reference_matching, name)


def run(function: Any, name: str, **options: Any) -> tuple[torch.Tensor, ...]:
    given = op_arguments.arguments(name, **options)
    return op_arguments.results(function(*given), given)


def test_every_op_is_known() -> None:
    assert set(dispatch.__all__) - {"BACKENDS", "NAMESPACE", "use_backend"} == set(op_arguments.OPS)
    assert set(concept_map_kernels.__all__) - {"supports"} == set(op_arguments.OPS)


@every_op
def test_the_cpu_runs_the_reference(name: str) -> None:
    with forbidden(KERNELS):
        results = run(getattr(dispatch, name), name)
    assert all(torch.equal(*pair) for pair in zip(results, run(plain(name), name), strict=True))


@every_op
def test_kernels_run_where_they_are_asked_for(name: str, device: torch.device, poisoned: None) -> None:
    with dispatch.use_backend("kernels"), forbidden(REFERENCES):
        results = run(getattr(dispatch, name), name, device=device)
    direct = run(getattr(concept_map_kernels, name), name, device=device)
    assert all(torch.equal(*pair) for pair in zip(results, direct, strict=True))
    for actual, expected in zip(results, run(plain(name), name, device=device), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@every_op
def test_the_reference_runs_what_no_kernel_is_enabled_for(name: str, device: torch.device) -> None:
    given = op_arguments.arguments(name, device, dtype=torch.float64)
    assert not concept_map_kernels.supports(name, *given)
    with dispatch.use_backend("kernels"), forbidden(KERNELS):
        results = op_arguments.results(getattr(dispatch, name)(*given), given)
    expected = run(plain(name), name, device=device, dtype=torch.float64)
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_what_no_kernel_reads_at_once_two_kernels_read(device: torch.device, poisoned: None) -> None:
    concept, image = torch.randn(2, 1, 2, 66, 32, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    given = concept, image, torch.tensor([[0.5, 2.0]], device=device), 3
    assert not concept_map_kernels.supports("similarity_and_statistics", *given)
    with dispatch.use_backend("kernels"), forbidden(REFERENCES):
        results = dispatch.similarity_and_statistics(*given)
    for actual, expected in zip(results, reference.similarity_and_statistics(*given), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@every_op
def test_the_reference_runs_where_it_is_asked_for(name: str, device: torch.device) -> None:
    with dispatch.use_backend("reference"), forbidden(KERNELS):
        run(getattr(dispatch, name), name, device=device)


@pytest.mark.parametrize(
    ("backend", "devices"), [("auto", {"cuda"}), ("kernels", {"cuda", "cpu", "mps"}), ("reference", set())]
)
def test_devices(backend: str, devices: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_runs", lambda kernels, device: True)
    with dispatch.use_backend(backend):
        for device in ("cuda", "cpu", "mps"):
            expected = concept_map_kernels if device in devices else None
            assert dispatch._kernels_for(torch.device(device)) is expected


def test_the_choice_ends_with_the_block() -> None:
    def chosen() -> bool:
        return dispatch._kernels_for(torch.device("cpu")) is not None

    def fail() -> NoReturn:
        assert not chosen()
        raise KeyError

    with dispatch.use_backend("kernels"):
        with pytest.raises(KeyError), dispatch.use_backend("reference"):
            fail()
        assert chosen()
    assert not chosen()


def test_unknown_backends_are_refused() -> None:
    message = "unknown backend 'cuda'; expected one of auto, kernels, reference"
    with pytest.raises(ConceptMapsValueError, match=message), dispatch.use_backend("cuda"):
        pass


def test_unknown_ops_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown op 'gram'; expected one of accumulate_similarity_, attention"):
        concept_map_kernels.supports("gram")


def read(maps: Any, method: str) -> torch.Tensor:
    """The map of a method, of every guidance branch that was captured."""
    branches = maps.values() if isinstance(maps, dict) else [maps]
    return torch.stack([branch.get(method) for branch in branches])


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="clip"),
        pytest.param({"parity": "imap", "branch": "both"}, id="text"),
        pytest.param({"target": "prompt", "concepts": ["dog", "beach"]}, id="prompt"),
        pytest.param({"heads": dcm.HeadSelection("davies_bouldin", 2), "reads": "image"}, id="davies_bouldin"),
    ],
)
def test_a_capture_through_the_kernels(options: dict[str, Any], device: torch.device, poisoned: None) -> None:
    pipe = tiny.make_pipeline(layers=2, heads=3, attention_head_dim=32)
    pipe.to(device)
    maps: dict[str, Any] = {}
    for backend, other in (("kernels", REFERENCES), ("reference", KERNELS)):
        settings = {"concepts": ["dog", "running", "sky"], "methods": METHODS} | options
        with dispatch.use_backend(backend), forbidden(other), dcm.trace(pipe, **settings) as maps[backend]:
            tiny.call(pipe, num_inference_steps=1)
    for method in METHODS:
        actual, expected = (read(maps[backend], method) for backend in ("kernels", "reference"))
        assert expected.std() > 1e-3 * expected.abs().max()
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, {"similarity_and_statistics": 2}, id="once"),
        pytest.param({"methods": ("imap", "concept_attention")}, {"similarity_and_statistics": 2}, id="other order"),
        pytest.param(
            {"heads": dcm.HeadSelection("fisher", 2)}, {"frame_statistics": 2, "similarity": 2}, id="of chosen heads"
        ),
        pytest.param({"heads": (0, 2)}, {"similarity": 2}, id="of named heads"),
        pytest.param({"space": "value"}, {"frame_statistics": 2, "similarity": 2}, id="values"),
        pytest.param({"normalize": "zscore"}, {"frame_statistics": 2, "similarity": 2}, id="standardized"),
        pytest.param({"methods": ("imap",)}, {"frame_statistics": 2}, id="imap alone"),
        pytest.param({"methods": ("concept_attention",)}, {"similarity": 2}, id="concept_attention alone"),
    ],
)
def test_one_read_serves_the_map_and_the_choice_of_heads(
    options: dict[str, Any],
    expected: dict[str, int],
    backend: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the outputs of each of two layers: two reads where the map depends on the choice, or is not of outputs."""
    calls: Counter[str] = Counter()

    def counted(name: str, op: Any) -> Any:
        def run(*arguments: Any) -> Any:
            calls[name] += 1
            return op(*arguments)

        return run

    for name in ("frame_statistics", "similarity", "similarity_and_statistics"):
        monkeypatch.setattr(dispatch, name, counted(name, getattr(dispatch, name)))
    pipe = tiny.make_pipeline(layers=2, heads=3, attention_head_dim=32)
    pipe.to(device)
    settings = {"methods": ("concept_attention", "imap"), "concepts": ["dog", "running"]} | options
    with dispatch.use_backend(backend), dcm.trace(pipe, **settings) as maps:
        tiny.call(pipe, num_inference_steps=1)
    assert calls == expected
    assert list(maps.methods) == list(settings["methods"])


def test_a_kernel_that_cannot_be_launched(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """No compiler, say: the first launch fails, every op runs on the reference, and one warning says why."""
    launches = []

    def fail(*arguments: Any) -> NoReturn:
        launches.append(arguments)
        raise RuntimeError("Failed to find C compiler")

    for name in op_arguments.OPS:
        monkeypatch.setattr(concept_map_kernels, name, fail)
    monkeypatch.setattr(dispatch, "_runs", functools.cache(dispatch._runs.__wrapped__))
    monkeypatch.setattr(dispatch.logger, "propagate", True)
    with dispatch.use_backend("kernels"), caplog.at_level("WARNING"):
        for name in ("similarity", "gram_columns", "similarity"):
            for result, expected in zip(run(getattr(dispatch, name), name), run(plain(name), name), strict=True):
                assert torch.equal(result, expected)
    assert len(launches) == 1
    (record,) = caplog.records
    assert "cannot be launched there (RuntimeError: Failed to find C compiler)" in record.getMessage()
    assert "needs a C compiler" in record.getMessage()
