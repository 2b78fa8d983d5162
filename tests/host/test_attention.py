"""Other attention backends, fused projections and IP-Adapters: before a capture, and while it is attached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backbones._oracle import kept_state
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from host._families import CONCEPTS, FLUX, SD3, WAN, Case, pipeline_of, run, same_maps, traced
from host._features import Blank, cells, refused

import diffusers_concept_maps as dcm
from diffusers_concept_maps import listener
from diffusers_concept_maps.backbones import find_backbone

SWAPS = ("CogVideoX", "SD3")
"""The families whose processors are replaced when projections are fused."""


@pytest.fixture(autouse=True)
def global_backend() -> Iterator[None]:
    """Setting the backend of a model sets that of the process as well."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(listener.logger, "warning", messages.append)
    return messages


def backends(pipe: Any) -> set[Any]:
    sites = find_backbone(pipe.transformer).sites(pipe.transformer)
    return {getattr(site.attention.processor, "_attention_backend", "none of its own") for site in sites}


@pytest.mark.parametrize(("case", "blank"), cells("backend"))
@pytest.mark.parametrize("before", [True, False], ids=["before", "while attached"])
def test_attention_backend(case: Case, blank: Blank | None, before: bool) -> None:
    """Set while a capture is attached, it is still set afterwards."""
    pipe, plain = case.pipeline(), run(case, pipeline_of(case))
    if before:
        pipe.transformer.set_attention_backend("_native_math")
    with dcm.trace(pipe, CONCEPTS, methods=case.methods) as maps:
        if not before:
            pipe.transformer.set_attention_backend("_native_math")
        on = run(case, pipe)
    assert torch.equal(run(case, pipe), on)
    assert backends(pipe) == ({"none of its own"} if blank else {"_native_math"})
    assert torch.equal(on, plain) == (blank is not None)
    stock = case.pipeline()
    stock.transformer.set_attention_backend("_native_math")
    assert torch.equal(run(case, stock), on)
    same_maps(case, maps, traced(case, stock)[1], 0.0)


@pytest.mark.parametrize(("case", "blank"), cells("fuse"))
def test_fused_projections(case: Case, blank: Blank | None) -> None:
    pipe = case.pipeline()
    pipe.transformer.fuse_qkv_projections()
    fused = any(name.endswith(("to_qkv", "to_kv")) for name, _ in pipe.transformer.named_modules())
    assert fused == (blank is None)
    off, before = run(case, pipe), kept_state(pipe.transformer)
    on, maps = traced(case, pipe)
    assert torch.equal(on, off)
    assert kept_state(pipe.transformer) == before
    same_maps(case, maps, traced(case, pipeline_of(case))[1])


@pytest.mark.parametrize(("case", "blank"), cells("fuse while attached"))
def test_fusing_while_attached(case: Case, blank: Blank | None, warnings: list[str]) -> None:
    pipe, fused = case.pipeline(), case.pipeline()
    fused.transformer.fuse_qkv_projections()
    off = run(case, fused)
    with dcm.trace(pipe, CONCEPTS, methods=case.methods) as maps:
        pipe.transformer.fuse_qkv_projections()
        assert torch.equal(run(case, pipe), off)
    assert torch.equal(run(case, pipe), off)
    assert len(warnings) == (case.name in SWAPS)
    if case.name in SWAPS:
        assert "were replaced during the capture by Fused" in warnings[0]
        with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded"):
            maps.get()
    else:
        same_maps(case, maps, traced(case, fused)[1])
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(run(case, pipe), run(case, pipeline_of(case)))


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def load_flux_adapter(pipe: Any) -> None:
    """What `load_ip_adapter` does once it has read the files."""
    config = pipe.transformer.config
    text, inner = config.joint_attention_dim, config.attention_head_dim * config.num_attention_heads
    weights = {}
    for layer in range(config.num_layers):
        for seed, name in enumerate(("to_k_ip", "to_v_ip")):
            weights[f"{layer}.{name}.weight"] = numbers(inner, text, seed=2 * layer + seed)
            weights[f"{layer}.{name}.bias"] = numbers(inner, seed=2 * layer + seed)
    projection = {
        "proj.weight": numbers(4 * text, 8, seed=50),
        "proj.bias": numbers(4 * text, seed=51),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    pipe.transformer._load_ip_adapter_weights({"image_proj": projection, "ip_adapter": weights})


def load_sd3_adapter(pipe: Any) -> None:
    """Likewise; it has processors and a projection of the image that are modules."""
    transformer, inner = pipe.transformer, pipe.transformer.inner_dim
    torch.manual_seed(3)
    transformer.image_proj = IPAdapterTimeImageProjection(
        embed_dim=8, output_dim=inner, hidden_dim=16, depth=1, dim_head=8, heads=2, num_queries=4, timestep_in_dim=320
    )
    head = transformer.config.attention_head_dim
    processors = {
        name: SD3IPAdapterJointAttnProcessor2_0(inner, inner, head, timesteps_emb_dim=16)
        for name in transformer.attn_processors
    }
    transformer.set_attn_processor(processors)


def run_adapted(case: Case, pipe: Any) -> torch.Tensor:
    """Latents of two prompts under an image."""
    if case is FLUX:
        embeds = [numbers(2, 1, 8, seed=60)]
        return run(case, pipe, ip_adapter_image_embeds=embeds, negative_ip_adapter_image_embeds=embeds)
    return run(case, pipe, ip_adapter_image_embeds=numbers(2, 5, 8, seed=60))


LOADERS = {FLUX.name: load_flux_adapter, SD3.name: load_sd3_adapter}


@pytest.mark.parametrize(("case", "blank"), cells("ip adapter"))
def test_ip_adapter(case: Case, blank: Blank | None) -> None:
    """Frames and maps are made with it; with nothing to read, maps are those of a model without it."""
    pipe = case.pipeline()
    if refused(blank, lambda: pipe.load_ip_adapter("anything") if blank else LOADERS[case.name](pipe)):
        return
    off, before = run_adapted(case, pipe), kept_state(pipe.transformer)
    with dcm.trace(pipe, CONCEPTS, methods=case.methods) as maps:
        on = run_adapted(case, pipe)
    assert torch.equal(on, off)
    assert not torch.equal(off, run(case, pipeline_of(case)))
    assert kept_state(pipe.transformer) == before
    plain, expected = traced(case, pipeline_of(case))
    assert not torch.equal(maps.get(), expected.get())
    with dcm.trace(pipe, CONCEPTS, methods=case.methods, steps=[0], layers=[0]) as first:
        run_adapted(case, pipe)
    with dcm.trace(pipeline_of(case), CONCEPTS, methods=case.methods, steps=[0], layers=[0]) as expected:
        run(case, pipeline_of(case))
    same_maps(case, first, expected, 0.0)  # the first layer of the first step has read nothing yet
    pipe.transformer.set_attn_processor(dcm.concept_attn_processors(pipe.transformer))
    assert torch.equal(run_adapted(case, pipe), off)


@pytest.mark.parametrize(("case", "blank"), cells("ip adapter while attached"))
def test_loading_an_ip_adapter_while_attached(case: Case, blank: Blank | None, warnings: list[str]) -> None:
    pipe, adapted = case.pipeline(), case.pipeline()
    if refused(blank, lambda: adapted.load_ip_adapter("anything") if blank else LOADERS[case.name](adapted)):
        return
    off = run_adapted(case, adapted)
    with dcm.trace(pipe, CONCEPTS, methods=case.methods):
        LOADERS[case.name](pipe)
        assert torch.equal(run_adapted(case, pipe), off)
    assert torch.equal(run_adapted(case, pipe), off)
    assert len(warnings) == 1
    assert "were replaced during the capture by" in warnings[0]


def test_a_backend_that_is_reset_while_attached() -> None:
    pipe = WAN.pipeline()
    pipe.transformer.set_attention_backend("_native_math")
    with dcm.trace(pipe, CONCEPTS, methods=WAN.methods):
        pipe.transformer.reset_attention_backend()
    assert backends(pipe) == {None}
