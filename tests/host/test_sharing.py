"""Two pipelines on one transformer: a capture of one records its runs alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones._oracle import kept_state
from host._families import CONCEPTS, Case, pipeline_of, run, same_maps, traced
from host._features import Blank, cells

import diffusers_concept_maps as dcm


def second_pipeline(pipe: Any) -> Any:
    """Another one with the same models and a scheduler of its own."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other = type(pipe)(**{**pipe.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize(("case", "blank"), cells("sharing"))
def test_runs_of_another_pipeline_are_left_out(case: Case, blank: Blank | None) -> None:
    """Before, between and behind the runs of the traced one; frames of both are as without a capture."""
    pipe = pipeline_of(case)
    other = second_pipeline(pipe)
    off, expected = traced(case, pipe)
    before, longer = kept_state(pipe.transformer), run(case, other, num_inference_steps=5)
    with dcm.trace(pipe, CONCEPTS, methods=case.methods) as maps:
        assert torch.equal(run(case, other), off)
        assert torch.equal(run(case, pipe), off)
        same_maps(case, maps, expected, 0.0)
        assert torch.equal(run(case, other, num_inference_steps=5), longer)
        assert torch.equal(run(case, pipe), off)
        assert torch.equal(run(case, other), off)
    same_maps(case, maps, expected, 0.0)
    assert kept_state(pipe.transformer) == before


@pytest.mark.parametrize(("case", "blank"), cells("sharing"))
def test_a_run_within_a_run(case: Case, blank: Blank | None) -> None:
    """In a callback, between two steps: guidance in two passes cannot tell its own third pass, and says so."""
    pipe = pipeline_of(case)
    other = second_pipeline(pipe)
    off, expected = traced(case, pipe)

    def callback(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        run(case, other)
        return tensors

    with dcm.trace(pipe, CONCEPTS, methods=case.methods) as maps:
        if case.guidance == "batched":
            assert torch.equal(run(case, pipe, callback_on_step_end=callback), off)
            same_maps(case, maps, expected, 0.0)
        else:
            with pytest.raises(dcm.ConceptMapsError, match="use the transformer for nothing else while"):
                run(case, pipe, callback_on_step_end=callback)
    assert torch.equal(run(case, pipe), off)


@pytest.mark.parametrize(("case", "blank"), cells("sharing"))
def test_two_captures_at_once_are_refused(case: Case, blank: Blank | None) -> None:
    pipe = pipeline_of(case)
    second = dcm.trace(second_pipeline(pipe), CONCEPTS, methods=case.methods)
    with dcm.trace(pipe, CONCEPTS, methods=case.methods) as maps:
        with pytest.raises(dcm.ConceptMapsError, match="is being traced already"), second:
            pass
        run(case, pipe)
    assert maps.coverage["imap"].all()
