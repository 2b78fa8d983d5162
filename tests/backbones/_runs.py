"""Runs of stock pipelines, pass by pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from backbones._case import Inputs
from backbones._oracle import kept_state

import diffusers_concept_maps as dcm

METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")


@contextmanager
def recorded_passes(transformer: Any) -> Iterator[list[Inputs]]:
    """The arguments of every forward pass, by name."""
    passes: list[Inputs] = []
    names = list(inspect.signature(type(transformer).forward).parameters)[1:]

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(names, args, strict=False)) | kwargs
        passes.append({name: value for name, value in named.items() if name != "return_dict"})

    hook = transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        hook.remove()


def check_run(
    pipe: Any,
    run: Callable[[], torch.Tensor],
    embeds: torch.Tensor,
    grid: tuple[int, int, int],
    places: Sequence[tuple[int, slice]],
    *,
    passes: int,
    branch: str = "cond",
    methods: Sequence[str] = METHODS,
) -> None:
    """A run is the same with and without capture, and its maps are those of a bare transformer, pass by pass.

    Args:
        pipe: a stock pipeline.
        run: seeded, from nothing to latents.
        embeds: text encoder states of the concepts.
        grid: of its tokens.
        places: which forward passes make the maps of the branch, and the rows of each that belong to it.
        passes: number of forward passes of the run.
        branch: the guidance branch.
        methods: those that the topology allows.
    """
    off, random = run(), torch.get_rng_state()
    before = kept_state(pipe.transformer)  # the first run of a pipeline may leave hooks of its own
    tracing = dcm.trace(pipe, concept_embeds=embeds, methods=methods, branch=branch)
    with recorded_passes(pipe.transformer) as seen, tracing as maps:
        assert torch.equal(run(), off)
        assert torch.equal(torch.get_rng_state(), random)
    assert kept_state(pipe.transformer) == before
    assert len(seen) == passes
    expected: dict[str, list[torch.Tensor]] = {method: [] for method in methods}
    for place, rows in places:
        with torch.no_grad(), dcm.trace(pipe.transformer, concept_embeds=embeds, methods=methods) as bare:
            pipe.transformer(**seen[place])
        for method in methods:
            expected[method].append(bare.get(method)[rows])
    for method in methods:
        mean = torch.stack(expected[method]).mean(0)
        assert maps.get(method).shape[2:] == grid
        assert maps.coverage[method].sum().item() == len(places) * maps.coverage[method].shape[1]
        torch.testing.assert_close(maps.get(method), mean, rtol=0, atol=1e-5 * mean.abs().max().item())


def check_training(make: Callable[[], Any], inputs: Inputs, embeds: torch.Tensor, methods: Sequence[str]) -> None:
    """Gradients are unchanged under a capture where activations are not kept, but computed again.

    What is computed again is the stock code, and has to save the very tensors that the capture's has saved.
    """
    off, on = make().train(), make().train()
    capture = dcm.attach(on, concept_embeds=embeds, methods=methods)
    for transformer in (off, on):
        transformer.enable_gradient_checkpointing()
        torch.manual_seed(3)
        transformer(**inputs, return_dict=False)[0].square().sum().backward()
    assert capture.maps["cond"].coverage["imap"].all()
    for (name, expected), parameter in zip(off.named_parameters(), on.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None)
        assert parameter.grad is None or torch.equal(parameter.grad, expected.grad), name


def check_step(
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
        with recorded_passes(pipe.transformer) as calls, capture as maps:
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
