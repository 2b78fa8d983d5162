"""The five model families that every feature of the host is tried on, and what they have in common in these tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from backbones._case import Case, find_cases

import diffusers_concept_maps as dcm

CONCEPTS = ["dog", "sky", "red"]
PROMPTS = ["a red dog", "the sky"]
Run = Callable[[], torch.Tensor]


_known = {case.name: case for case in find_cases()}
NAMES = ("CogVideoX", "Wan 2.1", "HunyuanVideo", "FLUX.1 dev", "SD3")
FAMILIES = COGVIDEOX, WAN, HUNYUAN, FLUX, SD3 = tuple(_known[name] for name in NAMES)
TWO = _known["Wan 2.2"]


@cache
def pipeline_of(case: Case) -> Any:
    """A pipeline that no test changes for good."""
    return case.pipeline()


def run(case: Case, pipe: Any, **options: Any) -> torch.Tensor:
    """Latents of two prompts."""
    return case.call(pipe, PROMPTS, **options)


def traced(case: Case, pipe: Any, **options: Any) -> tuple[torch.Tensor, dcm.ConceptMaps]:
    """Latents of two prompts, and the maps of every method."""
    with dcm.trace(pipe, CONCEPTS, methods=case.methods) as maps:
        return run(case, pipe, **options), maps


def same_maps(case: Case, maps: dcm.ConceptMaps, expected: dcm.ConceptMaps, tolerance: float = 1e-5) -> None:
    """Maps are equal relative to the largest value of the method, and made of the same steps and layers."""
    for method in case.methods:
        scale = float(expected.get(method).abs().max())
        torch.testing.assert_close(maps.get(method), expected.get(method), rtol=0, atol=tolerance * scale)
        assert torch.equal(maps.coverage[method], expected.coverage[method])
