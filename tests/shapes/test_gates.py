"""The suite of gates: what it chooses, when it is red, and a small slice of it on the shipped weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline

import diffusers_concept_maps as dcm
from diffusers_concept_maps import cli
from diffusers_concept_maps.shapes import model, suite
from diffusers_concept_maps.shapes.suite import contrast, controls, frozen, generation
from diffusers_concept_maps.shapes.suite.probe import Choice, Place, Read, object_weights, read_real, word_embeds
from diffusers_concept_maps.shapes.suite.result import Result
from diffusers_concept_maps.shapes.suite.scores import contrast_hits

CHOSEN = Choice(Place("real", 0.6, "alone"), Read("cross_attention", "all"), 4)
"""A way to read colors; the suite chooses its own."""


@pytest.fixture(scope="module")
def pipe() -> CogVideoXPipeline:
    pipe = dcm.load_shapes_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def hits(pipe: CogVideoXPipeline) -> np.ndarray:
    scenes = frozen.contrast_scenes(48, frozen.EVALUATION_SEED, "color")
    embeds = word_embeds(pipe, scenes, "color", CHOSEN.place.words)
    maps = read_real(pipe, scenes, embeds, CHOSEN.place.noise_level, frozen.EVALUATION_SEED, [CHOSEN.read.method])
    return contrast_hits(maps[CHOSEN.read][CHOSEN.layer], object_weights(scenes.masks))


def test_slice_of_the_generation_gates(pipe: CogVideoXPipeline) -> None:
    rates = generation.score_generation(pipe, frozen.generation_prompts()[:24])
    assert min(rates["present"], rates["color"]) >= 0.85
    assert min(rates["coherent"], rates["shape"], rates["motion"]) >= 0.75


def test_slice_of_the_contrast_gate(pipe: CogVideoXPipeline) -> None:
    assert hits(pipe).mean() >= 0.85


def test_untrained_weights_are_at_chance() -> None:
    torch.manual_seed(42)
    untrained = model.build_pipeline(model.build_transformer(), model.build_text_encoder())
    assert 0.25 <= hits(untrained).mean() <= 0.75


def planted_hits(accuracy: dict[Place, dict[Read, list[float]]]) -> contrast.Hits:
    """Hits `[layer, 100 clips]` with these accuracies per layer."""
    return {
        place: {read: np.arange(100) < 100 * np.array(rates)[:, None] for read, rates in reads.items()}
        for place, reads in accuracy.items()
    }


def test_choose_takes_the_best_layer_but_the_first() -> None:
    near, far, made = Place("real", 0.6, "alone"), Place("real", 0.8, "in prompt"), Place("generated", 0.6, "alone")
    one, motion = Read("gramcol", "2"), Read("imap", "motion")
    development = planted_hits(
        {
            near: {one: [0.99, 0.5, 0.7], motion: [0.1, 0.2, 0.3]},
            far: {one: [0.0, 0.6, 0.8], motion: [0.1, 0.75, 0.3]},
            made: {one: [1.0, 0.95, 0.9], motion: [0.1, 0.2, 0.4]},
        }
    )
    assert contrast.choose(development) == Choice(made, one, 1)
    assert contrast.choose(development, source="real") == Choice(far, one, 2)
    assert contrast.choose(development, words="alone", source="real") == Choice(near, one, 2)
    assert contrast.choose(development, "imap motion") == Choice(far, motion, 1)
    assert contrast.choose(development, "gramcol", "real", "in prompt") == Choice(far, one, 2)


@pytest.mark.parametrize(("gate", "claimed", "passed"), [(0.8, True, True), (0.81, True, False), (0.81, False, None)])
def test_no_claim_without_generation(gate: float, claimed: bool, passed: bool | None) -> None:
    choice = Choice(Place("real", 0.6, "alone"), Read("gramcol", "2"), 1)
    scored = planted_hits({choice.place: {choice.read: [0.0, 0.8]}})
    result = contrast.score("contrast", choice, scored, gate, claimed)
    assert result.value == 0.8
    assert result.passed is passed
    assert ("no claim" in str(result)) is not claimed


@pytest.mark.parametrize(
    ("hits", "passed"),
    [
        (np.arange(2000) % 2 > 0, True),
        (np.arange(2000) % 5 > 1, False),  # 0.6 is not chance
        (np.arange(40) % 2 > 0, False),  # too few clips to tell
    ],
)
def test_control_is_at_chance_or_red(hits: np.ndarray, passed: bool) -> None:
    result = controls.at_chance("control", hits, np.arange(len(hits)))
    assert result.passed is passed
    assert result.value == hits.mean()


def test_controls_read_what_was_chosen(pipe: CogVideoXPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent words hit by coin; untrained models are as many, and as different, as the frozen numbers say."""
    monkeypatch.setattr(frozen, "CONTROL_MODELS", 3)
    monkeypatch.setattr(frozen, "CONTROL_CLIPS", 8)
    monkeypatch.setattr(frozen, "ABSENT_CLIPS", 160)
    untrained, absent = controls.control_results(pipe, "color", CHOSEN)
    assert untrained.note.endswith("3 clusters")
    assert absent.note.endswith("clusters")
    assert 10 <= int(absent.note.split()[-2]) <= 16
    assert 0.35 < absent.value < 0.65


@pytest.mark.parametrize(("value", "status", "mark"), [(0.89, 1, "RED"), (0.9, 0, "ok")])
def test_command_ends_with_the_state_of_the_gates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float, status: int, mark: str
) -> None:
    def results(pipe: CogVideoXPipeline) -> Iterator[Result]:
        yield Result("beside", 0.1)
        yield Result.at_least("gate", value, 0.9, "layer 1")

    monkeypatch.setattr(suite, "evaluate", results)
    assert cli.main(["evaluate", "--suite", "shapes"]) == status
    beside, gate, last = capsys.readouterr().out.splitlines()
    assert beside.split() == ["beside", "0.100"]
    assert gate.split() == ["gate", f"{value:.3f}", ">=", "0.90", mark, "layer", "1"]
    assert last == ("1 gates are red: gate" if status else "all gates are green")


def test_command_compares_guidance(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(frozen, "GUIDANCE_SCALES", (1.0, 2.0))
    monkeypatch.setattr(frozen, "PROMPTS", 2)
    assert cli.main(["evaluate", "--suite", "shapes", "--guidance"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["guidance 1.0", "guidance 2.0"]
    assert all(name in lines[0] for name in frozen.GENERATION_GATES)


def test_folder_without_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "--suite", "shapes", "--model", str(tmp_path)]) == 2
    assert "there is no model_index.json in" in capsys.readouterr().err
