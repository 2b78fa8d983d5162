"""`attention="one_pass"` where it cannot be or is interfered with: a clear word, unchanged frames, an exact undo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from diffusers import CogVideoXPipeline, ContextParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelOutput, ParallelConfig
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from markers import needs_xformers
from test_non_interference import CACHES, cache_config
from test_undo import assert_same, snapshot
from torch import nn

import diffusers_concept_maps as dcm
from diffusers_concept_maps import backbones, listener, one_directional, recorder
from diffusers_concept_maps.backbones import JointBackbone

CONCEPTS = ["dog", "running", "sky"]
METHODS = ("concept_attention", "imap")


def inputs() -> dict[str, torch.Tensor]:
    """Of a bare transformer."""
    return {
        "hidden_states": torch.randn(2, 3, 4, 6, 10),
        "encoder_hidden_states": torch.randn(2, 12, 32),
        "timestep": torch.tensor([900, 300]),
    }


@pytest.fixture
def pipe() -> CogVideoXPipeline:
    return tiny.make_pipeline()


def refuse(what: Any, message: str, *, value: bool = False, **options: Any) -> None:
    """Attaching raises, and has changed nothing."""
    root = getattr(what, "transformer", what)
    before = snapshot(root)
    settings = {"concepts": CONCEPTS, "attention": "one_pass"} | options
    with pytest.raises(dcm.ConceptMapsError, match=message) as caught, dcm.trace(what, **settings):
        raise AssertionError("attached")
    assert isinstance(caught.value, ValueError) == value
    assert_same(root, before)


@pytest.mark.parametrize("name", CACHES)
def test_caches_are_refused(pipe: CogVideoXPipeline, name: str) -> None:
    pipe.transformer.enable_cache(cache_config(name, pipe))
    refuse(pipe, r"does not work with a cache \(\w+Hook\), which would keep .* use attention='exact'")
    pipe.transformer.disable_cache()
    tiny.call(pipe)
    with dcm.trace(pipe, CONCEPTS, attention="one_pass"):
        tiny.call(pipe)
        pipe.transformer.enable_cache(cache_config(name, pipe))
        with pytest.raises(dcm.ConceptMapsError, match="does not work with a cache"):
            tiny.call(pipe)


def test_context_parallelism_is_refused(pipe: CogVideoXPipeline) -> None:
    config = ContextParallelConfig(ulysses_degree=2)
    pipe.transformer._parallel_config = ParallelConfig(context_parallel_config=config)
    refuse(pipe, "^this CogVideoXTransformer3DModel is context parallel, .* Trace it in one process$")
    del pipe.transformer._parallel_config
    apply_context_parallel(
        pipe.transformer, config, {"proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3)}
    )
    refuse(pipe, "does not work with context parallelism, which shards the sequence")


def test_training_is_refused(pipe: CogVideoXPipeline) -> None:
    pipe.transformer.train()
    refuse(pipe, "does not work with training mode, in which dropout would draw for them too")
    pipe.transformer.eval().enable_gradient_checkpointing()
    embeds = torch.randn(3, 32)
    with dcm.trace(pipe.transformer, concept_embeds=embeds, attention="one_pass") as maps:
        with pytest.raises(dcm.ConceptMapsError, match="which gradient checkpointing would have to see again"):
            pipe.transformer(**inputs())
        with torch.no_grad():
            pipe.transformer(**inputs())
    assert maps.get().isfinite().all()


class Unjoined(JointBackbone):
    """The backbone of CogVideoX, less what lets concepts join a block."""

    transformer_classes = ("UnjoinedTransformer",)

    def __getattribute__(self, name: str) -> Any:
        own = ("join", "part", "transformer_classes", "__class__")
        return object.__getattribute__(self if name in own else backbones.cogvideox.BACKBONE, name)


def test_a_backbone_without_a_text_stream_is_refused(pipe: CogVideoXPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    Unjoined.__abstractmethods__ = frozenset()
    monkeypatch.setitem(backbones._BACKBONES, "CogVideoXTransformer3DModel", Unjoined())
    refuse(pipe, "blocks of CogVideoXTransformer3DModel have no text stream that concepts could join", value=True)
    with dcm.trace(pipe, CONCEPTS) as maps:
        tiny.call(pipe)
    assert maps.get().shape == (1, 3, *tiny.GRID)


def test_arguments_are_checked(pipe: CogVideoXPipeline) -> None:
    refuse(pipe, "unknown attention 'two_pass'; expected one of exact, one_pass", value=True, attention="two_pass")
    refuse(pipe, "attention is 'one_pass', but words of the prompt are in the blocks", value=True, target="prompt")


class Boom(BaseException):
    pass


def boom(*args: Any, **kwargs: Any) -> Any:
    raise Boom


def fail_in_projection(pipe: CogVideoXPipeline, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(pipe.transformer.transformer_blocks[1].attn1.to_q.__dict__, "forward", boom)


def fail_in_attention(pipe: CogVideoXPipeline, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(one_directional.functional, "scaled_dot_product_attention", boom)


def fail_behind_attention(pipe: CogVideoXPipeline, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(pipe.transformer.transformer_blocks[1].ff.__dict__, "forward", boom)


def fail_in_scoring(pipe: CogVideoXPipeline, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recorder, "score_layer", boom)


def fail_in_scheduler(pipe: CogVideoXPipeline, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(pipe.scheduler.__dict__, "step", boom)


@pytest.mark.parametrize(
    "fail", [fail_in_projection, fail_in_attention, fail_behind_attention, fail_in_scoring, fail_in_scheduler]
)
def test_undo_after_an_exception(
    pipe: CogVideoXPipeline, fail: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    off = tiny.call(pipe)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS, attention="one_pass") as expected:
        tiny.call(pipe)
    before = snapshot(pipe.transformer)

    def fails() -> None:
        with monkeypatch.context() as patch:
            fail(pipe, patch)
            tiny.call(pipe)

    with pytest.raises(Boom), dcm.trace(pipe, CONCEPTS, methods=METHODS, attention="one_pass"):
        fails()
    assert_same(pipe.transformer, before)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS, attention="one_pass") as maps:
        with pytest.raises(Boom):
            fails()
        assert torch.equal(tiny.call(pipe), off)
    assert torch.equal(maps.get(), expected.get())
    assert_same(pipe.transformer, before)


def test_attention_that_is_skipped_is_noticed(pipe: CogVideoXPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def skip(hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return hidden_states, encoder_hidden_states

    monkeypatch.setitem(pipe.transformer.transformer_blocks[1].attn1.__dict__, "forward", skip)
    with (
        pytest.raises(dcm.ConceptMapsError, match="a block returned without calling its attention processor"),
        dcm.trace(pipe, CONCEPTS, attention="one_pass"),
    ):
        tiny.call(pipe)


def test_attention_outside_of_its_block_is_refused(pipe: CogVideoXPipeline) -> None:
    attention = pipe.transformer.transformer_blocks[1].attn1

    def call_early(block: nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        attention(output[0], encoder_hidden_states=output[1])

    pipe.transformer.transformer_blocks[0].register_forward_hook(call_early)
    with (
        pytest.raises(dcm.ConceptMapsError, match="an attention module ran outside of its block"),
        dcm.trace(pipe, CONCEPTS, attention="one_pass"),
    ):
        tiny.call(pipe)


class XFormersStandIn(CogVideoXAttnProcessor2_0):
    """What xformers' processor is to a capture, a stranger; but one that runs on the CPU."""


@pytest.fixture
def warnings_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(listener.logger, "warning", messages.append)
    return messages


@pytest.mark.parametrize("attention", ["exact", "one_pass"])
def test_enabling_xformers_inside_is_reported(
    pipe: CogVideoXPipeline, attention: str, monkeypatch: pytest.MonkeyPatch, warnings_of: list[str]
) -> None:
    def enable(module: Attention, valid: bool, attention_op: Any = None) -> None:
        module.set_processor(XFormersStandIn())

    monkeypatch.setattr(Attention, "set_use_memory_efficient_attention_xformers", enable)
    off = tiny.call(pipe)
    with dcm.trace(pipe, CONCEPTS, attention=attention) as maps:
        pipe.transformer.enable_xformers_memory_efficient_attention()
        assert warnings_of == []
        assert torch.equal(tiny.call(pipe), off)
        with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded"):
            maps.get()
    (message,) = warnings_of
    assert "layers [0, 1, 2] were replaced during the capture by XFormersStandIn" in message
    assert {type(p) for p in pipe.transformer.attn_processors.values()} == {XFormersStandIn}


def test_a_replaced_layer_is_passed_over_as_in_exact(pipe: CogVideoXPipeline, warnings_of: list[str]) -> None:
    off, block = tiny.call(pipe), pipe.transformer.transformer_blocks[1]
    stock, maps = block.attn1.processor, {}
    for attention in ("exact", "one_pass"):
        with dcm.trace(pipe, CONCEPTS, methods=METHODS, attention=attention) as maps[attention]:
            block.attn1.processor = XFormersStandIn()
            assert torch.equal(tiny.call(pipe), off)
        block.attn1.processor = stock
    coverage = {mode: traced.coverage["imap"] for mode, traced in maps.items()}
    assert coverage["one_pass"].tolist() == coverage["exact"].tolist() == [[True, False, True]] * 3
    torch.testing.assert_close(maps["one_pass"].get(), maps["exact"].get(), rtol=0, atol=1e-5)
    assert len(warnings_of) == 2


@pytest.mark.parametrize("backend", ["native", "_native_math", pytest.param("xformers", marks=needs_xformers)])
@pytest.mark.parametrize("attention", ["exact", "one_pass"])
def test_attention_backends_keep_working(pipe: CogVideoXPipeline, attention: str, backend: str) -> None:
    off = tiny.call(pipe)
    with attention_backend("native"):  # puts back what the model is about to set for the whole process
        with dcm.trace(pipe, CONCEPTS, attention=attention) as maps:
            pipe.transformer.set_attention_backend(backend)
            assert torch.equal(tiny.call(pipe), off)
        assert torch.equal(tiny.call(pipe), off)
    assert maps.get().isfinite().all()
