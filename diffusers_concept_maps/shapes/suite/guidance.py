"""Does guidance by the attention between frames make things move as asked? The judge on clips with it and without.

Both have the same prompts and noise, so that every clip has its pair. Besides with the classifier-free guidance that
the model is used with, where next to all clips move as asked, they are made without any, where there is room above.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
from diffusers import CogVideoXPipeline

from diffusers_concept_maps.correspondence.guidance import cross_attention_guidance
from diffusers_concept_maps.shapes.judge import Verdict
from diffusers_concept_maps.shapes.model import GUIDANCE_SCALE
from diffusers_concept_maps.shapes.suite import frozen
from diffusers_concept_maps.shapes.suite.frozen import DEVELOPMENT_SEED, EVALUATION_SEED
from diffusers_concept_maps.shapes.suite.generation import judge_generated
from diffusers_concept_maps.shapes.suite.result import Result
from diffusers_concept_maps.shapes.suite.scores import bootstrap_interval

SCALE = 1.0
"""Of the guidance, as the development seed chose it; the layers it chose are those of the model's preset."""

_WITHOUT = 1.0  # the scale at which there is no classifier-free guidance


def compare(pipe: CogVideoXPipeline) -> Iterator[tuple[str, dict[str, float]]]:
    """Rates of everything that is compared, on noise of the development seed without classifier-free guidance.

    Layers are compared at the first of the scales, and the other scales with the layers whose clips move best.

    Args:
        pipe: the embedded model or one like it.

    Yields:
        What it is, and rates by the names of `Verdict`.
    """
    yield "no guidance", _verdict(pipe, DEVELOPMENT_SEED, _WITHOUT).rates()
    first, *scales = frozen.GUIDED_SCALES
    motion: dict[tuple[int, ...], float] = {}
    for layers in frozen.GUIDED_LAYERS:
        rates = _verdict(pipe, DEVELOPMENT_SEED, _WITHOUT, scale=first, layers=layers).rates()
        motion[layers] = rates["motion"]
        yield f"layers {layers}, scale {first}", rates
    best = max(motion, key=motion.__getitem__)
    for scale in scales:
        rates = _verdict(pipe, DEVELOPMENT_SEED, _WITHOUT, scale=scale, layers=best).rates()
        yield f"layers {best}, scale {scale}", rates


def evaluate(pipe: CogVideoXPipeline) -> Iterator[Result]:
    """What guidance at the layers of the preset changes, one result as soon as it is known.

    Args:
        pipe: the embedded model or one like it.
    """
    for classifier_free in (_WITHOUT, GUIDANCE_SCALE):
        off = _verdict(pipe, EVALUATION_SEED, classifier_free, repeats=frozen.GUIDED_REPEATS)
        on = _verdict(pipe, EVALUATION_SEED, classifier_free, repeats=frozen.GUIDED_REPEATS, scale=SCALE)
        for name, rate in off.rates().items():
            title = f"classifier-free scale {classifier_free:g}: {name}"
            yield Result(f"{title}, no guidance", rate)
            yield Result(f"{title}, guided", on.rates()[name])
            yield _gain(title, getattr(off, name).numpy(), getattr(on, name).numpy())


def _gain(title: str, off: np.ndarray, on: np.ndarray) -> Result:
    """Difference of two rates, of clips that are pairs; the same prompt with other noise is drawn together with it."""
    gain = on.astype(float) - off
    low, high = bootstrap_interval(gain, clusters=np.arange(len(gain)) % frozen.PROMPTS)
    counts = f"{(gain > 0).sum()} clips won, {(gain < 0).sum()} lost of {len(gain)}"
    return Result(f"{title}, difference", float(gain.mean()), note=f"95% interval {low:+.3f} to {high:+.3f}; {counts}")


def _verdict(
    pipe: CogVideoXPipeline, seed: int, classifier_free: float, *, repeats: int = 1, **guidance: Any
) -> Verdict:
    """The judge on clips, guided as `cross_attention_guidance` is told if it is told anything."""
    prompts = frozen.generation_prompts() * repeats
    with cross_attention_guidance(pipe, **guidance) if guidance else nullcontext():
        return judge_generated(pipe, prompts, seed=seed, guidance_scale=classifier_free)
