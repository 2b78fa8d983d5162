"""The suite of guidance: what it compares and chooses, and that clips with guidance and without are pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diffusers_concept_maps import cli
from diffusers_concept_maps.shapes.judge import Verdict
from diffusers_concept_maps.shapes.suite import frozen, guidance
from diffusers_concept_maps.shapes.suite.frozen import DEVELOPMENT_SEED, EVALUATION_SEED

NAMES = ("present", "coherent", "color", "shape", "motion")


def verdict(motion: float) -> Verdict:
    """Of ten clips, of which that share moves as asked."""
    every = torch.ones(10, dtype=torch.bool)
    return Verdict(every, every, every, every, torch.arange(10) < 10 * motion)


def test_scales_are_compared_with_the_layers_whose_clips_move_best(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def judged(pipe: Any, seed: int, classifier_free: float, **options: Any) -> Verdict:
        assert (seed, classifier_free) == (DEVELOPMENT_SEED, 1.0)
        asked.append(options)
        return verdict(0.9 if options.get("layers") == (2,) else 0.5)

    monkeypatch.setattr(guidance, "_verdict", judged)
    found = dict(guidance.compare(object()))  # type: ignore[arg-type]
    first, *others = frozen.GUIDED_SCALES
    assert asked == [
        {},
        *({"scale": first, "layers": layers} for layers in frozen.GUIDED_LAYERS),
        *({"scale": scale, "layers": (2,)} for scale in others),
    ]
    assert found["no guidance"]["motion"] == 0.5
    assert found[f"layers (2,), scale {first}"]["motion"] == pytest.approx(0.9)


def test_differences_are_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "PROMPTS", 4)
    off = np.array([True, True, False, False] * 2)
    on = np.array([True, False, True, True] * 2)
    result = guidance._gain("motion", off, on)
    assert result.value == pytest.approx(0.25)
    assert result.passed is None
    assert result.note.endswith("; 4 clips won, 2 lost of 8")
    same = guidance._gain("motion", off, off)
    assert (same.value, same.note) == (0.0, "95% interval +0.000 to +0.000; 0 clips won, 0 lost of 8")


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At a scale of 0 every clip is its own pair; a small slice on the shipped weights."""
    monkeypatch.setattr(frozen, "PROMPTS", 3)
    monkeypatch.setattr(guidance, "SCALE", 0.0)
    assert cli.main(["evaluate", "--suite", "guidance"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(NAMES) * 3
    for off, on, gain in zip(lines[0::3], lines[1::3], lines[2::3], strict=True):
        assert off.split()[-1] == on.split()[-1]
        assert "0.000" in gain
        assert gain.endswith(f"0 clips won, 0 lost of {3 * frozen.GUIDED_REPEATS}")


def test_command_compares(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(frozen, "PROMPTS", 1)
    monkeypatch.setattr(frozen, "GUIDED_LAYERS", ((1,),))
    monkeypatch.setattr(frozen, "GUIDED_SCALES", (1.0,))
    assert cli.main(["evaluate", "--suite", "guidance", "--guidance"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["no guidance", "layers (1,), scale 1.0"]


def test_noise_is_that_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance is there while clips are made and not afterwards, on prompts that come as often as they are judged."""
    seen: list[tuple[int, int, bool]] = []

    def judged(pipe: Any, prompts: tuple[frozen.Prompt, ...], *, seed: int, guidance_scale: float) -> Verdict:
        seen.append((len(prompts), seed, bool(entered)))
        return verdict(1.0)

    entered: list[Any] = []

    class Guided:
        def __init__(self, pipe: Any, **options: Any) -> None:
            assert options == {"scale": 0.7}

        def __enter__(self) -> None:
            entered.append(self)

        def __exit__(self, *args: Any) -> None:
            entered.pop()

    monkeypatch.setattr(guidance, "judge_generated", judged)
    monkeypatch.setattr(guidance, "cross_attention_guidance", Guided)
    guidance._verdict(object(), EVALUATION_SEED, 4.0, repeats=2)  # type: ignore[arg-type]
    guidance._verdict(object(), EVALUATION_SEED, 4.0, scale=0.7)  # type: ignore[arg-type]
    assert seen == [(240, EVALUATION_SEED, False), (120, EVALUATION_SEED, True)]
    assert not entered
