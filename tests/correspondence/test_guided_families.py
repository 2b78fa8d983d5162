"""Guidance in every video family: the second prediction is the model's own but for what is cut."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from backbones._case import find_cases

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones import find_backbone
from diffusers_concept_maps.correspondence import guidance

CASES = {case.name: case for case in find_cases() if case.pipeline is not None and case.grid[0] > 1}
PROMPTS = ["a red dog", "the sky"]
ENDS = (0, -1)


@cache
def pipeline_of(name: str) -> Any:
    return CASES[name].pipeline()


@cache
def unguided(name: str) -> torch.Tensor:
    return CASES[name].call(pipeline_of(name), PROMPTS)


def run(name: str, scale: float, **options: Any) -> torch.Tensor:
    pipe = pipeline_of(name)
    with dcm.cross_attention_guidance(pipe, scale, **options):
        return CASES[name].call(pipe, PROMPTS)


def layer(name: str, end: int) -> int:
    transformer = pipeline_of(name).transformer
    return range(len(find_backbone(transformer).matching_sites(transformer)))[end]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", CASES)
def test_guided_frames_differ(name: str, end: int) -> None:
    guided = run(name, 1.0, layers=[layer(name, end)])
    assert guided.isfinite().all()
    assert (guided - unguided(name)).abs().max() > 1e-3 * unguided(name).abs().max()


@pytest.mark.parametrize("name", CASES)
def test_scale_zero_is_stock(name: str) -> None:
    assert torch.equal(run(name, 0.0, layers=[0]), unguided(name))
    assert torch.equal(CASES[name].call(pipeline_of(name), PROMPTS), unguided(name))


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_where_nothing_is_cut(name: str, end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that do not run again, and rows that are picked, change nothing: both predictions are then the same."""
    calls = []

    def attend(query: Any, key: Any, value: Any, *, mask: Any, linear: bool, **place: Any) -> torch.Tensor:
        calls.append(place)
        if linear:
            return (query @ key.mT) @ value
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    monkeypatch.setattr(guidance, "within_frames", attend)
    nothing = run(name, 1.0, layers=[layer(name, end)])
    assert calls
    torch.testing.assert_close(nothing, unguided(name), rtol=0, atol=2e-5 * unguided(name).abs().max().item())


@pytest.mark.parametrize("name", ["FLUX.1 schnell", "SD3", "Qwen-Image"])
def test_images(name: str) -> None:
    case = next(case for case in find_cases() if case.name == name)
    pipe = case.pipeline()
    message = "^guidance is about attention between frames, and there is only one; generate a video$"
    with (
        dcm.cross_attention_guidance(pipe, layers=[1]),
        pytest.raises(dcm.ConceptMapsValueError, match=message),
    ):
        case.call(pipe, PROMPTS)


def test_preset() -> None:
    """The embedded model has layers of its own."""
    pipe = dcm.load_shapes_pipeline()
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 2, "max_sequence_length": 20, "output_type": "latent"}

    def run() -> torch.Tensor:
        return pipe("a red circle", generator=torch.Generator().manual_seed(0), **options).frames

    with dcm.cross_attention_guidance(pipe):
        default = run()
    with dcm.cross_attention_guidance(pipe, layers=[1]):
        assert torch.equal(run(), default)
    assert not torch.equal(run(), default)
