"""After a capture the model is what it was, whatever went wrong; and only what is traced is recorded."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from itertools import count
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from diffusers import CogVideoXPipeline, PyramidAttentionBroadcastConfig
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from torch import nn

import diffusers_concept_maps as dcm
from diffusers_concept_maps import attachment, capture
from diffusers_concept_maps.methods.gramcol import GramCol

CONCEPTS = ["dog", "running", "sky"]
METHODS = ("concept_attention", "imap")


def contents(value: Any) -> Any:
    """Dicts, hook dicts among them, one level deep; anything else as it is."""
    return dict(value) if isinstance(value, dict) else value


def snapshot(root: nn.Module) -> dict[tuple[str, str], Any]:
    """Every attribute of every module, with what its dicts hold, and every attribute of every attention processor."""
    taken: dict[tuple[str, str], Any] = {}
    for name, module in root.named_modules():
        taken.update({(name, key): contents(value) for key, value in vars(module).items()})
        processor = getattr(module, "processor", None)
        if processor is not None:
            taken.update({(f"{name}.processor", key): contents(value) for key, value in vars(processor).items()})
    return taken


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    return a is b


def assert_same(root: nn.Module, before: dict[tuple[str, str], Any]) -> None:
    after = snapshot(root)
    assert after.keys() == before.keys()
    assert [key for key in before if not same(before[key], after[key])] == []


class Boom(BaseException):
    """Not even an `Exception`."""


def boom(*args: Any, **kwargs: Any) -> Any:
    raise Boom


@pytest.fixture
def pipe() -> CogVideoXPipeline:
    return tiny.make_pipeline()


@cache
def expected_maps(prompt: str = "a red dog running on the beach", **options: Any) -> torch.Tensor:
    """What a capture of an untouched pipeline gives."""
    fresh = tiny.make_pipeline()
    with dcm.trace(fresh, CONCEPTS, methods=METHODS) as maps:
        tiny.call(fresh, prompt, **options)
    return maps.get()


def assert_traceable(pipe: CogVideoXPipeline) -> None:
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        tiny.call(pipe)
    assert torch.equal(maps.get(), expected_maps())


def leave_as_is(pipe: CogVideoXPipeline) -> None:
    pass


def fuse(pipe: CogVideoXPipeline) -> None:
    pipe.transformer.fuse_qkv_projections()


def install_dict(pipe: CogVideoXPipeline) -> None:
    pipe.transformer.set_attn_processor(dcm.concept_attn_processors(pipe.transformer))


def install_router(pipe: CogVideoXPipeline) -> None:
    pipe.transformer.set_attn_processor(dcm.ConceptAttnProcessor())


def share_one_processor(pipe: CogVideoXPipeline) -> None:
    pipe.transformer.set_attn_processor(CogVideoXAttnProcessor2_0())


def enable_cache(pipe: CogVideoXPipeline) -> None:
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
        )
    )


def hook(pipe: CogVideoXPipeline) -> None:
    for module in pipe.transformer.modules():
        module.register_forward_hook(lambda *args: None, with_kwargs=True, always_call=True)
        module.register_forward_pre_hook(lambda *args: None, with_kwargs=True)


STATES = [leave_as_is, fuse, install_dict, install_router, share_one_processor, enable_cache, hook]
Prepare = Callable[[CogVideoXPipeline], None]


@pytest.mark.parametrize("prepare", STATES)
def test_undo_after_a_run(pipe: CogVideoXPipeline, prepare: Prepare) -> None:
    prepare(pipe)
    tiny.call(pipe)  # so that lazily made attributes are there
    before, attributes = snapshot(pipe.transformer), dict(vars(pipe))
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        assert snapshot(pipe.transformer) != before
        tiny.call(pipe)
    assert_same(pipe.transformer, before)
    assert vars(pipe).keys() == attributes.keys()
    assert maps.get().shape == (1, 3, *tiny.GRID)


@pytest.mark.parametrize("prepare", STATES)
def test_undo_without_a_run(pipe: CogVideoXPipeline, prepare: Prepare) -> None:
    prepare(pipe)
    before, attributes = snapshot(pipe.transformer), dict(vars(pipe))
    with dcm.trace(pipe, CONCEPTS) as maps:
        pass
    assert_same(pipe.transformer, before)
    assert vars(pipe) == attributes
    with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded"):
        maps.get()


def fail_in_callback(pipe: CogVideoXPipeline, patch: pytest.MonkeyPatch) -> None:
    tiny.call(pipe, callback_on_step_end=boom)


def fail_in_scheduler(pipe: CogVideoXPipeline, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pipe.scheduler, "step", boom)
    tiny.call(pipe)


def fail_in_block(pipe: CogVideoXPipeline, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pipe.transformer.transformer_blocks[1].ff, "forward", boom)
    tiny.call(pipe)


def fail_in_reentry(pipe: CogVideoXPipeline, patch: pytest.MonkeyPatch) -> None:
    """In the nested call of a block, which has fewer tokens than any main call."""
    block = pipe.transformer.transformer_blocks[1]
    stock = block.ff.forward
    patch.setattr(block.ff, "forward", lambda x: boom() if x.shape[1] == len(CONCEPTS) else stock(x))
    tiny.call(pipe)


def fail_in_method(pipe: CogVideoXPipeline, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GramCol, "score", boom)
    tiny.call(pipe)


def fail_in_decoder(pipe: CogVideoXPipeline, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pipe, "decode_latents", boom)
    tiny.call(pipe, output_type="pt")


def fail_in_body(pipe: CogVideoXPipeline, patch: pytest.MonkeyPatch) -> None:
    tiny.call(pipe)
    raise Boom


FAILURES = [
    fail_in_callback, fail_in_scheduler, fail_in_block, fail_in_reentry, fail_in_method, fail_in_decoder, fail_in_body,
]  # fmt: skip


@pytest.mark.parametrize(
    ("fail", "prepare"), [(f, leave_as_is) for f in FAILURES] + [(fail_in_reentry, state) for state in STATES[1:]]
)
def test_undo_after_a_failure(
    pipe: CogVideoXPipeline, fail: Callable[..., None], prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(pipe)

    def fails() -> None:
        with monkeypatch.context() as patch:
            fail(pipe, patch)

    with suppress(Boom):  # undoing a patch leaves a bound method in the instance
        fails()
    before = snapshot(pipe.transformer)
    with pytest.raises(Boom), dcm.trace(pipe, CONCEPTS, methods=METHODS):
        fails()
    assert_same(pipe.transformer, before)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        with suppress(Boom):
            fails()
        tiny.call(pipe)
    assert_same(pipe.transformer, before)
    if prepare not in (fuse, enable_cache):  # which change the maps themselves
        assert torch.equal(maps.get(), expected_maps())


def failing_at(function: Callable[..., Any], turn: int) -> Callable[..., Any]:
    """The function, but for its `turn`-th call, which raises."""
    turns: Iterator[int] = count()

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return boom() if next(turns) == turn else function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("prepare", STATES)
@pytest.mark.parametrize(
    ("owner", "name", "least"),
    [
        (nn.Module, "register_forward_pre_hook", 4),  # the transformer and its three blocks
        (nn.Module, "register_forward_hook", 1),
        (attachment, "concept_processor", 6),
        (capture, "_metadata", 1),
        (capture, "make_plan", 1),
    ],
)
def test_undo_of_an_attach_that_fails(
    pipe: CogVideoXPipeline,
    prepare: Prepare,
    owner: Any,
    name: str,
    least: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare(pipe)
    before = snapshot(pipe.transformer)
    for turn in count():
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing_at(getattr(owner, name), turn))
            try:
                with dcm.trace(pipe, CONCEPTS, methods=METHODS):
                    break
            except Boom:
                assert_same(pipe.transformer, before)
    assert turn >= (0 if prepare in (install_dict, install_router) and name == "concept_processor" else least)
    assert_same(pipe.transformer, before)


@pytest.mark.parametrize("prepare", STATES)
def test_nothing_is_touched_by_a_wrong_argument(pipe: CogVideoXPipeline, prepare: Prepare) -> None:
    prepare(pipe)
    before, attributes = snapshot(pipe.transformer), dict(vars(pipe))
    for wrong in ({"layers": [3]}, {"methods": ["x"]}, {"concept_embeds": torch.zeros(3, 5)}, {"heads": [9]}):
        with pytest.raises(dcm.ConceptMapsError), dcm.trace(pipe, CONCEPTS, **wrong):
            pass
    assert_same(pipe.transformer, before)
    assert vars(pipe) == attributes


@pytest.mark.parametrize("install", [install_dict, install_router])
def test_adopted_processors_are_left_idle(pipe: CogVideoXPipeline, install: Prepare) -> None:
    install(pipe)
    mine = dict(pipe.transformer.attn_processors)
    with dcm.trace(pipe, CONCEPTS):
        tiny.call(pipe)
        assert all(pipe.transformer.attn_processors[name] is processor for name, processor in mine.items())
    assert all(pipe.transformer.attn_processors[name] is processor for name, processor in mine.items())
    assert all(processor.recorder is None for processor in mine.values())
    assert all(set(vars(processor)) <= {"_delegates"} for processor in mine.values())


def test_a_router_lets_go_of_the_capture(pipe: CogVideoXPipeline) -> None:
    router = dcm.ConceptAttnProcessor()
    pipe.transformer.set_attn_processor(router)
    with dcm.trace(pipe, CONCEPTS):
        tiny.call(pipe)
    delegates = [router.delegate(block.attn1, True) for block in pipe.transformer.transformer_blocks]
    assert all(delegate.recorder is None for delegate in delegates)


@pytest.mark.parametrize("replacement", [CogVideoXAttnProcessor2_0, dcm.ConceptAttnProcessor])
def test_processors_the_user_sets_inside_stay(pipe: CogVideoXPipeline, replacement: Callable[[], Any]) -> None:
    hooks = {key: value for key, value in snapshot(pipe.transformer).items() if "hooks" in key[1]}
    theirs = replacement()
    with dcm.trace(pipe, CONCEPTS):
        tiny.call(pipe)
        pipe.transformer.set_attn_processor(theirs)
    assert all(processor is theirs for processor in pipe.transformer.attn_processors.values())
    assert {key: value for key, value in snapshot(pipe.transformer).items() if "hooks" in key[1]} == hooks
    assert_traceable(pipe)


def test_fusing_inside_stays_and_can_be_taken_back(pipe: CogVideoXPipeline) -> None:
    stock = tiny.call(pipe)
    with dcm.trace(pipe, CONCEPTS):
        pipe.transformer.fuse_qkv_projections()
    assert {type(p) for p in pipe.transformer.attn_processors.values()} == {FusedCogVideoXAttnProcessor2_0}
    with dcm.trace(pipe, CONCEPTS) as maps:
        tiny.call(pipe)
    torch.testing.assert_close(maps.get(), expected_maps(), rtol=1e-4, atol=1e-5)
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(tiny.call(pipe), stock)
    assert_traceable(pipe)


def test_processors_read_inside_can_be_set_afterwards(pipe: CogVideoXPipeline) -> None:
    stock = tiny.call(pipe)
    with dcm.trace(pipe, CONCEPTS):
        seen = dict(pipe.transformer.attn_processors)
    pipe.transformer.set_attn_processor(seen)
    assert torch.equal(tiny.call(pipe), stock)
    assert_traceable(pipe)


@pytest.mark.parametrize("prepare", STATES)
def test_a_second_attach_is_refused_and_the_first_goes_on(pipe: CogVideoXPipeline, prepare: Prepare) -> None:
    prepare(pipe)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as alone:
        tiny.call(pipe)
    before = snapshot(pipe.transformer)
    other = CogVideoXPipeline(**pipe.components)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        inside = snapshot(pipe.transformer)
        for second in (pipe, pipe.transformer, other):
            with pytest.raises(dcm.ConceptMapsError, match="traced already"):
                dcm.attach(second, ["cat"], concept_embeds=torch.zeros(1, 32))
        assert_same(pipe.transformer, inside)
        tiny.call(pipe)
    assert torch.equal(maps.get(), alone.get())
    assert_same(pipe.transformer, before)


def test_a_handle_is_removed_once(pipe: CogVideoXPipeline) -> None:
    tiny.call(pipe)
    before = snapshot(pipe.transformer)
    first = dcm.attach(pipe, CONCEPTS, methods=METHODS)
    first.remove()
    second = dcm.attach(pipe, CONCEPTS, methods=METHODS)
    first.remove()  # does not reach into the second
    tiny.call(pipe)
    second.remove()
    second.remove()
    assert_same(pipe.transformer, before)
    assert torch.equal(second.maps["cond"].get(), expected_maps())
    with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded"):
        first.maps["cond"].get()


def test_maps_do_not_hold_the_model() -> None:
    local = tiny.make_pipeline()
    with dcm.trace(local, CONCEPTS) as maps:
        tiny.call(local)
    transformer = weakref.ref(local.transformer)
    del local
    gc.collect()
    assert transformer() is None
    assert maps.get().shape == (1, 3, *tiny.GRID)
