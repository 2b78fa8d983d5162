"""A stock pipeline that is traced in one of its steps: same frames, and the maps of the transformer's own call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backbones._case import Inputs

import diffusers_concept_maps as dcm

METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")


@contextmanager
def recorded(transformer: Any) -> Iterator[list[Inputs]]:
    """The arguments of every forward pass by name."""
    calls: list[Inputs] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append({name: value for name, value in kwargs.items() if name != "return_dict"})

    hook = transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def check_run(
    pipe: Any,
    run: Callable[[], torch.Tensor],
    embeds: torch.Tensor,
    grid: tuple[int, int, int],
    passes: int = 1,
    step: int = 1,
) -> Inputs:
    """Trace one step of a run, in every pass of it; that maps of a bare call are right, the contract tests show.

    Args:
        pipe: the pipeline.
        run: a call of it, the same at every call, to latents of one image or video.
        embeds: text encoder states of the concepts `[concept, width]`.
        grid: of the maps.
        passes: forward passes in every step, the conditional one first.
        step: which to trace.

    Returns:
        What the transformer was called with in the last pass of that step.
    """
    frames = run()
    for index, branch in enumerate(("cond", "uncond")[:passes]):
        capture = dcm.trace(pipe, concept_embeds=embeds, methods=METHODS, steps=[step], branch=branch)
        with recorded(pipe.transformer) as calls, capture as maps:
            assert torch.equal(run(), frames)
        call = calls[passes * step + index]
        with torch.no_grad(), dcm.trace(pipe.transformer, concept_embeds=embeds, methods=METHODS) as expected:
            pipe.transformer(**call)
        for method in METHODS:
            assert maps.get(method).shape == (1, embeds.shape[0], *grid)
            assert torch.equal(maps.get(method), expected.get(method))
    return call


def word_maps(transformer: Any, words: dict[str, list[int]], call: Inputs) -> torch.Tensor:
    """Maps of words of the prompt by their positions, of one call of the transformer."""
    with torch.no_grad(), dcm.trace(transformer, target="prompt", prompt_tokens=words) as maps:
        transformer(**call)
    return maps.get()
