"""Encoding does no work twice, and leaves the pipeline as it is, whatever fails and whatever has been done to it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from backbones._oracle import kept_state
from diffusers import CogVideoXPipeline
from encoded import CONCEPTS, PROMPT, clip_of, shared

import diffusers_concept_maps as dcm
from diffusers_concept_maps.encoding import encode


@pytest.fixture
def pipe() -> CogVideoXPipeline:
    return tiny.make_pipeline()


def test_work_is_done_once_and_nothing_is_decoded(pipe: CogVideoXPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    parts = {"transformer": pipe.transformer, "text": pipe.text_encoder, "vae": pipe.vae.encoder}
    parts |= {f"block {i}": block for i, block in enumerate(pipe.transformer.transformer_blocks)}
    for name, module in parts.items():
        module.register_forward_pre_hook(lambda *args, name=name: calls.update([name]))

    def decode(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(pipe.vae, "decode", decode)
    once = {"text": 2, "transformer": 1, "block 0": 1, "block 1": 1}  # the concepts, and the caption
    clip = clip_of()
    encode(pipe, clip, CONCEPTS, prompt=PROMPT, layers=[1])
    vae = calls.pop("vae")
    assert calls == once
    calls.clear()
    encode(pipe, clip, CONCEPTS, prompt=PROMPT, layers=[0, 1], noise_level=(0.2, 0.4, 0.6), num_samples=2)
    assert calls.pop("vae") == vae
    assert calls == {name: number if name == "text" else 6 * number for name, number in once.items()}


class Untouched:
    """What a pipeline holds and makes, to compare with what it was."""

    def __init__(self, pipe: CogVideoXPipeline) -> None:
        self.pipe = pipe
        self.generated = tiny.call(pipe)
        self.before = self.state()

    def state(self) -> list[Any]:
        pipe = self.pipe
        models = [kept_state(module) for module in (pipe.transformer, pipe.vae, pipe.text_encoder)]
        return [*models, dict(pipe.__dict__), dict(pipe.scheduler.__dict__), torch.get_rng_state().tolist()]

    def check(self) -> None:
        after = self.state()
        assert after[:3] == self.before[:3]
        for now, then in zip(after[3:5], self.before[3:5], strict=True):
            assert now.keys() == then.keys()
            assert [name for name in then if now[name] is not then[name]] == []
        assert after[5] == self.before[5]
        assert torch.equal(tiny.call(self.pipe), self.generated)


@pytest.mark.parametrize("target", ["concepts", "prompt"])
def test_the_pipeline_stays_as_it_is(pipe: CogVideoXPipeline, target: str) -> None:
    untouched = Untouched(pipe)
    methods = ("cross_attention", "gramcol")
    encode(pipe, clip_of(), ["dog"], prompt=PROMPT, noise_level=(0.2, 0.9), target=target, methods=methods)
    untouched.check()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["vae.encoder", "transformer", "transformer.transformer_blocks.1", "text_encoder"])
def test_the_pipeline_stays_as_it_is_whatever_fails(
    pipe: CogVideoXPipeline, where: str, error: type[BaseException]
) -> None:
    untouched = Untouched(pipe)
    name, _, path = where.partition(".")
    module, calls = getattr(pipe, name).get_submodule(path), Counter[str]()

    def fail(*args: Any) -> None:
        calls.update(["call"])
        if calls["call"] == (1 if name == "vae" else 2):  # of the text encoder, the one that encodes the caption
            raise error("stop")

    hook = module.register_forward_pre_hook(fail)
    with pytest.raises(error, match="stop"):
        encode(pipe, clip_of(), CONCEPTS, prompt=PROMPT, noise_level=(0.2, 0.4))
    hook.remove()
    untouched.check()
    assert torch.equal(
        encode(pipe, clip_of(), CONCEPTS, prompt=PROMPT).get(),
        encode(shared(), clip_of(), CONCEPTS, prompt=PROMPT).get(),
    )


def test_a_capture_that_is_open_is_not_disturbed(pipe: CogVideoXPipeline) -> None:
    with dcm.trace(pipe, CONCEPTS) as maps:
        with pytest.raises(dcm.ConceptMapsError, match="is being traced already"):
            encode(pipe, clip_of(), CONCEPTS)
        tiny.call(pipe)
    with dcm.trace(pipe, CONCEPTS) as expected:
        tiny.call(pipe)
    assert torch.equal(maps.get(), expected.get())


def test_a_pipeline_that_returns_maps(pipe: CogVideoXPipeline) -> None:
    maps = encode(dcm.with_concept_maps(pipe), clip_of(), CONCEPTS, prompt=PROMPT)
    assert torch.equal(maps.get(), encode(shared(), clip_of(), CONCEPTS, prompt=PROMPT).get())


@pytest.mark.parametrize("where", ["transformer", "blocks"])
def test_compiled(pipe: CogVideoXPipeline, where: str) -> None:
    """Graphs go on behind the deepest layer, and those that were compiled for generation do not hide the clip."""
    torch._dynamo.reset()
    for module in [pipe.transformer] if where == "transformer" else pipe.transformer.transformer_blocks:
        module.compile(fullgraph=True, backend="eager")
    untouched = Untouched(pipe)
    levels = tuple(number / 10 for number in range(1, 11))  # more than graphs of one function may be
    for options in ({"seed": 0}, {"seed": 1, "layers": [1]}, {"noise_level": levels}):
        maps, expected = (encode(p, clip_of(), CONCEPTS, prompt=PROMPT, **options) for p in (pipe, shared()))
        torch.testing.assert_close(maps.get(), expected.get(), atol=1e-6, rtol=1e-5)
    untouched.check()


@pytest.mark.parametrize("how", ["models", "groups"])
def test_offload(pipe: CogVideoXPipeline, how: str) -> None:
    if how == "models":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        for module in (pipe.transformer, pipe.vae):
            module.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    for layers in ([1], None):
        maps, expected = (encode(p, clip_of(), CONCEPTS, prompt=PROMPT, layers=layers) for p in (pipe, shared()))
        assert torch.equal(maps.get(), expected.get())
        assert torch.equal(tiny.call(pipe), tiny.call(shared()))
