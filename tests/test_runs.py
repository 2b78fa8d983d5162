"""Which forward passes belong to a capture: those of the traced pipeline, and of its latest run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import count
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXVideoToVideoPipeline

import diffusers_concept_maps as dcm

CONCEPTS = ["dog", "running", "sky"]
METHODS = ("concept_attention", "imap")
DEFAULT = "a red dog running on the beach"
Run = Callable[[], Any]


class Boom(BaseException):
    """Not even an `Exception`."""


def boom(*args: Any, **kwargs: Any) -> Any:
    raise Boom


@pytest.fixture
def pipe() -> CogVideoXPipeline:
    return tiny.make_pipeline()


def expected_maps(prompt: Any = DEFAULT, **options: Any) -> torch.Tensor:
    """What a capture of one run of an untouched pipeline gives."""
    return default_maps() if (prompt, options) == (DEFAULT, {}) else recorded(prompt, **options)


@cache
def default_maps() -> torch.Tensor:
    return recorded(DEFAULT)


def recorded(prompt: Any, **options: Any) -> torch.Tensor:
    fresh = tiny.make_pipeline()
    with dcm.trace(fresh, CONCEPTS, methods=METHODS) as maps:
        tiny.call(fresh, prompt, **options)
    return maps.get()


def same_scheduler(pipe: CogVideoXPipeline) -> Run:
    other = CogVideoXPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return lambda: tiny.call(other, "a cat")


def own_scheduler(pipe: CogVideoXPipeline) -> Run:
    other = CogVideoXPipeline(**pipe.components | {"scheduler": CogVideoXDDIMScheduler()})
    other.set_progress_bar_config(disable=True)
    return lambda: tiny.call(other, "a cat", guidance_scale=1.0)


def other_class(pipe: CogVideoXPipeline) -> Run:
    other = CogVideoXVideoToVideoPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    video = torch.rand(9, 3, 48, 80, generator=torch.Generator().manual_seed(4))
    size = {"height": 48, "width": 80, "max_sequence_length": 12, "output_type": "latent"}
    return lambda: other([video], "a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(1), **size)


def mixed_class(pipe: CogVideoXPipeline) -> Run:
    other = dcm.with_concept_maps(pipe)
    return lambda: tiny.call(other, "a cat")


def bare_transformer(pipe: CogVideoXPipeline) -> Run:
    inputs = {"hidden_states": torch.randn(2, 3, 4, 6, 10), "encoder_hidden_states": torch.randn(2, 12, 32)}
    return torch.no_grad()(lambda: pipe.transformer(**inputs, timestep=torch.tensor([5, 5])))


OTHERS = [same_scheduler, own_scheduler, other_class, mixed_class, bare_transformer]


@pytest.mark.parametrize("make", OTHERS)
def test_another_pipeline_on_the_same_transformer_is_not_recorded(
    pipe: CogVideoXPipeline, make: Callable[[CogVideoXPipeline], Run]
) -> None:
    other = make(pipe)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        other()  # before the traced pipeline has ever run
        with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded"):
            maps.get()
        tiny.call(pipe)
        other()
    assert torch.equal(maps.get(), expected_maps())


def fail_after_a_step(pipe: CogVideoXPipeline) -> None:
    tiny.call(pipe, callback_on_step_end=boom)


def fail_before_the_transformer(pipe: CogVideoXPipeline) -> None:
    """In the second step, whose timestep the pipeline has then written down."""
    stock, turns = pipe.scheduler.scale_model_input, count()
    pipe.scheduler.scale_model_input = lambda sample, t: boom() if next(turns) == 1 else stock(sample, t)
    try:
        tiny.call(pipe)
    finally:
        del pipe.scheduler.scale_model_input


@pytest.mark.parametrize("fail", [fail_after_a_step, fail_before_the_transformer])
@pytest.mark.parametrize("make", OTHERS)
def test_another_pipeline_after_the_traced_one_failed(
    pipe: CogVideoXPipeline, make: Callable[[CogVideoXPipeline], Run], fail: Callable[[CogVideoXPipeline], None]
) -> None:
    other = make(pipe)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        with pytest.raises(Boom):
            fail(pipe)
        first_step = maps.get()
        other()
        assert torch.equal(maps.get(), first_step)
        tiny.call(pipe)
    assert torch.equal(maps.get(), expected_maps())
    assert not torch.equal(first_step, expected_maps())


@pytest.mark.parametrize("make", OTHERS)
def test_another_pipeline_after_the_traced_one_failed_before_the_capture(
    pipe: CogVideoXPipeline, make: Callable[[CogVideoXPipeline], Run]
) -> None:
    other = make(pipe)
    with suppress(Boom):
        tiny.call(pipe, callback_on_step_end=boom)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        other()
        with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded"):
            maps.get()
        tiny.call(pipe)
    assert torch.equal(maps.get(), expected_maps())


@pytest.mark.parametrize("make", [own_scheduler, bare_transformer])
def test_another_pipeline_between_the_steps(pipe: CogVideoXPipeline, make: Callable[[CogVideoXPipeline], Run]) -> None:
    other = make(pipe)

    def preview(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        other()
        return inputs

    stock = tiny.call(pipe, callback_on_step_end=preview)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        assert torch.equal(tiny.call(pipe, callback_on_step_end=preview), stock)
    assert torch.equal(maps.get(), expected_maps())


def test_the_maps_are_those_of_the_latest_run(pipe: CogVideoXPipeline) -> None:
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        tiny.call(pipe, "a cat on the rock", num_inference_steps=5)
        first = maps.get().clone()
        tiny.call(pipe)
    assert torch.equal(first, expected_maps("a cat on the rock", num_inference_steps=5))
    assert torch.equal(maps.get(), expected_maps())


@pytest.mark.parametrize(
    "between",
    [
        {"height": 80, "width": 48},
        {"num_frames": 17},
        {"guidance_scale": 1.0},
        {"prompt": ["a dog", "a cat"]},
        {"use_dynamic_cfg": True},
    ],
    ids=str,
)
def test_runs_of_other_sizes_in_turn(pipe: CogVideoXPipeline, between: dict[str, Any]) -> None:
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        tiny.call(pipe)
        tiny.call(pipe, **between)
        other = maps.get().clone()
        tiny.call(pipe)
    assert torch.equal(maps.get(), expected_maps())
    assert torch.equal(other, expected_maps(**between))


def test_a_run_with_guidance_switched_off_inside_records_the_conditional_rows(pipe: CogVideoXPipeline) -> None:
    """The pipeline goes on with both halves of the batch, whatever its guidance scale says."""

    def off(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.0
        return inputs

    with dcm.trace(pipe, CONCEPTS, methods=METHODS, steps=[0]) as first:
        tiny.call(pipe, callback_on_step_end=off)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS, steps=[0]) as expected:
        tiny.call(pipe)
    assert torch.equal(first.get(), expected.get())
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        tiny.call(pipe, callback_on_step_end=off)
    assert maps.get().shape == (1, 3, *tiny.GRID)


def test_a_run_that_is_interrupted_is_followed_by_another(pipe: CogVideoXPipeline) -> None:
    def stop(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return inputs

    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        tiny.call(pipe, callback_on_step_end=stop, num_inference_steps=6)
        tiny.call(pipe)
    assert torch.equal(maps.get(), expected_maps())


def test_maps_can_be_read_while_the_pipeline_runs(pipe: CogVideoXPipeline) -> None:
    seen: list[torch.Tensor] = []

    def look(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        seen.append(maps.get())
        return inputs

    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        tiny.call(pipe, callback_on_step_end=look)
    assert len(seen) == 3
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], maps.get())
    with dcm.trace(pipe, CONCEPTS, methods=METHODS, steps=[0]) as first:
        tiny.call(pipe)
    assert torch.equal(seen[0], first.get())


def test_the_branches_are_the_halves_of_the_batch(pipe: CogVideoXPipeline) -> None:
    """Each branch of the first step is what the bare transformer shows of these rows."""
    calls: list[dict[str, Any]] = []
    grab = pipe.transformer.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS, steps=[0], branch="both") as maps:
        tiny.call(pipe, ["a dog", "a cat"], negative_prompt="sky")
    grab.remove()
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(CONCEPTS, do_classifier_free_guidance=False, max_sequence_length=12)
    with dcm.trace(pipe.transformer, CONCEPTS, concept_embeds=embeds[:, 0], methods=METHODS) as rows, torch.no_grad():
        pipe.transformer(**calls[0])
    for method in METHODS:
        uncond, cond = rows.get(method).chunk(2)
        torch.testing.assert_close(maps["uncond"].get(method), uncond, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(maps["cond"].get(method), cond, rtol=1e-5, atol=1e-6)
        assert (uncond - cond).abs().max() > 1e-3


def test_passes_of_a_bare_transformer_are_averaged() -> None:
    transformer = tiny.make_transformer()
    embeds = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    inputs = [
        {"hidden_states": torch.randn(2, 3, 4, 6, 10), "encoder_hidden_states": torch.randn(2, 12, 32)}
        for _ in range(2)
    ]

    def traced(calls: list[dict[str, torch.Tensor]], **options: Any) -> torch.Tensor:
        with dcm.trace(transformer, CONCEPTS, concept_embeds=embeds, **options) as maps, torch.no_grad():
            for call in calls:
                transformer(call["hidden_states"], call["encoder_hidden_states"], torch.tensor([5, 7]))
        return maps.get()

    separate = [traced([call]) for call in inputs]
    torch.testing.assert_close(traced(inputs), torch.stack(separate).mean(0), rtol=1e-6, atol=1e-7)
    assert torch.equal(traced(inputs, steps=[1]), separate[1])
    assert not torch.equal(*separate)
