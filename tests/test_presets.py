"""Presets: recognized by the transformer's config, used where the caller names nothing, and never empty."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from backbones import tiny_cogvideox

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones import Preset, find_backbone
from diffusers_concept_maps.backbones.cogvideox import CogVideoXBackbone
from diffusers_concept_maps.plan import CapturePlan, Request, make_plan

PRESET = Preset(
    name="tiny",
    source="this test",
    config={"num_layers": 3, "num_attention_heads": 4},
    layers={"imap": (0, 2)},
    heads={"imap": dcm.HeadSelection(top_k=2), "gramcol": (1, 3)},
    steps=(0.5, 1.0),
)


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> Preset:
    monkeypatch.setattr(CogVideoXBackbone, "presets", (PRESET,))
    return PRESET


def plan_of(transformer: Any, **options: Any) -> CapturePlan:
    request = Request(concept_embeds=torch.zeros(2, 32), methods=("imap", "gramcol", "concept_attention"), **options)
    return make_plan(None, transformer, find_backbone(transformer), None, request)


def test_preset_is_used_where_nothing_is_named(preset: Preset) -> None:
    plan = plan_of(tiny_cogvideox.make_transformer())
    assert plan.methods["imap"].layers == {0, 2}
    assert plan.methods["imap"].heads == dcm.HeadSelection(top_k=2)
    assert plan.methods["gramcol"].layers == {0, 1, 2}
    assert plan.methods["gramcol"].heads == (1, 3)
    assert plan.methods["concept_attention"].heads is None
    assert plan.steps == (0.5, 1.0)


def test_what_the_caller_names_wins(preset: Preset) -> None:
    plan = plan_of(tiny_cogvideox.make_transformer(), layers=[1], heads=[0], steps=[2])
    assert all(method.layers == {1} and method.heads == (0,) for method in plan.methods.values())
    assert plan.steps == {2}


def test_another_config_has_no_preset(preset: Preset) -> None:
    plan = plan_of(tiny_cogvideox.make_transformer(layers=2))
    assert plan.methods["imap"].layers == {0, 1}
    assert plan.methods["imap"].heads == dcm.HeadSelection(top_k=4)  # the default of 5, cut to the heads there are
    assert plan.steps == (0.0, 1.0)


@pytest.mark.parametrize(
    ("fraction", "steps", "expected"),
    [
        ((0.0, 1.0), 5, [0, 1, 2, 3, 4]),
        ((0.5, 1.0), 4, [2, 3]),
        ((0.0, 0.5), 4, [0, 1]),
        ((0.7, 1.0), 10, [7, 8, 9]),
        ((0.7, 0.71), 3, [2]),
        ((0.99, 1.0), 1, [0]),
        ((1.0, 1.0), 7, [6]),
        ((0.0, 0.0), 7, [0]),
    ],
)
def test_a_fraction_of_the_schedule_is_never_empty(
    fraction: tuple[float, float], steps: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = Preset("tiny", "this test", PRESET.config, steps=fraction)
    monkeypatch.setattr(CogVideoXBackbone, "presets", (preset,))
    plan = plan_of(tiny_cogvideox.make_transformer())
    assert [step for step in range(steps) if plan.includes(step, steps)] == expected


def test_steps_of_a_preset_are_those_recorded(preset: Preset) -> None:
    pipe = tiny_cogvideox.make_pipeline()
    with dcm.trace(pipe, ["dog", "sky"]) as maps:
        tiny_cogvideox.call(pipe, num_inference_steps=4)
    with dcm.trace(pipe, ["dog", "sky"], steps=[2, 3]) as expected:
        tiny_cogvideox.call(pipe, num_inference_steps=4)
    assert torch.equal(maps.get(), expected.get())
    assert maps.coverage["concept_attention"].any(1).tolist() == [False, False, True, True]


@pytest.mark.parametrize("left", ["layers", "heads", "steps"])
def test_metadata_names_a_preset_that_chose_something(preset: Preset, left: str) -> None:
    transformer = tiny_cogvideox.make_transformer()
    named = {name: [0] for name in ("layers", "heads", "steps")}
    with dcm.trace(transformer, concept_embeds=torch.zeros(2, 32), **named) as maps:
        assert maps.metadata["preset"] is None
    with dcm.trace(transformer, concept_embeds=torch.zeros(2, 32), **named | {left: None}) as maps:
        assert maps.metadata["preset"] == {"name": "tiny", "source": "this test"}


def test_published_presets_name_layers_that_exist() -> None:
    for preset in CogVideoXBackbone.presets:
        layers = preset.config["num_layers"]
        assert isinstance(layers, int)
        assert preset.source
        assert all(0 <= layer < layers for chosen in preset.layers.values() for layer in chosen)
        assert all(len(set(chosen)) == len(chosen) for chosen in preset.layers.values())


def test_indices_of_numpy_are_indices() -> None:
    plan = plan_of(tiny_cogvideox.make_transformer(), layers=np.arange(2), heads=torch.arange(2))
    assert plan.methods["imap"].layers == {0, 1}
    assert plan.methods["imap"].heads == (0, 1)


@pytest.mark.parametrize("index", [True, 1.0, "1", None])
def test_what_is_no_index_is_refused(index: Any) -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match="is no index; expected an integer of 0 to 2"):
        plan_of(tiny_cogvideox.make_transformer(), layers=[index])
