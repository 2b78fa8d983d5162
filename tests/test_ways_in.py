"""Every way to install a capture gives the maps of `dcm.trace`; what is installed is the stock model while idle."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
    HunyuanAttnProcessor2_0,
)
from torch import nn

import diffusers_concept_maps as dcm
from diffusers_concept_maps.processors import ConceptProcessor

CONCEPTS = ["dog", "running", "sky"]
METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")
PROMPTS = ["a red dog", "a cat on the rock"]


class ConceptPipeline(dcm.ConceptMapsMixin, CogVideoXPipeline):
    """What a user writes to have a pipeline class of his own."""


class RefinedTransformer(CogVideoXTransformer3DModel):  # type: ignore[misc]  # untyped host
    """A CogVideoX whose text goes through self-attention first, as that of other models does."""

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        refined = encoder_hidden_states + self.refiner(encoder_hidden_states)
        return super().forward(hidden_states, refined, *args, **kwargs)


def make_pipeline(rope: bool = True, fused: bool = False, refined: bool = False) -> CogVideoXPipeline:
    pipe = tiny.make_pipeline(rope=rope)
    if fused:
        pipe.transformer.fuse_qkv_projections()
    if refined:
        transformer = pipe.transformer
        transformer.__class__ = RefinedTransformer
        torch.manual_seed(6)
        transformer.refiner = Attention(query_dim=32, heads=4, dim_head=8, processor=AttnProcessor2_0()).eval()
    return pipe


def record(pipe: CogVideoXPipeline) -> tuple[torch.Tensor, dcm.ConceptMaps]:
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        frames = tiny.call(pipe, PROMPTS)
    return frames, maps


def call_with_concepts(pipe: Any) -> tuple[torch.Tensor, dcm.ConceptMaps]:
    output = pipe(
        PROMPTS,
        concepts=CONCEPTS,
        methods=METHODS,
        num_inference_steps=3,
        guidance_scale=4.0,
        max_sequence_length=tiny.TEXT_LENGTH,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **tiny.SIZE,
    )
    return output.frames, output.concept_maps


def by_with_concept_maps(pipe: CogVideoXPipeline) -> tuple[torch.Tensor, dcm.ConceptMaps]:
    return call_with_concepts(dcm.with_concept_maps(pipe))


def by_own_class(pipe: CogVideoXPipeline) -> tuple[torch.Tensor, dcm.ConceptMaps]:
    own = ConceptPipeline(**pipe.components)
    own.set_progress_bar_config(disable=True)
    return call_with_concepts(own)


def by_dict(pipe: CogVideoXPipeline) -> tuple[torch.Tensor, dcm.ConceptMaps]:
    pipe.transformer.set_attn_processor(dcm.concept_attn_processors(pipe.transformer))
    return record(pipe)


def by_router(pipe: CogVideoXPipeline) -> tuple[torch.Tensor, dcm.ConceptMaps]:
    pipe.transformer.set_attn_processor(dcm.ConceptAttnProcessor())
    return record(pipe)


def by_router_used_before(pipe: CogVideoXPipeline) -> tuple[torch.Tensor, dcm.ConceptMaps]:
    pipe.transformer.set_attn_processor(dcm.ConceptAttnProcessor())
    tiny.call(pipe)
    return record(pipe)


def by_mixin_and_dict(pipe: CogVideoXPipeline) -> tuple[torch.Tensor, dcm.ConceptMaps]:
    mixed = dcm.with_concept_maps(pipe)
    mixed.set_attn_processor(dcm.concept_attn_processors(mixed.transformer))
    return call_with_concepts(mixed)


def by_mixin_and_router(pipe: CogVideoXPipeline) -> tuple[torch.Tensor, dcm.ConceptMaps]:
    mixed = dcm.with_concept_maps(pipe)
    mixed.set_attn_processor(dcm.ConceptAttnProcessor())
    return call_with_concepts(mixed)


def by_handle(pipe: CogVideoXPipeline) -> tuple[torch.Tensor, dcm.ConceptMaps]:
    handle = dcm.attach(pipe, CONCEPTS, methods=METHODS)
    frames = tiny.call(pipe, PROMPTS)
    handle.remove()
    return frames, handle.maps["cond"]


WAYS = [
    by_with_concept_maps, by_own_class, by_dict, by_router, by_router_used_before, by_mixin_and_dict,
    by_mixin_and_router, by_handle,
]  # fmt: skip


@cache
def reference(rope: bool, fused: bool, refined: bool) -> tuple[torch.Tensor, dcm.ConceptMaps]:
    """Frames of the stock pipeline and maps of `dcm.trace`."""
    pipe = make_pipeline(rope, fused, refined)
    return tiny.call(pipe, PROMPTS), record(pipe)[1]


@pytest.mark.parametrize(
    ("rope", "fused", "refined"),
    [(True, False, False), (False, False, False), (True, True, False), (True, False, True), (False, True, True)],
)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_maps_of_trace(
    way: Callable[[CogVideoXPipeline], Any], rope: bool, fused: bool, refined: bool
) -> None:
    stock, expected = reference(rope, fused, refined)
    pipe = make_pipeline(rope, fused, refined)
    frames, maps = way(pipe)
    assert torch.equal(frames, stock)
    for method in METHODS:
        assert torch.equal(maps.get(method), expected.get(method))
    assert maps.metadata == expected.metadata
    assert torch.equal(tiny.call(pipe, PROMPTS), stock)  # with what was installed left in


@pytest.mark.parametrize("fused", [False, True])
def test_the_dict_is_full_and_of_the_stock_classes(fused: bool) -> None:
    transformer = make_pipeline(fused=fused, refined=True).transformer
    stock = transformer.attn_processors
    processors = dcm.concept_attn_processors(transformer)
    assert processors.keys() == stock.keys()
    assert len({id(processor) for processor in processors.values()}) == len(stock) == 4
    for name, processor in processors.items():
        assert isinstance(processor, type(stock[name]))
        assert isinstance(processor, ConceptProcessor)
        assert processor.recorder is None
    joint = FusedCogVideoXAttnProcessor2_0 if fused else CogVideoXAttnProcessor2_0
    assert {type(processor) for processor in stock.values()} == {joint, AttnProcessor2_0}
    assert all(transformer.attn_processors[name] is stock[name] for name in stock)  # none has been set


def test_a_shared_stock_processor_becomes_one_object_per_module() -> None:
    transformer = tiny.make_transformer()
    shared = CogVideoXAttnProcessor2_0()
    shared._attention_backend = "native"
    transformer.set_attn_processor(shared)
    processors = dcm.concept_attn_processors(transformer)
    assert len({id(processor) for processor in processors.values()}) == 3
    assert all(vars(processor) == {"_attention_backend": "native"} for processor in processors.values())


def test_backend_and_parallel_configuration_are_carried_over() -> None:
    transformer = make_pipeline(refined=True).transformer
    for processor in transformer.attn_processors.values():
        processor._attention_backend, processor._parallel_config = object(), object()
    stock = transformer.attn_processors
    for name, processor in dcm.concept_attn_processors(transformer).items():
        assert vars(processor) == vars(stock[name])
    with dcm.trace(transformer, concept_embeds=torch.ones(1, 32)):
        for name, processor in transformer.attn_processors.items():
            assert processor._attention_backend is stock[name]._attention_backend
            assert processor._parallel_config is stock[name]._parallel_config


@pytest.mark.parametrize("install", [dcm.concept_attn_processors, lambda transformer: dcm.ConceptAttnProcessor()])
def test_other_processors_are_not_made_out_of_ours(install: Callable[[Any], Any]) -> None:
    transformer = tiny.make_transformer()
    transformer.set_attn_processor(install(transformer))
    with pytest.raises(dcm.ConceptMapsError, match="already"):
        dcm.concept_attn_processors(transformer)


def test_unsupported_transformers_get_no_processors() -> None:
    with pytest.raises(dcm.ConceptMapsError, match="Linear cannot be traced; supported are .*CogVideoX"):
        dcm.concept_attn_processors(nn.Linear(1, 1))


def transformer_inputs(dtype: torch.dtype, rope: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    angles = torch.rand(45, 16, generator=generator) * 6
    return {
        "hidden_states": torch.randn(2, 3, 4, 6, 10, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(2, 12, 32, generator=generator).to(dtype),
        "timestep": torch.tensor([500, 20]),
        "image_rotary_emb": (angles.cos(), angles.sin()) if rope else None,
    }


def fuse_before(transformer: Any, install: Callable[[], None]) -> None:
    transformer.fuse_qkv_projections()
    install()


def fuse_after(transformer: Any, install: Callable[[], None]) -> None:
    """Fusing puts a stock processor into every module; the user sets his own again."""
    install()
    with torch.no_grad():
        transformer(**transformer_inputs(transformer.dtype, rope=True))
    transformer.fuse_qkv_projections()
    stock = FusedCogVideoXAttnProcessor2_0()
    assert all(type(processor) is type(stock) for processor in transformer.attn_processors.values())
    install()


def fuse_modules_under(transformer: Any, install: Callable[[], None]) -> None:
    """The modules are fused one by one, with what was installed left in place and used before."""
    transformer.set_attn_processor(dcm.ConceptAttnProcessor())
    with torch.no_grad():
        transformer(**transformer_inputs(transformer.dtype, rope=True))
    for block in transformer.transformer_blocks:
        block.attn1.fuse_projections()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("how", [None, fuse_before, fuse_after, fuse_modules_under])
@pytest.mark.parametrize("kind", ["dict", "router"])
def test_idle_processors_are_the_stock_ones(kind: str, how: Any, rope: bool, dtype: torch.dtype) -> None:
    stock, ours = (tiny.make_transformer(rope=rope).to(dtype) for _ in range(2))

    def install() -> None:
        new = dcm.concept_attn_processors(ours) if kind == "dict" else dcm.ConceptAttnProcessor()
        ours.set_attn_processor(new)

    if how is None:
        install()
    else:
        stock.fuse_qkv_projections()
        how(ours, install)
    inputs = transformer_inputs(dtype, rope)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(ours(**inputs)[0], stock(**inputs)[0])


def self_attention(**options: Any) -> Attention:
    torch.manual_seed(3)
    return Attention(query_dim=32, heads=4, dim_head=8, processor=AttnProcessor2_0(), **options).eval()


@pytest.mark.parametrize(
    ("options", "shape", "masked"),
    [
        ({}, (2, 7, 32), False),
        ({"bias": True}, (2, 7, 32), True),
        ({"qk_norm": "layer_norm", "residual_connection": True, "rescale_output_factor": 2.0}, (2, 7, 32), False),
        ({"norm_num_groups": 4, "residual_connection": True}, (2, 32, 3, 5), False),
        ({"spatial_norm_dim": 6}, (2, 32, 3, 5), False),
    ],
)
def test_attention_without_text(options: dict[str, Any], shape: tuple[int, ...], masked: bool) -> None:
    attention = self_attention(**options)
    states = torch.randn(shape)
    given: dict[str, Any] = {}
    if masked:
        given["attention_mask"] = torch.where(torch.rand(2, 1, 7) < 0.5, -1e4, 0.0)
    if "spatial_norm_dim" in options:
        given["temb"] = torch.randn(2, 6, 3, 5)
    with torch.no_grad():
        expected = attention(states, **given)
        attention.set_processor(dcm.ConceptAttnProcessor())
        for _ in range(2):
            assert torch.equal(attention(states, **given), expected)


def test_one_router_serves_many_models() -> None:
    router = dcm.ConceptAttnProcessor()
    pipes = [make_pipeline(refined=True), make_pipeline(rope=False), make_pipeline()]
    pipes[2].transformer.fuse_qkv_projections()
    stock = [tiny.call(pipe, PROMPTS) for pipe in pipes]
    expected = [record(pipe)[1].get() for pipe in pipes]
    for pipe in pipes:
        pipe.transformer.set_attn_processor(router)
    for pipe, frames, wanted in zip(pipes, stock, expected, strict=True):
        assert torch.equal(tiny.call(pipe, PROMPTS), frames)
        with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
            tiny.call(pipe, PROMPTS)
            assert all(
                torch.equal(tiny.call(p, PROMPTS), f) for p, f in zip(pipes, stock, strict=True) if p is not pipe
            )
        assert torch.equal(maps.get(), wanted)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
@pytest.mark.parametrize("install", [dcm.concept_attn_processors, lambda transformer: dcm.ConceptAttnProcessor()])
def test_a_model_with_our_processors_can_be_copied_and_pickled(install: Any, copied: Any) -> None:
    pipe = make_pipeline(refined=True)
    pipe.transformer.set_attn_processor(install(pipe.transformer))
    frames, maps = record(pipe)  # a router knows its modules by now
    other = copied(pipe.transformer)
    assert {type(p) for p in other.attn_processors.values()} == {
        type(p) for p in pipe.transformer.attn_processors.values()
    }
    assert not {id(p) for p in other.attn_processors.values()} & {
        id(p) for p in pipe.transformer.attn_processors.values()
    }
    pipe.transformer = other
    again, maps_again = record(pipe)
    assert torch.equal(again, frames)
    assert torch.equal(maps_again.get(), maps.get())


class OtherAttention(nn.Module):
    """An attention module that is none of diffusers' `Attention`."""


@pytest.mark.parametrize(
    ("attention", "text"),
    [
        (OtherAttention(), None),
        (OtherAttention(), torch.zeros(1, 4, 32)),
        (Attention(query_dim=32, cross_attention_dim=32), torch.zeros(1, 4, 32)),
        (Attention(query_dim=32, added_kv_proj_dim=32), torch.zeros(1, 4, 32)),
    ],
    ids=["other", "other with text", "cross", "own projections of text"],
)
def test_a_router_refuses_what_it_does_not_know(attention: nn.Module, text: torch.Tensor | None) -> None:
    router = dcm.ConceptAttnProcessor()
    with pytest.raises(dcm.ConceptMapsError, match=f"processor of this {type(attention).__name__} is not known"):
        router(attention, torch.zeros(1, 7, 32), encoder_hidden_states=text)


def test_a_router_refuses_positions_it_would_drop() -> None:
    """Self-attention with rotary positions has a processor of its own, which the router cannot stand in for."""
    attention = Attention(query_dim=32, heads=4, dim_head=8, processor=HunyuanAttnProcessor2_0())
    angles = torch.rand(7, 8)
    attention.set_processor(dcm.ConceptAttnProcessor())
    with pytest.raises(dcm.ConceptMapsError, match="not known"):
        attention(torch.zeros(1, 7, 32), image_rotary_emb=(angles.cos(), angles.sin()))


class TwoDenoisers(CogVideoXPipeline):  # type: ignore[misc]  # untyped host
    """As pipelines with an expert for high and one for low noise."""

    def __init__(self, transformer_2: CogVideoXTransformer3DModel, **components: Any) -> None:
        super().__init__(**components)
        self.register_modules(transformer_2=transformer_2)


def test_the_mixin_reaches_every_denoiser_and_leaves_the_dict() -> None:
    parts = tiny.make_pipeline().components
    pipe = dcm.with_concept_maps(TwoDenoisers(tiny.make_transformer(), **parts))
    router = dcm.ConceptAttnProcessor()
    pipe.set_attn_processor(router)
    for denoiser in (pipe.transformer, pipe.transformer_2):
        assert all(processor is router for processor in denoiser.attn_processors.values())
        denoiser.set_attn_processor(CogVideoXAttnProcessor2_0())
    processors = dcm.concept_attn_processors(pipe.transformer)
    given = dict(processors)
    pipe.set_attn_processor(processors)
    assert processors == given
    for denoiser in (pipe.transformer, pipe.transformer_2):
        assert all(denoiser.attn_processors[name] is processor for name, processor in given.items())
