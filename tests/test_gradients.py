"""Random state, dropout, gradients and precision under a capture."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from backbones import tiny_cogvideox as tiny

import diffusers_concept_maps as dcm

CONCEPTS = ["dog", "running", "sky"]
METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]


def test_random_state_is_left_alone() -> None:
    pipe = tiny.make_pipeline()
    torch.manual_seed(11)
    np.random.seed(12)
    random.seed(13)
    start = random_states()
    generator = torch.Generator().manual_seed(14)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        assert random_states() == start
        frames = tiny.call(pipe, generator=generator, eta=1.0)
        assert random_states() == start
        maps.get()
    assert random_states() == start
    untraced = torch.Generator().manual_seed(14)
    assert torch.equal(tiny.call(pipe, generator=untraced, eta=1.0), frames)
    assert torch.equal(untraced.get_state(), generator.get_state())


def test_dropout_draws_what_it_drew() -> None:
    transformer = tiny.make_transformer(dropout=0.1).train()
    embeds = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            return transformer(**transformer_inputs(torch.float32), return_dict=False)[0], torch.get_rng_state()

    off, state = run()
    with dcm.trace(transformer, concept_embeds=embeds, methods=METHODS) as maps:
        on, state_on = run()
    assert torch.equal(on, off)
    assert torch.equal(state_on, state)
    assert maps.get().isfinite().all()


def transformer_inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 3, 4, 6, 10, generator=generator).to(dtype).requires_grad_(),
        "encoder_hidden_states": torch.randn(2, 12, 32, generator=generator).to(dtype).requires_grad_(),
        "timestep": torch.tensor([900, 300]),
    }


def gradients(transformer: Any, context: AbstractContextManager[Any]) -> list[torch.Tensor]:
    """Output, and gradients of inputs and parameters."""
    transformer.zero_grad(set_to_none=True)
    inputs = transformer_inputs(torch.float32)
    with context:
        output = transformer(**inputs, return_dict=False)[0]
    output.float().square().sum().backward()
    leaves = [inputs["hidden_states"], inputs["encoder_hidden_states"], *transformer.parameters()]
    used = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(used) > 0.9 * len(leaves)
    return [output.detach(), *used]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rope", [False, True])
def test_gradients_of_a_bare_transformer(rope: bool, autocast: bool, checkpointing: bool) -> None:
    transformer = tiny.make_transformer(rope=rope)
    if checkpointing:
        transformer.train().enable_gradient_checkpointing()

    def run() -> list[torch.Tensor]:
        return gradients(transformer, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast))

    off = run()
    embeds = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    with dcm.trace(transformer, concept_embeds=embeds, methods=METHODS) as maps:
        on = run()
    assert len(on) == len(off)
    assert all(torch.equal(a, b) for a, b in zip(on, off, strict=True))
    assert not maps.get().requires_grad
    assert maps.get().shape == (2, 3, *tiny.GRID)
    assert (maps.get("imap").flatten(2).std(-1) > 1e-6).all()


def test_gradient_mode_of_the_caller_is_kept() -> None:
    transformer = tiny.make_transformer()
    embeds = torch.randn(3, 32)
    with dcm.trace(transformer, concept_embeds=embeds):
        assert torch.is_grad_enabled()
        output = transformer(**transformer_inputs(torch.float32), return_dict=False)[0]
        assert torch.is_grad_enabled()
        assert output.requires_grad


def test_scores_are_float32_under_autocast() -> None:
    transformer = tiny.make_transformer()
    options: dict[str, Any] = {"methods": ["cross_attention"], "layers": [1], "heads": [2], "normalize": "none"}
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with dcm.trace(transformer, concept_embeds=torch.randn(3, 32), **options) as maps, torch.no_grad(), autocast:
        transformer(**transformer_inputs(torch.float32))
    scores = maps.get()
    assert (scores != scores.bfloat16().float()).float().mean() > 0.9


def test_passes_in_and_out_of_inference_mode_are_averaged() -> None:
    transformer = tiny.make_transformer()
    embeds = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    inputs = transformer_inputs(torch.float32)

    def traced(*contexts: AbstractContextManager[Any]) -> torch.Tensor:
        with dcm.trace(transformer, concept_embeds=embeds) as maps:
            for number, context in enumerate(contexts):
                with context:
                    transformer(**inputs | {"timestep": torch.tensor([900, 300]) - 250 * number})
        return maps.get()

    plain = traced(torch.no_grad(), torch.no_grad())
    assert torch.equal(traced(torch.inference_mode(), torch.no_grad()), plain)
    assert torch.equal(traced(torch.no_grad(), torch.inference_mode()), plain)
    torch.testing.assert_close(traced(torch.inference_mode(), torch.enable_grad()), plain, rtol=1e-4, atol=1e-5)
