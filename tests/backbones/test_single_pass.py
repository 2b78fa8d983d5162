"""Clips in the pipelines of every family, for one forward pass at a noise level."""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from backbones import tiny_qwenimage
from backbones._case import Inputs, seeded
from backbones._oracle import kept_state
from backbones._real_runs import RealCase, clip_for, disturb, qwen_image, real_cases
from backbones.test_skyreels_v2 import video_to_video

import diffusers_concept_maps as dcm
from diffusers_concept_maps import noising
from diffusers_concept_maps.attachment import by_name
from diffusers_concept_maps.backbones import JointBackbone, find_transformers
from diffusers_concept_maps.capture import attach
from diffusers_concept_maps.single_pass import SinglePass

CASES = real_cases()
TIMES = ("timestep", "audio_timestep", "sigma", "audio_sigma")
RESIDUALS = ("controlnet_block_samples", "controlnet_single_block_samples", "block_controlnet_hidden_states")
"""What a control net makes of the same latents."""


class Decoded(Exception):
    """Raised with what a VAE was given to decode."""


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> RealCase:
    return request.param  # type: ignore[no-any-return]


def single_of(case: RealCase) -> tuple[Any, SinglePass, torch.Tensor, torch.Tensor]:
    """A pipeline, what makes its passes, a clip and its latents."""
    pipe = case.pipeline()
    disturb(pipe)
    single, clip = SinglePass(pipe, prompt="a red dog", call=case.call), clip_for(pipe)
    return pipe, single, clip, single.encode(clip.transpose(0, 1)[None])


@contextmanager
def forward_passes(pipe: Any) -> Iterator[list[Inputs]]:
    """What the transformers of a pipeline are called with in the end, whatever changes it on the way."""
    passes: list[Inputs] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: Inputs, output: Any) -> None:
        named = by_name(module, args, kwargs)
        passes.append(named | {"hidden_states": named["hidden_states"].clone()})

    hooks = [t.register_forward_hook(note, with_kwargs=True) for t in find_transformers(pipe)]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def stock_run(case: RealCase, pipe: Any, single: SinglePass, clip: torch.Tensor, **options: Any) -> Any:
    """The stock pipeline, called as a single pass is, unless told otherwise."""
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(5)  # for pipelines that do not ask the generator for everything
    torch.randn(single.encode(clip.transpose(0, 1)[None]).shape, generator=generator)  # conditions follow the noise
    return pipe(**(single._arguments(clip) | {"generator": generator} | options))


def fixed_scheduler(pipe: Any, result: Callable[[], torch.Tensor]) -> Any:
    """One whose steps end at that, in the layout of the transformer; those of sound at what they were given."""
    steps = itertools.count()

    class Fixed(type(pipe.scheduler)):  # type: ignore[misc]
        def step(self, output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            put, step = result(), next(steps)
            if step and sample.ndim == 3 and put.ndim == 3:
                return sample, sample
            if sample.ndim < put.ndim:  # every frame by itself
                return put[:, :, step], put[:, :, step]
            for dim, size in enumerate(sample.shape):
                put = put.narrow(dim, 0, size)
            return put, put

    scheduler = Fixed.from_config(pipe.scheduler.config)
    return scheduler


@pytest.mark.parametrize("case", [case for case in CASES if case.decodes], ids=str)
def test_latents_are_decoded_to_what_was_encoded(case: RealCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put in place of the scheduler's result, the stock pipeline undoes scale and packing."""
    pipe, single, clip, latents = single_of(case)
    deviation = pipe.scheduler.config.get("sigma_data") or 1.0
    with forward_passes(pipe) as passes:

        def result() -> torch.Tensor:
            put: torch.Tensor = single.backbone.insert(pipe, passes[0], latents)["hidden_states"]
            front = single.backbone.grid(pipe.transformer, passes[0]).start if put.ndim == 3 else 0
            return put[:, front:] * deviation

        def decode(encoded: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            raise Decoded(encoded)

        monkeypatch.setattr(pipe, "scheduler", fixed_scheduler(pipe, result))
        monkeypatch.setattr(pipe.vae, "decode", decode)
        with pytest.raises(Decoded) as raised:
            stock_run(case, pipe, single, clip, output_type="pt")
    decoded = raised.value.args[0]
    pixels = clip.transpose(0, 1)[None] * 2 - 1
    with torch.no_grad():
        images = pixels[:, :, 0] if pipe.vae.__class__.__name__ in ("AutoencoderKL", "AutoencoderKLFlux2") else pixels
        encoded = pipe.vae.encode(images).latent_dist.mode()
    if decoded.ndim == 5:  # FramePack decodes the given image in front
        decoded = decoded[:, :, -encoded.shape[2] :]
    torch.testing.assert_close(decoded, encoded, atol=1e-4, rtol=1e-4)


def known_level(pipe: Any, step: int) -> tuple[float, float, float]:
    """Noise level of a step of a run that is over, and by how much the clip and the noise are scaled there.

    The pipelines of Cosmos 1 and 2 know how large a clip is; theirs is the ratio of noise to that.
    """
    scheduler = pipe.scheduler
    if hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "sigmas"):
        place = int(scheduler.timesteps[step])
        kept = float(scheduler.alphas_cumprod[place])
        return (place + 1) / scheduler.config.num_train_timesteps, kept**0.5, (1 - kept) ** 0.5
    sigma = float(scheduler.sigmas[step])
    size = scheduler.config.get("sigma_data")
    if type(scheduler).__name__ == "EDMEulerScheduler":
        scale = 1 / (sigma**2 + size**2) ** 0.5
        return sigma / size / (1 + sigma / size), scale, sigma * scale
    if size is not None:
        return sigma / (1 + sigma), 1 / (1 + sigma), sigma / (1 + sigma)
    level = 1 - sigma if scheduler.config.get("invert_sigmas") else sigma
    return level, 1 - level, level


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, str | int | float | None):
        return bool(a == b)
    return type(a) is type(b)


def test_the_transformer_gets_the_clip_noised_as_in_a_run(case: RealCase) -> None:
    pipe, single, clip, latents = single_of(case)
    with forward_passes(pipe) as stock:
        stock_run(case, pipe, single, clip, num_inference_steps=3)
    level, kept, added = known_level(pipe, step=1)
    with forward_passes(pipe) as passes:
        single.run(latents, level, clip, seed=5)
    (got,) = passes
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    mixed = kept * latents + added * noise
    size = pipe.scheduler.config.get("sigma_data") or 1.0
    inserted = single.backbone.insert(pipe, stock[0], mixed * size)["hidden_states"]
    torch.testing.assert_close(got["hidden_states"], inserted, atol=1e-5, rtol=1e-5)
    for name in TIMES:
        if isinstance(got.get(name), torch.Tensor):  # of the first of the passes of a step
            torch.testing.assert_close(got[name], stock[len(stock) // 3][name], atol=1e-3, rtol=1e-5)
    for name in set(got) - {"hidden_states", *TIMES, *RESIDUALS}:
        assert same(got[name], stock[0][name]), name


def test_conditions_stay(case: RealCase) -> None:
    """What was noise is replaced and nothing else: as many numbers as the clip has beside what is given of it."""
    pipe, single, clip, latents = single_of(case)
    with forward_passes(pipe) as stock:
        stock_run(case, pipe, single, clip)
    hidden = stock[0]["hidden_states"]
    put = single.backbone.insert(pipe, stock[0], torch.full_like(latents, 1e4))["hidden_states"]
    changed = put != hidden
    expected = latents[:, :, case.given :].numel()
    padding = hidden.shape[1] - latents.shape[2] if case.name.startswith("CogVideoX 1.5") else 0
    assert int(changed.sum()) == expected + padding * latents[:, :, 0].numel()
    if hidden.ndim == 5 and case.given:
        frame = 1 if case.name == "Kandinsky image" else 2
        assert not changed.narrow(frame, 0, case.given).any()


def test_one_pass_without_what_is_not_needed(case: RealCase, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, single, clip, latents = single_of(case)
    backbone, ran, texts = single.backbone, [], []
    width = backbone.text_width(pipe.transformer)
    methods = ("concept_attention",) if isinstance(backbone, JointBackbone) else ("cross_attention",)
    sites = [backbone.sites(transformer) for transformer in find_transformers(pipe)]
    monkeypatch.setattr(pipe.vae, "decode", lambda *_, **__: pytest.fail("the VAE decodes"))
    hooks = [
        site.block.register_forward_pre_hook(lambda block, args: ran.append(block)) for own in sites for site in own
    ]
    encoder = getattr(pipe, "text_encoder", None)
    if encoder is not None:
        hooks.append(encoder.register_forward_pre_hook(lambda *_: texts.append(1)))
    maps = []
    for level in (0.5, 0.3):
        handle = attach(
            single.pipe, concept_embeds=seeded(2, width, seed=1), methods=methods, layers=[0], single_passes=True
        )
        try:
            single.run(latents, level, clip)
        finally:
            handle.remove()
        maps.append(handle.maps["cond"].get())
        if level == 0.5:
            encoded = len(texts)
    for hook in hooks:
        hook.remove()
    assert ran == [sites[-1][0].block] * 2  # of two transformers, the second is for little noise
    assert len(texts) == encoded
    frames = latents.shape[2] if not case.name.startswith("CogVideoX 1.5") else 2
    side = backbone.clip_shape(pipe).multiple
    assert maps[0].shape == (1, 2, frames, clip.shape[2] // side, clip.shape[3] // side)
    assert maps[0].isfinite().all()
    assert not torch.equal(maps[0], maps[1])


def test_the_pipeline_stays_as_it_is(case: RealCase) -> None:
    pipe, single, clip, latents = single_of(case)

    def generate() -> torch.Tensor:
        output = stock_run(case, pipe, single, clip, num_inference_steps=2)
        return output[0] if isinstance(output[0], torch.Tensor) else output[0][0]

    before, state = generate(), [kept_state(transformer) for transformer in find_transformers(pipe)]
    own = dict(pipe.__dict__)
    schedule, config = copy.deepcopy(pipe.scheduler.__dict__), dict(pipe.config)
    random = torch.get_rng_state()
    single.run(latents, 0.5, clip)
    assert torch.equal(torch.get_rng_state(), random)
    assert [kept_state(transformer) for transformer in find_transformers(pipe)] == state
    assert pipe.__dict__.keys() == own.keys()
    assert all(pipe.__dict__[name] is value for name, value in own.items())
    assert dict(pipe.config) == config
    assert all(
        same(pipe.scheduler.__dict__[name], value) for name, value in schedule.items() if name != "_internal_dict"
    )
    # Of so few frames, the deviation that Kandinsky's image-to-video divides by is none.
    torch.testing.assert_close(generate(), before, atol=0, rtol=0, equal_nan="Kandinsky" in case.name)


@pytest.mark.parametrize("name", ["FLUX.1", "SD3", "Qwen-Image"])
def test_a_control_net_sees_what_the_transformer_sees(name: str) -> None:
    case = next(case for case in CASES if case.name == f"{name} control net")
    pipe, single, clip, latents = single_of(case)
    seen: list[torch.Tensor] = []
    hook = pipe.controlnet.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with forward_passes(pipe) as passes:
        single.run(latents, 0.5, clip)
    hook.remove()
    assert torch.equal(seen[0], passes[0]["hidden_states"])


def test_a_pipeline_that_extends_videos_is_refused() -> None:
    pipe, _ = video_to_video()
    single = SinglePass(pipe, prompt="a red dog")
    with pytest.raises(dcm.ConceptMapsError, match="extends a video, and of a clip that it is given nothing is noise"):
        single.run(torch.zeros(1, 16, 3, 6, 10), 0.5, torch.zeros(9, 3, 48, 80))


@pytest.mark.parametrize("plus", [False, True])
def test_an_edited_image_stays(plus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock pipelines bring it to a megapixel, which is too much here."""
    name = "pipeline_qwenimage_edit_plus" if plus else "pipeline_qwenimage_edit"
    module = importlib.import_module(f"diffusers.pipelines.qwenimage.{name}")
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (16, 32) if plus else (16, 32, None))
    cls = diffusers.QwenImageEditPlusPipeline if plus else diffusers.QwenImageEditPipeline
    pipe = qwen_image(cls, processor=None)
    case = RealCase(name, lambda: pipe, {"prompt_embeds": seeded(1, 7, tiny_qwenimage.WIDTH, seed=8)})
    test_conditions_stay(case)
    test_the_transformer_gets_the_clip_noised_as_in_a_run(case)
    test_the_pipeline_stays_as_it_is(case)


def test_layers_of_an_image_cannot_be_made_of_it() -> None:
    parts = tiny_qwenimage.make_components(channels=8, colors=4, use_layer3d_rope=True, use_additional_t_cond=True)
    single = SinglePass(
        tiny_qwenimage.set_up(diffusers.QwenImageLayeredPipeline(**parts, processor=None)), prompt="a red dog"
    )
    with pytest.raises(dcm.ConceptMapsError, match="makes the layers of an image, which an image alone does not have"):
        single.run(torch.zeros(1, 4, 1, 6, 10), 0.5, torch.zeros(1, 3, 24, 40))


def test_an_image_model_takes_one_frame() -> None:
    case = next(case for case in CASES if case.name == "SD3")
    _, single, clip, _ = single_of(case)
    with pytest.raises(dcm.ConceptMapsError, match="the model makes images, but the clip has 2 frames"):
        single.run(single.encode(clip.repeat(2, 1, 1, 1).transpose(0, 1)[None]), 0.5, clip)


def test_a_clip_of_another_size_is_refused() -> None:
    case = next(case for case in CASES if case.name == "Wan 2.1")
    _, single, clip, latents = single_of(case)
    with pytest.raises(dcm.ConceptMapsError, match=r"the latents of the clip are \(1, 16, 2, 6, 10\); pass a size"):
        single.run(latents[:, :, :2], 0.5, clip)


def test_a_copy_of_the_scheduler_has_one_step_too() -> None:
    """Some pipelines have one for every frame, or for sound."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    own = copy.deepcopy(noising.at_level(scheduler, 0.3))
    own.set_timesteps(5)
    assert own.timesteps.tolist() == pytest.approx([300.0])
    assert own.sigmas.tolist() == pytest.approx([0.3, 0.0])
    assert scheduler.timesteps.shape == (1000,)


@pytest.mark.parametrize("name", ["Cosmos", "Cosmos 2, text to image"])
def test_all_noise_is_the_most_that_a_schedule_has(name: str) -> None:
    """At no level does a clip that stays as large as it is vanish."""
    case = next(case for case in CASES if case.name == name)
    pipe, single, clip, latents = single_of(case)
    single.run(latents, 1.0, clip)
    assert float(single.pipe.scheduler.sigmas[0]) == 80.0
    noisy = single.backbone.add_noise(pipe, latents, torch.zeros_like(latents), 1.0)
    assert float(noisy.abs().max()) > 0


def test_clean_latents_are_told_to_be_noised() -> None:
    case = next(case for case in CASES if case.name == "Cosmos")
    pipe, single, clip, latents = single_of(case)
    with forward_passes(pipe) as passes:
        single.run(latents, 0.5, clip, noised=False)
        single.run(latents, 0.5, clip)
    torch.testing.assert_close(passes[0]["hidden_states"], latents / 0.5)  # of deviation 1
    assert torch.equal(passes[0]["timestep"], passes[1]["timestep"])
