"""Attention without other frames, against all weights at once in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones._case import find_cases, seeded

from diffusers_concept_maps.backbones import find_backbone
from diffusers_concept_maps.correspondence.guidance import _Guide, _Settings
from diffusers_concept_maps.correspondence.within_frames import MODES, within_frames
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.listener import Pass
from diffusers_concept_maps.processors import concept_processor

START, FRAMES, SIZE, TOKENS = 3, 3, 4, 17
HEADS = tuple(seeded(2, 3, TOKENS, 8, seed=seed) for seed in (1, 2, 3))


def output_of(transformer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def masks() -> dict[str, torch.Tensor | None]:
    padding = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    padding[0, ..., -1] = padding[1, ..., 0] = False
    causal = torch.arange(TOKENS)[:, None] + SIZE > torch.arange(TOKENS)
    numbers = seeded(2, 3, TOKENS, TOKENS, seed=4)
    return {"none": None, "padding": padding, "causal": causal[None, None], "numbers": numbers}


def allowed() -> torch.Tensor:
    """Which tokens see one another `[S, S]`."""
    frame = torch.full((TOKENS,), -1)
    frame[START : START + FRAMES * SIZE] = torch.arange(FRAMES).repeat_interleave(SIZE)
    return (frame[:, None] == frame) | (frame[:, None] < 0) | (frame < 0)


def naive(mode: str, mask: torch.Tensor | None) -> torch.Tensor:
    query, key, value = (tensor.double() for tensor in HEADS)
    logits = query @ key.mT / 8**0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
    if mode == "renorm":
        return logits.masked_fill(~allowed(), -torch.inf).softmax(-1) @ value
    return (logits.softmax(-1) * allowed()) @ value


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("mode", MODES)
def test_softmax_attention(mode: str, mask: str) -> None:
    actual = within_frames(*HEADS, start=START, frames=FRAMES, size=SIZE, mode=mode, mask=masks()[mask])
    torch.testing.assert_close(actual.double(), naive(mode, masks()[mask]), rtol=0, atol=1e-5)


def test_linear_attention() -> None:
    query, key, value = (tensor.double() for tensor in HEADS)
    actual = within_frames(*HEADS, start=START, frames=FRAMES, size=SIZE, mode="zero", linear=True)
    torch.testing.assert_close(actual.double(), ((query @ key.mT) * allowed()) @ value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", ["CogVideoX", "HunyuanVideo 1.5", "Mochi", "SkyReels-V2 diffusion forcing", "LTX-2", "Sana-Video"]
)
def test_models_take_it(name: str, mode: str) -> None:
    """In place of attention in all layers of a model, with the mask that this has."""
    case = next(case for case in find_cases() if case.name == name)
    transformer, inputs = case.make(), case.inputs(2, case.text_lengths[-1], 1)
    backbone = find_backbone(transformer)
    sites = {transformer: backbone.matching_sites(transformer)}
    settings = _Settings(1.0, frozenset(range(case.layers)), 0.0, 1.0, mode)
    off = output_of(transformer, inputs)
    guide = _Guide(settings, backbone, sites, None)
    guide.perturbed = Pass(transformer, inputs, 0, slice(None), {}, backbone.grid(transformer, inputs))
    for site in sites[transformer]:
        processor: Any = concept_processor(site.attention.processor)
        processor.guide, site.attention.processor = guide, processor
    if name == "Sana-Video" and mode == "renorm":
        with pytest.raises(ConceptMapsValueError, match="^mode is 'renorm', but attention between frames is linear"):
            output_of(transformer, inputs)
        return
    cut = output_of(transformer, inputs)
    assert cut.isfinite().all()
    assert (cut - off).abs().max() > 1e-2 * off.abs().max()
