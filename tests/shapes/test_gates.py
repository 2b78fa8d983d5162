"""A small slice of the gates, on the shipped weights; `shapes/evaluate.py` run as a command has the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline

import diffusers_concept_maps as dcm
from diffusers_concept_maps.shapes import evaluate, model
from diffusers_concept_maps.shapes.captions import WORDS, full_captions
from diffusers_concept_maps.shapes.scenes import BACKGROUNDS, COLORS, HELD_OUT, MOTIONS, SHAPES, Scenes

METHOD, LAYER, HEAD = "cross_attention", 4, 1
"""What `choose_head` finds on clips of the development seed."""


@pytest.fixture(scope="module")
def pipe() -> CogVideoXPipeline:
    pipe = dcm.load_shapes_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return evaluate.contrast_scenes(48, evaluate.EVALUATION_SEED, "color")


def test_prompts_are_balanced_and_frozen() -> None:
    prompts = evaluate.generation_prompts()
    assert prompts == evaluate.generation_prompts()
    assert len(prompts) == 120
    assert set(Counter(prompt.text for prompt in prompts).values()) <= {1, 2}
    assert Counter(prompt.color for prompt in prompts) == dict.fromkeys(COLORS, 30)
    assert Counter(prompt.shape for prompt in prompts) == dict.fromkeys(SHAPES, 40)
    motions = Counter(prompt.motion for prompt in prompts)
    assert set(motions) == set(MOTIONS)
    assert max(motions.values()) - min(motions.values()) == 1
    assert Counter(prompt.text.split()[-2] for prompt in prompts) == dict.fromkeys(BACKGROUNDS, 60)
    assert not {(prompt.color, prompt.shape) for prompt in prompts} & set(HELD_OUT)
    for prompt in prompts:
        assert prompt.text.startswith(f"a {prompt.color} {prompt.shape} {prompt.motion} on ")
        assert set(prompt.text.split()) <= set(WORDS)


@pytest.mark.parametrize("word", ["color", "shape", "motion"])
def test_contrast_scenes_differ_in_the_word(word: str) -> None:
    scenes = evaluate.contrast_scenes(40, evaluate.DEVELOPMENT_SEED, word)
    again = evaluate.contrast_scenes(40, evaluate.DEVELOPMENT_SEED, word)
    other = evaluate.contrast_scenes(40, evaluate.EVALUATION_SEED, word)
    first, second = getattr(scenes, word).T
    assert len(scenes) == len(scenes.video) == 40
    assert bool((first != second).all())
    assert bool((scenes.count == 2).all())
    assert torch.equal(scenes.video, again.video)
    assert full_captions(scenes) == full_captions(again)
    assert not torch.equal(scenes.video, other.video)


@pytest.mark.parametrize(("swapped", "expected"), [(False, 1.0), (True, 0.0)])
def test_contrast_of_planted_maps(
    pipe: CogVideoXPipeline, scenes: Scenes, monkeypatch: pytest.MonkeyPatch, swapped: bool, expected: float
) -> None:
    """Maps that are the objects' own masks, drowned in what both share, win every clip; exchanged they win none."""
    planted = scenes.masks.unflatten(-1, (8, 4)).unflatten(-3, (8, 4)).mean((-1, -3))
    shared = torch.randn(planted[:, :1].shape, generator=torch.Generator().manual_seed(41)) * 10
    planted = (planted.flip(1) if swapped else planted) + shared
    seen: list[dict[str, Any]] = []

    @contextmanager
    def planted_trace(transformer: Any, **options: Any) -> Iterator[Any]:
        start = sum(len(call["concept_embeds"]) for call in seen)
        seen.append(options)
        yield SimpleNamespace(get=lambda method: planted[start : start + len(options["concept_embeds"])])

    monkeypatch.setattr(evaluate, "trace", planted_trace)
    assert evaluate.contrast_accuracy(pipe, scenes, "gramcol", 3, 2, 0.6) == expected
    options = seen[0]
    assert (list(options["methods"]), list(options["layers"]), list(options["heads"])) == (["gramcol"], [3], [2])
    assert options["normalize"] == "none"
    word = pipe.tokenizer([list(COLORS)[scenes.color[5, 1]]], padding="max_length", max_length=20, return_tensors="pt")
    with torch.no_grad():
        alone = pipe.text_encoder(word.input_ids)[0][0, 0]
    torch.testing.assert_close(options["concept_embeds"][5, 1], alone)


def test_transformer_sees_the_noised_clip_and_its_caption(pipe: CogVideoXPipeline, scenes: Scenes) -> None:
    calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(args))
    try:
        evaluate.contrast_accuracy(pipe, scenes, METHOD, 0, 0, 0.25)
    finally:
        hook.remove()
    noisy, text, timestep = (torch.cat(parts) for parts in zip(*calls, strict=True))
    assert timestep.tolist() == [250] * 48
    alpha = pipe.scheduler.alphas_cumprod[250]
    noise = (noisy - alpha.sqrt() * scenes.video) / (1 - alpha).sqrt()
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    assert abs(float((noise * scenes.video).mean())) < 0.01
    ids = pipe.tokenizer(full_captions(scenes), padding="max_length", max_length=20, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(text, pipe.text_encoder(ids)[0])


def test_slice_of_the_generation_gate(pipe: CogVideoXPipeline) -> None:
    rates = evaluate.score_generation(pipe, evaluate.generation_prompts()[:24])
    assert rates["present"] >= 0.7
    assert rates["color"] >= 0.7


def test_slice_of_the_contrast_gate(pipe: CogVideoXPipeline, scenes: Scenes) -> None:
    assert evaluate.contrast_accuracy(pipe, scenes, METHOD, LAYER, HEAD, 0.6) >= 0.7


def test_untrained_weights_are_at_chance(scenes: Scenes) -> None:
    torch.manual_seed(42)
    untrained = model.build_pipeline(model.build_transformer(), model.build_text_encoder())
    assert 0.25 <= evaluate.contrast_accuracy(untrained, scenes, METHOD, LAYER, HEAD, 0.6) <= 0.75


def test_choose_head_is_the_contrast_of_every_head(pipe: CogVideoXPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table holds what `contrast_accuracy` says of that head, on clips of the development seed."""
    monkeypatch.setattr(evaluate, "_DEVELOPMENT_CLIPS", 8)
    monkeypatch.setattr(evaluate, "LAYERS", 2)
    table = evaluate.choose_head(pipe, ["gramcol"])["gramcol"]
    assert table.shape == (2, model.HEADS)
    scenes = evaluate.contrast_scenes(8, evaluate.DEVELOPMENT_SEED, "color")
    for layer, head in ((0, 3), (1, 2)):
        assert table[layer, head] == evaluate.contrast_accuracy(pipe, scenes, "gramcol", layer, head, 0.6)


def test_bootstrap_interval() -> None:
    assert evaluate.bootstrap_interval(np.ones(50, dtype=bool)) == (1, 1)
    low, high = evaluate.bootstrap_interval(np.arange(400) % 4 > 0)
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)


@pytest.mark.parametrize(("value", "status", "mark"), [(0.89, 1, "RED"), (0.9, 0, "ok")])
def test_command_ends_with_the_state_of_the_gates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float, status: int, mark: str
) -> None:
    results = [evaluate.Result("beside", 0.1), evaluate.Result("gate", value, 0.9, "layer 1")]
    monkeypatch.setattr(evaluate, "evaluate", lambda pipe: iter(results))
    monkeypatch.setattr("sys.argv", ["evaluate"])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert ended.value.code == status
    beside, gate = capsys.readouterr().out.splitlines()
    assert beside.split() == ["beside", "0.100"]
    assert gate.split() == ["gate", f"{value:.3f}", ">=", "0.90", mark, "layer", "1"]


def test_errors(pipe: CogVideoXPipeline, scenes: Scenes) -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match="word is 'size'; expected one of color, shape, motion"):
        evaluate.contrast_scenes(4, 1, "size")
    with pytest.raises(dcm.ConceptMapsValueError, match="word is 'size'"):
        evaluate.contrast_accuracy(pipe, scenes, METHOD, LAYER, HEAD, 0.6, word="size")
    for level in (-0.1, 1.0):
        with pytest.raises(dcm.ConceptMapsValueError, match=f"noise_level is {level}; expected 0"):
            evaluate.contrast_accuracy(pipe, scenes, METHOD, LAYER, HEAD, level)
