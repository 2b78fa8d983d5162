"""Context parallelism in two processes on the CPU: frames are those of the host, maps those of one process."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backbones import tiny_ltx
from backbones._oracle import embeds_of
from host import _parallel_worker as worker
from host._families import Case
from host._features import Blank, cells

import diffusers_concept_maps as dcm

Results = list[tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]]
"""Tensors of every run, and what the host says to the other families, of each process."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each process has saved."""
    folder = tmp_path_factory.mktemp("parallel")
    command = [sys.executable, worker.__file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def expected_of(case: Case, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same in one process."""
    transformer = case.make()
    words = {"a": [0], "b": [3, 4]}
    with torch.no_grad(), dcm.trace(transformer, concept_embeds=embeds_of(case), methods=case.methods) as maps:
        frames = transformer(**inputs, return_dict=False)[0]
    target = {"target": "prompt", "prompt_tokens": words, "methods": ["cross_attention"]}
    with torch.no_grad(), dcm.trace(transformer, list(words), **target) as of_words:
        transformer(**inputs, return_dict=False)
    return {"off": frames, "words": of_words.get()} | {method: maps.get(method) for method in case.methods}


PARALLEL = [cell for cell in cells("context parallel") if cell.values[1] is None]
OTHERS = [cell for cell in cells("context parallel") if cell.values[1] is not None]


@pytest.mark.parametrize(("case", "blank"), PARALLEL)
@pytest.mark.parametrize("how", worker.RUNS)
def test_every_process_has_the_maps_of_one(case: Case, blank: Blank | None, how: str, results: Results) -> None:
    expected = expected_of(case, worker.inputs_of(case))
    for rank in range(2):
        tensors = results[rank][0][f"{case.name} {how}"]
        assert torch.equal(tensors["on"], tensors["off"])
        for name, value in expected.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(tensors[name], value, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(("case", "blank"), OTHERS)
def test_the_others_have_no_plan(case: Case, blank: Blank, results: Results) -> None:
    assert blank.match in results[0][1][case.name]


def test_other_families_are_refused() -> None:
    """Whose text each process may have in part, or at positions of its own."""
    case = tiny_ltx.CASES[0]
    transformer, inputs = case.make(), case.inputs(1, 5, 1)
    parallel = SimpleNamespace(context_parallel_config=SimpleNamespace())
    message = (
        "^this LTXVideoTransformer3DModel is context parallel.*one of FluxTransformer2DModel, WanT.*in one process$"
    )
    with dcm.trace(transformer, concept_embeds=embeds_of(case), methods=case.methods), torch.no_grad():
        transformer._parallel_config = parallel
        with pytest.raises(dcm.ConceptMapsError, match=message):
            transformer(**inputs)
    with pytest.raises(dcm.ConceptMapsError, match=message):
        dcm.capture.attach(transformer, concept_embeds=embeds_of(case), methods=case.methods)
