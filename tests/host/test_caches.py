"""Caches of the host: frames are those of the cached stock, and `coverage` says which steps and layers have run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from backbones._oracle import kept_state
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import TaylorSeerCacheConfig
from host._families import CONCEPTS, Case, pipeline_of, run
from host._features import Blank, cells, refused

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones import find_backbone

STEPS = 6
BLOCKS = ("transformer_blocks", "single_transformer_blocks", "blocks")


def timestep_of(pipe: Any) -> float:
    """The step a pipeline is at, from 1000 down; some caches compare it before the first one."""
    return 1000.0 if pipe._current_timestep is None else float(pipe._current_timestep)


# Their attention hooks count every pass, also of guidance in two passes: with 3, either branch is left out at times.
def pyramid(pipe: Any) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        cross_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 901),
        cross_attention_timestep_skip_range=(-1, 901),
        spatial_attention_block_identifiers=BLOCKS,
        cross_attention_block_identifiers=BLOCKS,
        current_timestep_callback=lambda: timestep_of(pipe),
    )


def faster(case: Case, pipe: Any) -> FasterCacheConfig:
    formats = {"CogVideoX": "BFCHW", "Flux": "BCHW"}
    return FasterCacheConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 901),
        tensor_format=formats.get(case.name, "BCFHW"),
        is_guidance_distilled=case.guidance != "batched",
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: timestep_of(pipe),
    )


@contextmanager
def counted(case: Case, pipe: Any) -> Iterator[torch.Tensor]:
    """Which layers of a transformer attend in which step `[step, layer]`, in its conditional pass."""
    transformer = pipe.transformer
    sites = find_backbone(transformer).sites(transformer)
    ran, passes = torch.zeros(STEPS, len(sites), dtype=torch.bool), [-1]
    per_step = 2 if case.guidance == "two passes" else 1

    def begin(*_: Any) -> None:
        passes[0] += 1

    def note(layer: int) -> None:
        if passes[0] % per_step == 0:
            ran[passes[0] // per_step, layer] = True

    hooks = [transformer.register_forward_pre_hook(begin)]
    for layer, site in enumerate(sites):
        hooks.append(site.attention.to_q.register_forward_pre_hook(lambda *_, layer=layer: note(layer)))
    yield ran
    for hook in hooks:
        hook.remove()


def expect_coverage(case: Case, pipe: Any, *, skips: bool = True) -> None:
    """Frames are those of the cached stock, and maps are made of what that runs: with `skips` not of everything."""
    plain = run(case, pipe, num_inference_steps=STEPS)
    with counted(case, pipe) as ran:
        off = run(case, pipe, num_inference_steps=STEPS)
    assert not torch.equal(off, run(case, pipeline_of(case), num_inference_steps=STEPS))
    before = kept_state(pipe.transformer)
    with dcm.trace(pipe, CONCEPTS, methods=case.methods) as maps:
        on = run(case, pipe, num_inference_steps=STEPS)
    assert torch.equal(off, plain)
    assert torch.equal(on, off)
    assert kept_state(pipe.transformer) == before
    assert bool(ran.all()) != skips
    for method in case.methods:
        assert torch.equal(maps.coverage[method], ran)
        assert maps.get(method).isfinite().all()


@pytest.mark.parametrize(("case", "blank"), cells("first block cache"))
def test_first_block_cache(case: Case, blank: Blank | None) -> None:
    pipe = case.pipeline()
    if not refused(blank, lambda: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=2.0))):
        expect_coverage(case, pipe)


@pytest.mark.parametrize(("case", "blank"), cells("pyramid"))
def test_pyramid_attention_broadcast(case: Case, blank: Blank | None) -> None:
    pipe = case.pipeline()
    if not refused(blank, lambda: pipe.transformer.enable_cache(pyramid(pipe))):
        expect_coverage(case, pipe)


@pytest.mark.parametrize(("case", "blank"), cells("faster cache"))
def test_faster_cache(case: Case, blank: Blank | None) -> None:
    pipe = case.pipeline()
    if not refused(blank, lambda: pipe.transformer.enable_cache(faster(case, pipe))):
        expect_coverage(case, pipe, skips=case.joint)  # of a block with both, it leaves the self-attention out


@pytest.mark.parametrize(("case", "blank"), cells("taylor"))
def test_taylor_seer(case: Case, blank: Blank | None) -> None:
    pipe = case.pipeline()
    config = TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, cache_identifiers=[r"[^.]*blocks\.\d+\.attn\d?"]
    )
    if not refused(blank, lambda: pipe.transformer.enable_cache(config)):
        expect_coverage(case, pipe)


@pytest.mark.parametrize(("case", "blank"), cells("first block cache"))
def test_a_cache_around_a_capture(case: Case, blank: Blank | None) -> None:
    """Enabled while traced, and disabled afterwards, it leaves nothing; the maps are those of a cache from before."""
    if blank is not None:
        return
    pipe = case.pipeline()
    before, plain = kept_state(pipe.transformer), run(case, pipe, num_inference_steps=STEPS)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=2.0))
    with dcm.trace(pipe, CONCEPTS, methods=case.methods) as expected:
        off = run(case, pipe, num_inference_steps=STEPS)
    pipe.transformer.disable_cache()
    with dcm.trace(pipe, CONCEPTS, methods=case.methods) as maps:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=2.0))
        assert torch.equal(run(case, pipe, num_inference_steps=STEPS), off)
        pipe.transformer.disable_cache()
    assert torch.equal(maps.get(), expected.get())
    assert torch.equal(maps.coverage["imap"], expected.coverage["imap"])
    assert [name for name, *_ in kept_state(pipe.transformer)] == [name for name, *_ in before]
    assert torch.equal(run(case, pipe, num_inference_steps=STEPS), plain)
