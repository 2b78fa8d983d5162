"""Steps and guidance branches of pipelines that hand over copies of timesteps, or guide in two forward passes.

Their denoising loop runs here around a real transformer of another family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from diffusers import CogVideoXTransformer3DModel, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

import diffusers_concept_maps as dcm
from diffusers_concept_maps import backbones
from diffusers_concept_maps.backbones.cogvideox import CogVideoXBackbone

METHODS = ("concept_attention", "imap")
STEPS, LAYERS = 3, 2


class LoopTransformer(CogVideoXTransformer3DModel):  # type: ignore[misc]  # untyped host
    """A transformer of a family whose pipelines are those below."""


class LoopBackbone(CogVideoXBackbone):
    """As of Flux: thousandths of the timesteps, rounded to the dtype of the latents."""

    transformer_classes = ("LoopTransformer",)
    batched_guidance = False

    def timesteps(self, scheduled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        return scheduled.to(dtype) / 1000


class ViewBackbone(LoopBackbone):
    """As of Wan."""

    def timesteps(self, scheduled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        return None


def thousandths(t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return t.expand(latents.shape[0]).to(latents.dtype) / 1000


def view(t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return t.expand(latents.shape[0])


def per_token(t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """The first frame is given, and needs no denoising; the model of these tests takes the mean."""
    return torch.stack([0 * thousandths(t, latents), thousandths(t, latents)], dim=1)


def per_noisy_token(t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """The first frame is given, and keeps half of the noise."""
    return torch.stack([0 * thousandths(t, latents) + 0.5, thousandths(t, latents)], dim=1)


class SilentLoop:
    """The denoising loop of diffusers' pipelines with guidance in two passes; it tells nobody where it is."""

    hand_over: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = staticmethod(thousandths)
    guidance_scale = 3.5

    def __init__(self, transformer: Any, scheduler: Any = None) -> None:
        self.transformer = transformer
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.num_timesteps = 0

    def write(self, t: torch.Tensor | None) -> None:
        """Where the pipeline notes its timestep."""

    @torch.no_grad()
    def __call__(
        self,
        seed: int = 0,
        *,
        guided: bool = True,
        dtype: torch.dtype = torch.float32,
        steps: int = STEPS,
        start: int = 0,
        between: Callable[[], Any] = lambda: None,
    ) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(2, 3, 4, 6, 10, generator=generator).to(dtype)
        texts = torch.randn(2, 2, tiny.TEXT_LENGTH, 32, generator=generator).to(dtype)
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps[start:]
        self.num_timesteps = len(timesteps)
        for t in timesteps:
            self.write(t)
            noise = self.transformer(latents, texts[0], self.hand_over(t, latents))[0]
            if guided:
                other = self.transformer(latents, texts[1], self.hand_over(t, latents))[0]
                noise = other + self.guidance_scale * (noise - other)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0].to(dtype)
            between()
        self.write(None)
        return latents


class WritingLoop(SilentLoop):
    """Most pipelines write down the timestep they work on."""

    _current_timestep: torch.Tensor | None = None

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    def write(self, t: torch.Tensor | None) -> None:
        self._current_timestep = t


class MirroredLoop(WritingLoop):
    """One of them (Mochi) writes another number than its scheduler's."""

    def write(self, t: torch.Tensor | None) -> None:
        self._current_timestep = None if t is None else 1000 - t


class NumberLoop(WritingLoop):
    """Some (Cosmos 2.5) write a number, no tensor."""

    def write(self, t: torch.Tensor | None) -> None:
        self._current_timestep = None if t is None else t.item()  # type: ignore[assignment]


class ViewLoop(WritingLoop):
    """As those of Wan."""

    hand_over = staticmethod(view)


class PerTokenLoop(WritingLoop):
    """As those that are given the first frame."""

    hand_over = staticmethod(per_token)


class PerNoisyTokenLoop(WritingLoop):
    """As those that add noise to it."""

    hand_over = staticmethod(per_noisy_token)


LOOPS = [SilentLoop, WritingLoop, MirroredLoop, NumberLoop]


@pytest.fixture
def transformer(monkeypatch: pytest.MonkeyPatch) -> Any:
    use(LoopBackbone(), monkeypatch)
    transformer = tiny.make_transformer(rope=False, layers=LAYERS)
    transformer.__class__ = LoopTransformer
    return transformer


def use(backbone: CogVideoXBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backbones._BACKBONES, "LoopTransformer", backbone)


EMBEDS = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
trace = partial(dcm.trace, concept_embeds=EMBEDS, methods=METHODS)


def calls_of(transformer: Any, run: Callable[[], Any]) -> list[tuple[Any, ...]]:
    """The arguments of the forward passes of a run."""
    calls: list[tuple[Any, ...]] = []
    hook = transformer.register_forward_pre_hook(lambda module, args: calls.append(args))
    run()
    hook.remove()
    return calls


def maps_of(transformer: Any, calls: Sequence[tuple[Any, ...]]) -> dict[str, torch.Tensor]:
    """What the bare transformer shows in these passes."""
    with trace(transformer) as maps, torch.no_grad():
        for arguments in calls:
            transformer(*arguments)
    return {method: maps.get(method) for method in METHODS}


def assert_same(maps: dcm.ConceptMaps, expected: dict[str, torch.Tensor]) -> None:
    for method in METHODS:
        assert torch.equal(maps.get(method), expected[method])


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", [0, 1])
def test_guidance_in_two_passes(loop: type[SilentLoop], dtype: torch.dtype, start: int, transformer: Any) -> None:
    transformer.to(dtype)
    pipe = loop(transformer)
    options: dict[str, Any] = {"dtype": dtype, "start": start}
    stock = pipe(**options)
    calls = calls_of(transformer, lambda: pipe(**options))
    with trace(pipe, branch="both") as maps:
        assert torch.equal(pipe(**options), stock)
    assert len(calls) == 2 * (STEPS - start)
    for turn, branch in enumerate(("cond", "uncond")):
        assert_same(maps[branch], maps_of(transformer, calls[turn::2]))
        assert all(table.shape == (STEPS - start, LAYERS) and table.all() for table in maps[branch].coverage.values())
    assert not torch.equal(maps["cond"].get(), maps["uncond"].get())


@pytest.mark.parametrize("loop", LOOPS)
def test_each_step_is_found(loop: type[SilentLoop], transformer: Any) -> None:
    pipe = loop(transformer)
    calls = calls_of(transformer, pipe)
    for step in range(STEPS):
        for branch in ("cond", "uncond"):
            with trace(pipe, steps=[step], branch=branch) as maps:
                pipe()
            assert_same(maps, maps_of(transformer, [calls[2 * step + (branch == "uncond")]]))


@pytest.mark.parametrize("loop", LOOPS)
def test_no_guidance_and_the_latest_run(loop: type[SilentLoop], transformer: Any) -> None:
    pipe = loop(transformer)
    calls = calls_of(transformer, lambda: pipe(seed=1, guided=False, steps=1))
    with trace(pipe, branch="both") as maps:
        pipe()
        for _ in range(2):  # runs of one step, the same one
            pipe(seed=1, guided=False, steps=1)
    assert_same(maps["cond"], maps_of(transformer, calls))
    with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded for branch 'uncond'"):
        maps["uncond"].get()


def test_views_and_two_passes(transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use(ViewBackbone(), monkeypatch)
    pipe = ViewLoop(transformer)
    calls = calls_of(transformer, pipe)
    with trace(pipe, branch="both") as maps:
        pipe(between=lambda: transformer(*calls[2]))  # a copy: somebody else's
    for turn, branch in enumerate(("cond", "uncond")):
        assert_same(maps[branch], maps_of(transformer, calls[turn::2]))


def test_kept_axes_of_both_branches(transformer: Any) -> None:
    pipe = WritingLoop(transformer)
    with trace(pipe, branch="both", detail=("step",)) as maps:
        pipe()
    for branch in ("cond", "uncond"):
        kept = maps[branch].detail()
        assert kept.shape == (STEPS, 2, 3, *tiny.GRID)
        for step in range(STEPS):
            with trace(pipe, steps=[step], branch=branch) as alone:
                pipe()
            torch.testing.assert_close(kept[step], alone.get(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loop", LOOPS)
def test_passes_of_others_are_not_recorded(loop: type[SilentLoop], transformer: Any) -> None:
    pipe, other = loop(transformer), WritingLoop(transformer)
    calls = calls_of(transformer, pipe)
    latents, text, _ = calls[0]
    pipe()
    with trace(pipe) as maps:
        other(seed=3)
        with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded"):
            maps.get()
        pipe(between=lambda: transformer(latents, text, torch.tensor([0.1234, 0.1234])))
    assert_same(maps, maps_of(transformer, calls[::2]))


@pytest.mark.parametrize("loop", [WritingLoop, MirroredLoop])
def test_another_pipeline_after_a_run_that_failed(loop: type[SilentLoop], transformer: Any) -> None:
    """Its timesteps are the same, and the failed run has left its own behind."""

    def fail() -> None:
        raise RuntimeError("stop")

    pipe = loop(transformer)
    with pytest.raises(RuntimeError, match="stop"):
        pipe(between=fail)
    with trace(pipe) as maps:
        WritingLoop(transformer)(seed=3)
        with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded"):
            maps.get()


@pytest.mark.parametrize("loop", [PerTokenLoop, PerNoisyTokenLoop])
def test_tokens_with_timesteps_of_their_own(loop: type[SilentLoop], transformer: Any) -> None:
    stock = type(transformer.time_proj).forward
    transformer.time_proj.forward = lambda t: stock(transformer.time_proj, t.mean(1) if t.ndim == 2 else t)
    pipe = loop(transformer)
    calls = calls_of(transformer, pipe)
    assert calls[0][2].shape == (2, 2)
    for step in range(STEPS):
        with trace(pipe, steps=[step]) as maps:
            pipe()
        assert_same(maps, maps_of(transformer, calls[2 * step : 2 * step + 1]))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("hand_over", [lambda t, x: t.expand(2) / 999, lambda t, x: t.expand(2) / 1000 + 1e-3])
def test_an_unknown_scale_is_an_error(loop: type[SilentLoop], hand_over: Any, transformer: Any) -> None:
    pipe = loop(transformer)
    pipe.hand_over = hand_over
    message = (
        f"^the timestep that {loop.__name__} hands to its transformer at the start of a run is not .*; or trace the"
    )
    with pytest.raises(dcm.ConceptMapsError, match=message), trace(pipe):
        pipe()


def test_a_third_pass_is_an_error(transformer: Any) -> None:
    """One more branch of guidance, or another pipeline at the same timestep."""
    pipe = WritingLoop(transformer)
    latest = calls_of(transformer, pipe)[1]
    with pytest.raises(dcm.ConceptMapsError, match="^step 0 has more than two forward passes"), trace(pipe):
        pipe(between=lambda: transformer(*latest))


def test_a_pass_out_of_order_is_an_error(transformer: Any) -> None:
    pipe = SilentLoop(transformer)
    later = calls_of(transformer, pipe)[2 * 2]
    message = "after step 0 is not that of one step alone, the current or the next"
    with pytest.raises(dcm.ConceptMapsError, match=message), trace(pipe):
        pipe(between=lambda: transformer(*later))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("steps", [STEPS, STEPS + 3])
def test_a_run_of_another_pipeline_after_the_last_step_is_left_out(
    loop: type[SilentLoop], steps: int, transformer: Any
) -> None:
    pipe, other = loop(transformer), SilentLoop(transformer)
    with trace(pipe) as maps:
        pipe()
    expected = {method: maps.get(method) for method in METHODS}
    with trace(pipe) as maps:
        pipe()
        other(seed=1, steps=steps)
    assert_same(maps, expected)
    with trace(pipe) as maps:
        other(seed=1, steps=steps)
        pipe()
        other(seed=2, steps=steps)
        pipe()
        other(seed=3, steps=steps)
    assert_same(maps, expected)


def begin(pipe: SilentLoop) -> None:
    """The first five of 500 steps, whose timesteps differ by less than bfloat16 can tell."""
    turns = iter(range(5))
    with suppress(StopIteration):
        pipe(dtype=torch.bfloat16, steps=500, guided=False, between=lambda: next(turns))


@pytest.mark.parametrize("loop", [WritingLoop, MirroredLoop])
def test_timesteps_that_are_rounded_to_the_same_number(loop: type[SilentLoop], transformer: Any) -> None:
    """Where the pipeline writes them down they are told apart all the same."""
    transformer.to(torch.bfloat16)
    pipe = loop(transformer)
    calls = calls_of(transformer, lambda: begin(pipe))
    assert torch.equal(calls[1][2], calls[2][2])
    with trace(pipe, steps=[2]) as maps:
        begin(pipe)
    assert_same(maps, maps_of(transformer, calls[2:3]))


def test_timesteps_that_cannot_be_told_apart_are_an_error(transformer: Any) -> None:
    transformer.to(torch.bfloat16)
    pipe = SilentLoop(transformer)
    message = "fewer steps or float32 where timesteps are rounded to the same number"
    with pytest.raises(dcm.ConceptMapsError, match=message), trace(pipe):
        begin(pipe)


def test_a_scheduler_that_visits_a_timestep_twice(transformer: Any) -> None:
    pipe = WritingLoop(transformer, FlowMatchHeunDiscreteScheduler(shift=3.0))
    calls = calls_of(transformer, pipe)
    assert len(calls) == 2 * (2 * STEPS - 1)
    with trace(pipe) as maps:
        pipe()
    assert_same(maps, maps_of(transformer, calls[::2]))
    silent = SilentLoop(transformer, FlowMatchHeunDiscreteScheduler(shift=3.0))
    with pytest.raises(dcm.ConceptMapsError, match="is not that of one step alone"), trace(silent):
        silent()
