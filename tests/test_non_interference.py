"""Frames are those of the stock pipeline, bit for bit, while everything is captured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from backbones import tiny_cogvideox as tiny
from diffusers import (
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from diffusers.hooks import MagCacheConfig, TaylorSeerCacheConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffusers_concept_maps as dcm

CONCEPTS = ["dog", "running", "sky"]
METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")
TWO = ["a red dog", "a cat on the rock"]
Run = Callable[[], torch.Tensor]


def assert_recorded(maps: dcm.ConceptMaps, latents: torch.Tensor, methods: tuple[str, ...] = METHODS) -> None:
    """There is a map per video, concept and token of what was generated, and it differs from token to token."""
    batch, frames, _, height, width = latents.shape
    for method in methods:
        recorded = maps.get(method)
        assert recorded.shape == (batch, len(CONCEPTS), frames, height // 2, width // 2)
        assert recorded.isfinite().all()
        assert (recorded.flatten(2).std(-1) > 1e-6).all()


def assert_same_frames(pipe: CogVideoXPipeline, run: Run, **options: Any) -> dcm.ConceptMaps:
    """`run` gives the same latents without a capture, under one and after one; returns the maps."""
    off = run()
    with dcm.trace(pipe, CONCEPTS, methods=METHODS, **options) as maps:
        on = run()
    after = run()
    assert off.isfinite().all()
    assert torch.equal(on, off)
    assert torch.equal(after, off)
    assert_recorded(maps, off)
    return maps


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "guidance below one": {"guidance_scale": 0.5},
    "dynamic guidance": {"use_dynamic_cfg": True},
    "two prompts": {"prompt": TWO},
    "two prompts without guidance": {"prompt": TWO, "guidance_scale": 0.0},
    "negative prompt": {"negative_prompt": "a red rock"},
    "negative prompts": {"prompt": TWO, "negative_prompt": ["sky", "the beach"]},
    "several videos": {"num_videos_per_prompt": 2},
    "larger": {"height": 80, "width": 112},
    "portrait": {"height": 112, "width": 16},
    "two tokens": {"height": 16, "width": 32},
    "one frame": {"num_frames": 1},
    "more frames": {"num_frames": 17},
    "frames between": {"num_frames": 8},
    "one step": {"num_inference_steps": 1},
    "lora scale": {"attention_kwargs": {"scale": 0.5}},
    "noise of every step": {"eta": 0.7},
}


@pytest.mark.parametrize(("rope", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_frames_of_a_call(variant: str, rope: bool, dtype: torch.dtype) -> None:
    pipe = tiny.make_pipeline(rope=rope, dtype=dtype)
    frames = tiny.call(pipe, **VARIANTS[variant])
    assert frames.dtype == dtype
    assert frames.shape[0] == (2 if VARIANTS[variant].get("prompt") == TWO else 1)
    assert_same_frames(pipe, lambda: tiny.call(pipe, **VARIANTS[variant]))


@pytest.mark.parametrize("heads", [None, dcm.HeadSelection(score="fisher", top_k=2)], ids=str)
def test_frames_of_one_token(heads: dcm.HeadSelection | None) -> None:
    pipe = tiny.make_pipeline()
    off = tiny.call(pipe, height=16, width=16)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS, heads=heads) as maps:
        assert torch.equal(tiny.call(pipe, height=16, width=16), off)
    for method in METHODS:
        assert maps.get(method).shape == (1, 3, 3, 1, 1)
        assert maps.get(method).isfinite().all()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_frames_from_prompt_embeds(guidance: float) -> None:
    pipe = tiny.make_pipeline()
    with torch.no_grad():
        embeds, negative = pipe.encode_prompt(TWO, "sky", guidance > 1, max_sequence_length=tiny.TEXT_LENGTH)
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "guidance_scale": guidance}
    maps = assert_same_frames(pipe, lambda: tiny.call(pipe, **given))
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as from_text:
        tiny.call(pipe, TWO, negative_prompt="sky", guidance_scale=guidance)
    assert torch.equal(maps.get(), from_text.get())


def test_frames_from_latents_and_generators() -> None:
    pipe = tiny.make_pipeline()
    latents = torch.randn(2, 3, 4, 6, 10, generator=torch.Generator().manual_seed(5))

    def run() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(i) for i in (7, 8)]
        return tiny.call(pipe, TWO, latents=latents.clone(), generator=generators, eta=1.0)

    assert_same_frames(pipe, run)


@pytest.mark.parametrize("length", [1, 5, 20])
def test_frames_with_another_text_length(length: int) -> None:
    pipe = tiny.make_pipeline()
    assert_same_frames(pipe, lambda: tiny.call(pipe, max_sequence_length=length))


def test_frames_under_an_attention_mask() -> None:
    pipe = tiny.make_pipeline()
    mask = torch.zeros(2, 1, tiny.TEXT_LENGTH + 45)
    mask[..., 4:20] = -1e4
    masked = {"attention_kwargs": {"attention_mask": mask}}
    assert not torch.equal(tiny.call(pipe, **masked), tiny.call(pipe))
    assert_same_frames(pipe, lambda: tiny.call(pipe, **masked))


@pytest.mark.parametrize("output_type", ["pt", "np", "pil"])
def test_decoded_frames(output_type: str) -> None:
    pipe = tiny.make_pipeline()
    off = tiny.call(pipe, output_type=output_type)
    with dcm.trace(pipe, CONCEPTS):
        on = tiny.call(pipe, output_type=output_type)
    assert type(on) is type(off)
    assert np.shape(off) == {"pt": (1, 9, 3, 48, 80), "np": (1, 9, 48, 80, 3), "pil": (1, 9, 48, 80, 3)}[output_type]
    assert np.array_equal(np.asarray(on), np.asarray(off))


def test_tuple_instead_of_output() -> None:
    pipe = tiny.make_pipeline()
    options = {"num_inference_steps": 2, "max_sequence_length": 12, "output_type": "latent", "return_dict": False}
    off = pipe("a dog", generator=torch.Generator().manual_seed(0), **options, **tiny.SIZE)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        on = pipe("a dog", generator=torch.Generator().manual_seed(0), **options, **tiny.SIZE)
    assert isinstance(on, tuple)
    assert len(on) == len(off) == 1
    assert torch.equal(on[0], off[0])
    assert_recorded(maps, off[0])


def change_latents(pipe: Any, step: int, timestep: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
    return {"latents": inputs["latents"] * 0.9 + step}


def change_prompt(pipe: Any, step: int, timestep: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
    return {"prompt_embeds": inputs["prompt_embeds"].flip(1)}


def switch_guidance_off(pipe: Any, step: int, timestep: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = 0.0
    return inputs


def interrupt(pipe: Any, step: int, timestep: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = step == 1
    return inputs


@pytest.mark.parametrize("change", [change_latents, change_prompt, switch_guidance_off, interrupt])
def test_callback_works_as_before(change: Callable[..., dict[str, Any]]) -> None:
    pipe = tiny.make_pipeline()
    seen: list[tuple[int, float, torch.Tensor]] = []

    def callback(pipe: Any, step: int, timestep: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, float(timestep), inputs["latents"].clone()))
        return change(pipe, step, timestep, inputs)

    def run() -> torch.Tensor:
        names = ["latents", "prompt_embeds"]
        return tiny.call(
            pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, num_inference_steps=4
        )

    assert not torch.equal(run(), tiny.call(pipe, num_inference_steps=4))
    seen.clear()
    assert_same_frames(pipe, run)
    steps = len(seen) // 3
    assert steps == (2 if change is interrupt else 4)
    for (step, timestep, latents), (step_on, timestep_on, latents_on) in zip(seen[:steps], seen[steps:], strict=False):
        assert (step, timestep) == (step_on, timestep_on)
        assert torch.equal(latents, latents_on)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": [1]},
        {"layers": [0, 2], "steps": [1]},
        {"heads": [3]},
        {"heads": dcm.HeadSelection(top_k=2)},
        {"branch": "uncond"},
        {"normalize": "none"},
        {"normalize": "softmax"},
        {"normalize": "zscore", "token_policy": "last"},
    ],
    ids=str,
)
def test_frames_whatever_is_captured(options: dict[str, Any]) -> None:
    pipe = tiny.make_pipeline()
    assert_same_frames(pipe, lambda: tiny.call(pipe, TWO), **options)


def test_frames_with_both_branches_and_own_embeddings() -> None:
    pipe = tiny.make_pipeline()
    embeds = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    off = tiny.call(pipe, TWO)
    with dcm.trace(pipe, concept_embeds=embeds, methods=METHODS, branch="both") as maps:
        assert torch.equal(tiny.call(pipe, TWO), off)
    assert_recorded(maps["cond"], off)
    assert_recorded(maps["uncond"], off)
    assert not torch.equal(maps["cond"].get(), maps["uncond"].get())


def test_frames_with_the_sampler_of_the_checkpoint() -> None:
    """Its noise comes from the global generator when none is given."""
    pipe = tiny.make_pipeline()
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)

    def run() -> torch.Tensor:
        torch.manual_seed(3)
        return tiny.call(pipe, generator=None)

    assert_same_frames(pipe, run)


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "sincos"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frames_with_fused_projections(rope: bool, dtype: torch.dtype) -> None:
    pipe = tiny.make_pipeline(rope=rope, dtype=dtype)
    pipe.transformer.fuse_qkv_projections()
    assert_same_frames(pipe, lambda: tiny.call(pipe, TWO))


@pytest.mark.parametrize("make", [dcm.concept_attn_processors, lambda transformer: dcm.ConceptAttnProcessor()])
def test_frames_with_processors_left_in(make: Callable[[Any], Any]) -> None:
    pipe = tiny.make_pipeline()
    stock = tiny.call(pipe, TWO)
    pipe.transformer.set_attn_processor(make(pipe.transformer))
    assert torch.equal(tiny.call(pipe, TWO), stock)
    assert_same_frames(pipe, lambda: tiny.call(pipe, TWO))


def test_frames_of_another_pipeline_class() -> None:
    stock = tiny.make_pipeline()
    pipe = CogVideoXVideoToVideoPipeline(**stock.components)
    pipe.set_progress_bar_config(disable=True)
    video = torch.rand(9, 3, 48, 80, generator=torch.Generator().manual_seed(4))
    size = {"height": 48, "width": 80, "max_sequence_length": 12, "output_type": "latent"}

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe([video], "a dog", strength=0.5, num_inference_steps=6, generator=generator, **size).frames

    assert_same_frames(pipe, run)
    with dcm.trace(pipe, CONCEPTS, steps=[3]), pytest.raises(dcm.ConceptMapsValueError, match="3 steps, 0 to 2"):
        run()


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "gradients": torch.enable_grad,
    "attention backend": lambda: sdpa_kernel(SDPBackend.MATH),
}


@pytest.mark.parametrize("around_trace", [True, False])
@pytest.mark.parametrize("name", CONTEXTS)
def test_frames_inside_a_context(name: str, around_trace: bool) -> None:
    pipe = tiny.make_pipeline()
    context = CONTEXTS[name]
    with context():
        off = tiny.call(pipe)
    with context() if around_trace else nullcontext(), dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        with nullcontext() if around_trace else context():
            on = tiny.call(pipe)
        inside = maps.get()
    assert torch.equal(on, off)
    assert_recorded(maps, off.float())
    assert torch.equal(maps.get(), inside)


def faster_cache(pipe: CogVideoXPipeline, attention_until: int) -> FasterCacheConfig:
    """Leaves the unconditional half of the batch out of every other step, and attention too while it does so."""
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, attention_until),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 901),
        tensor_format="BFCHW",
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def cache_config(name: str, pipe: CogVideoXPipeline) -> Any:
    return {
        "pyramid attention broadcast": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 901),
            current_timestep_callback=lambda: pipe.current_timestep,
        ),
        "first block": FirstBlockCacheConfig(threshold=2.0),
        "taylor": TaylorSeerCacheConfig(
            cache_interval=3, disable_cache_before_step=2, cache_identifiers=[r"transformer_blocks\.\d+\.attn1"]
        ),
        "magnitude": MagCacheConfig(mag_ratios=torch.linspace(1, 0.95, 8), num_inference_steps=8, threshold=0.5),
        "faster, attention": faster_cache(pipe, attention_until=901),
        "faster, half a batch": faster_cache(pipe, attention_until=0),
    }[name]


CACHES = (
    "pyramid attention broadcast", "first block", "taylor", "magnitude", "faster, attention", "faster, half a batch",
)  # fmt: skip


@pytest.mark.parametrize("name", CACHES)
def test_frames_with_a_cache(name: str) -> None:
    pipe = tiny.make_pipeline()

    def run() -> torch.Tensor:
        return tiny.call(pipe, TWO, num_inference_steps=8)

    uncached = run()
    pipe.transformer.enable_cache(cache_config(name, pipe))
    assert not torch.equal(run(), uncached)
    assert_same_frames(pipe, run)
    pipe.transformer.disable_cache()
    assert torch.equal(run(), uncached)


@pytest.mark.parametrize("offload", ["leaf_level", "block_level", "accelerate", "casting"])
def test_frames_with_offload_and_casting(offload: str) -> None:
    dtype = torch.bfloat16 if offload == "casting" else torch.float32
    pipe = tiny.make_pipeline(dtype=dtype)
    transformer, cpu = pipe.transformer, torch.device("cpu")
    if offload == "accelerate":
        accelerate.cpu_offload(transformer, execution_device=cpu)
        assert next(transformer.parameters()).is_meta
    elif offload == "casting":
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    else:
        blocks = {"num_blocks_per_group": 1} if offload == "block_level" else {}
        transformer.enable_group_offload(cpu, cpu, offload_type=offload, **blocks)
    assert_same_frames(pipe, lambda: tiny.call(pipe, TWO))


def test_hooks_of_the_user_see_what_they_saw() -> None:
    pipe = tiny.make_pipeline()
    seen: list[torch.Tensor] = []

    def steer(block: Any, args: Any, kwargs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen.append(output[0].clone())
        return output[0] * 1.1, output[1]

    def shift(block: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"temb": kwargs["temb"] + 0.1}

    def run() -> torch.Tensor:
        seen.clear()
        return tiny.call(pipe)

    plain = tiny.call(pipe)
    for block in pipe.transformer.transformer_blocks:
        block.register_forward_hook(steer, with_kwargs=True)
        block.register_forward_pre_hook(shift, with_kwargs=True)
    off, before = run(), list(seen)
    assert not torch.equal(off, plain)
    assert_same_frames(pipe, run)
    with dcm.trace(pipe, CONCEPTS):
        assert torch.equal(run(), off)
    assert len(seen) == len(before) == 9  # steps x blocks: the re-entry of a block is no call of it
    assert all(torch.equal(a, b) for a, b in zip(seen, before, strict=True))


def test_frames_in_training_mode() -> None:
    pipe = tiny.make_pipeline()
    pipe.transformer.train()
    assert_same_frames(pipe, lambda: tiny.call(pipe))
