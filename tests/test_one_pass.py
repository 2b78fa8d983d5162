"""`attention="one_pass"`: the maps of "exact", and frames equal on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from backbones import tiny_cogvideox_variants as variants
from torch import nn

import diffusers_concept_maps as dcm

CONCEPTS = ["dog", "running", "sky"]
METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")
TWO = ["a red dog", "a cat on the rock"]
Run = Callable[[], torch.Tensor]


def both_ways(
    pipe: Any, run: Run, concepts: list[str] | None = CONCEPTS, methods: tuple[str, ...] = METHODS, **options: Any
) -> Any:
    """Trace a run in both modes: frames are those of the stock pipeline, maps agree to 1e-5. Returns the maps."""
    off = run()
    traced = {}
    for attention in ("exact", "one_pass"):
        with dcm.trace(pipe, concepts, methods=methods, attention=attention, **options) as maps:
            assert torch.equal(run(), off)
        traced[attention] = maps if isinstance(maps, dict) else {"": maps}
    for branch, exact in traced["exact"].items():
        joined = traced["one_pass"][branch]
        assert joined.metadata == exact.metadata | {"attention": "one_pass"}
        for method in methods:
            assert torch.equal(joined.coverage[method], exact.coverage[method])
            assert (exact.get(method).flatten(2).std(-1) > 1e-6).all()
            # Where a mode has rounded an argument of a softmax or a z-score last: of the largest value.
            scale = max(1.0, float(exact.get(method).abs().max()))
            torch.testing.assert_close(joined.get(method), exact.get(method), rtol=0, atol=1e-5 * scale)
    return maps


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "sincos"])
@pytest.mark.parametrize("normalize", [None, "none", "softmax", "zscore"])
def test_maps_are_those_of_exact(normalize: str | None, rope: bool) -> None:
    pipe = tiny.make_pipeline(rope=rope)
    both_ways(pipe, lambda: tiny.call(pipe, TWO), normalize=normalize)


OPTIONS: dict[str, dict[str, Any]] = {
    "one layer": {"layers": [1]},
    "some layers and steps": {"layers": [0, 2], "steps": [1]},
    "one head": {"heads": [3]},
    "best heads": {"heads": dcm.HeadSelection(score="fisher", top_k=2)},
    "unconditional": {"branch": "uncond"},
    "both branches": {"branch": "both"},
    "queries and keys": {"space": "query_key"},
    "values": {"space": "value"},
    "reads the image": {"reads": "image"},
    "reads concepts": {"reads": "concepts"},
    "reads nothing": {"reads": "none"},
    "one concept": {"concepts": ["dog"]},
    "parity imap": {"parity": "imap"},
    "parity concept_attention": {"parity": "concept_attention", "methods": METHODS[:2]},
    "embeddings": {"concepts": None, "concept_embeds": torch.randn(3, 32, generator=torch.Generator().manual_seed(1))},
    "embeddings per video": {
        "concepts": None,
        "concept_embeds": torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2)),
        "branch": "both",
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name: str) -> None:
    pipe = tiny.make_pipeline()
    both_ways(pipe, lambda: tiny.call(pipe, TWO, generator=torch.Generator().manual_seed(2)), **OPTIONS[name])


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_every_pipeline(name: str) -> None:
    variant = variants.VARIANTS[name]
    pipe = variants.make_pipeline(variant)
    both_ways(pipe, lambda: variants.call(pipe, variant))


CALLS: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0},
    "two prompts": {"prompt": TWO, "negative_prompt": ["sky", "the beach"]},
    "several videos": {"num_videos_per_prompt": 2},
    "portrait": {"height": 112, "width": 16},
    "two tokens": {"height": 16, "width": 32},
    "one frame": {"num_frames": 1},
    "mask": {"attention_kwargs": {"attention_mask": torch.zeros(2, 1, 57).index_fill(2, torch.arange(4, 20), -1e4)}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_frames_of_a_call(name: str, dtype: torch.dtype) -> None:
    pipe = tiny.make_pipeline(dtype=dtype)
    options = CALLS[name]
    if name == "mask":
        options = {"attention_kwargs": {"attention_mask": options["attention_kwargs"]["attention_mask"].to(dtype)}}
    off = tiny.call(pipe, **options)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS, attention="one_pass") as maps:
        assert torch.equal(tiny.call(pipe, **options), off)
    assert maps.get().isfinite().all()
    if dtype == torch.float32:
        both_ways(pipe, lambda: tiny.call(pipe, **options), normalize="none")


@pytest.mark.parametrize("prepare", ["fused", "fused, left in", "left in", "router", "offload", "casting"])
def test_whatever_the_state_of_the_model(prepare: str) -> None:
    dtype = torch.bfloat16 if prepare == "casting" else torch.float32
    pipe, cpu = tiny.make_pipeline(dtype=dtype), torch.device("cpu")
    transformer = pipe.transformer
    if prepare.startswith("fused"):
        transformer.fuse_qkv_projections()
    if prepare.endswith("left in"):
        transformer.set_attn_processor(dcm.concept_attn_processors(transformer))
    elif prepare == "router":
        transformer.set_attn_processor(dcm.ConceptAttnProcessor())
    elif prepare == "offload":
        transformer.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    elif prepare == "casting":
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    if dtype == torch.float32:
        both_ways(pipe, lambda: tiny.call(pipe, TWO))
        return
    off = tiny.call(pipe, TWO)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS, attention="one_pass") as maps:
        assert torch.equal(tiny.call(pipe, TWO), off)
    assert maps.get().isfinite().all()


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 3, 4, 6, 10, generator=generator).requires_grad_(),
        "encoder_hidden_states": torch.randn(2, 12, 32, generator=generator).requires_grad_(),
        "timestep": torch.tensor([900, 300]),
    }


def test_gradients_are_unchanged_but_for_rounding() -> None:
    transformer = tiny.make_transformer()
    embeds = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))

    def run() -> list[torch.Tensor]:
        transformer.zero_grad(set_to_none=True)
        given = inputs()
        output = transformer(**given, return_dict=False)[0]
        output.square().sum().backward()
        leaves = [given["hidden_states"], given["encoder_hidden_states"], *transformer.parameters()]
        return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    off = run()
    with dcm.trace(transformer, concept_embeds=embeds, methods=METHODS, attention="one_pass") as maps:
        on = run()
    assert torch.equal(on[0], off[0])
    assert len(on) == len(off) > 20
    for a, b in zip(on, off, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))
    assert not maps.get().requires_grad


def test_hooks_of_the_user_see_what_they_saw() -> None:
    pipe = tiny.make_pipeline()
    seen: list[torch.Tensor] = []

    def watch(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["encoder_hidden_states"].clone())

    def steer(block: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen.extend(tensor.clone() for tensor in output)
        return output[0] * 1.1, output[1] * 0.9

    for block in pipe.transformer.transformer_blocks:
        block.register_forward_pre_hook(watch, with_kwargs=True)
        block.register_forward_hook(steer)
    off = tiny.call(pipe)
    before = list(seen)
    seen.clear()
    with dcm.trace(pipe, CONCEPTS, attention="one_pass"):
        assert torch.equal(tiny.call(pipe), off)
    assert len(seen) == len(before) == 27  # steps x blocks x (text in, video out, text out)
    for a, b in zip(seen, before, strict=True):
        assert torch.equal(a, b)


def test_hooks_with_kwargs_see_the_concepts_in_the_inputs() -> None:
    pipe = tiny.make_pipeline()
    lengths: list[tuple[int, int]] = []

    def watch(block: nn.Module, args: Any, kwargs: dict[str, Any], output: tuple[torch.Tensor, ...]) -> None:
        lengths.append((kwargs["encoder_hidden_states"].shape[1], output[1].shape[1]))

    for block in pipe.transformer.transformer_blocks:
        block.register_forward_hook(watch, with_kwargs=True)
    tiny.call(pipe)
    assert set(lengths) == {(12, 12)}
    lengths.clear()
    with dcm.trace(pipe, CONCEPTS, attention="one_pass"):
        tiny.call(pipe)
    assert set(lengths) == {(12 + len(CONCEPTS), 12)}


def test_the_mixin_takes_it() -> None:
    stock = tiny.make_pipeline()
    off = tiny.call(stock)
    pipe = dcm.with_concept_maps(stock)
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "max_sequence_length": 12, "output_type": "latent"}
    output = pipe(
        "a red dog running on the beach",
        generator=torch.Generator().manual_seed(0),
        concepts=CONCEPTS,
        attention="one_pass",
        **settings,
        **tiny.SIZE,
    )
    assert torch.equal(output.frames, off)
    assert output.concept_maps.metadata["attention"] == "one_pass"
