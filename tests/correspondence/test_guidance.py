"""Cross-attention guidance against the three-way formula; and everything else is as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from backbones._case import find_cases, seeded
from correspondence.three_way import STEPS, attention_cut, may_see, three_way
from diffusers import CogVideoXPipeline, PyramidAttentionBroadcastConfig
from test_undo import Boom, assert_same, boom, snapshot

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones import find_transformers
from diffusers_concept_maps.correspondence import guidance
from diffusers_concept_maps.correspondence.within_frames import MODES, within_frames

PROMPTS = ["a red dog", "the sky running"]
CONCEPTS = ["dog", "sky"]
CASES = {case.name: case for case in find_cases()}
FRAMES, SIZE = 3, 4


@pytest.fixture
def pipe() -> CogVideoXPipeline:
    return tiny.make_random_pipeline()


def call(pipe: CogVideoXPipeline, prompt: Any = "a red dog", **options: Any) -> torch.Tensor:
    return tiny.call(pipe, prompt, **options)


def guided(pipe: CogVideoXPipeline, scale: float = 1.0, **options: Any) -> torch.Tensor:
    with dcm.cross_attention_guidance(pipe, scale, **({"layers": [1]} | options)):
        return call(pipe)


@pytest.mark.parametrize(("before", "behind"), [(0, 0), (3, 0), (0, 5), (2, 4)])
@pytest.mark.parametrize("mode", MODES)
def test_attention_within_frames(mode: str, before: int, behind: int) -> None:
    """Other tokens, of text or of reference images, in front, behind, or nowhere."""
    tokens = before + FRAMES * SIZE + behind
    heads = [seeded(2, 3, tokens, 8, seed=seed) for seed in (1, 2, 3)]
    actual = within_frames(*heads, start=before, frames=FRAMES, size=SIZE, mode=mode)
    query, key, value = (tensor.double() for tensor in heads)
    logits, allowed = query @ key.mT / 8**0.5, may_see(tokens, before, FRAMES, SIZE)
    of_allowed = logits.masked_fill(~allowed, -torch.inf)
    attended = of_allowed.softmax(-1) @ value
    if mode == "zero":
        attended = (of_allowed.logsumexp(-1) - logits.logsumexp(-1)).exp()[..., None] * attended
    torch.testing.assert_close(actual.double(), attended, rtol=0, atol=1e-6)


FORMULA: dict[str, dict[str, Any]] = {
    "guided": {"layers": (1,)},
    "several layers": {"layers": (0, 2)},
    "last layer": {"layers": (2,), "scale": -0.7},
    "dynamic": {"layers": (1, 2), "use_dynamic_cfg": True, "scale": 2.0},
    "no classifier-free guidance": {"layers": (1,), "guidance_scale": 1.0},
    "scaled to 1": {"layers": (1,), "mode": "renorm"},
}


def check_formula(frames: int, height: int, width: int, *, layers: tuple[int, ...], **options: Any) -> None:
    pipe = tiny.make_pipeline(dtype=torch.float64)
    latents = seeded(2, frames, 4, height, width, seed=5).double()
    own = {name: options[name] for name in ("guidance_scale", "use_dynamic_cfg") if name in options}
    guidance_options = {name: value for name, value in options.items() if name not in own and name != "steps"}
    shape = {"num_frames": 4 * frames - 3, "height": 8 * height, "width": 8 * width}
    stock = call(pipe, PROMPTS, latents=latents, num_inference_steps=STEPS, **own, **shape)
    with dcm.cross_attention_guidance(pipe, layers=layers, **guidance_options):
        actual = call(pipe, PROMPTS, latents=latents, num_inference_steps=STEPS, **own, **shape)
    for name in ("start", "stop"):
        options.pop(name, None)
    expected = three_way(pipe, PROMPTS, latents, layers=layers, **options)
    largest = expected.abs().max().item()
    assert (actual - stock).abs().max() > 1e-4 * largest
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("options", FORMULA.values(), ids=FORMULA)
def test_three_way_formula(options: dict[str, Any]) -> None:
    check_formula(3, 6, 10, **options)


def test_positions_are_of_no_batch() -> None:
    """As many tokens as rows: positions have the length that the batch has."""
    check_formula(4, 2, 2, layers=(1,))


@pytest.mark.parametrize(("start", "stop", "steps"), [(0.0, 0.5, (0, 1)), (0.4, 1.0, (2,)), (0.3, 0.6, (1,))])
def test_some_steps(start: float, stop: float, steps: tuple[int, ...]) -> None:
    check_formula(3, 6, 10, layers=(1,), start=start, stop=stop, steps=steps)


def guide_no_further(pipe: Any, *_: Any) -> dict[str, Any]:
    """Classifier-free guidance ends with the first step."""
    pipe._guidance_scale = 1.0
    return {}


OTHERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "Wan": ("Wan 2.1", 0, {}),
    "Wan, guided in the first step": ("Wan 2.1", 0, {"callback_on_step_end": guide_no_further}),
    "Wan 2.2": ("Wan 2.2", 0, {"guidance_scale_2": 2.0}),
    "HunyuanVideo": ("HunyuanVideo", 8, {}),
    "LTX-Video": ("LTX-Video", 0, {}),
    "LTX-2": ("LTX-2", 0, {"guidance_rescale": 0.0}),
    "LTX-2, further guidance": ("LTX-2", 0, {"guidance_rescale": 0.0, "stg_scale": 1.0, "modality_scale": 3.0}),
    "LTX-2, further guidance alone": ("LTX-2", 0, {"guidance_rescale": 0.0, "guidance_scale": 1.0, "stg_scale": 1.0}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(("name", "text", "options"), OTHERS.values(), ids=OTHERS)
def test_formula_of_other_families(
    name: str, text: int, options: dict[str, Any], layer: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind whatever guidance the pipeline has, the third term is added to what its scheduler is given."""
    case = CASES[name]
    pipe = case.pipeline()
    options = options | {case.frames_per_prompt: 2}
    frames, height, width = case.grid
    terms: list[torch.Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """The first pass of every step has the conditional rows, the last four."""
        if len(terms) > len(stepped):
            return
        place = (case.tokens + text, 0, frames, height * width)
        with attention_cut(*place, layer=layer, mode=mode):
            perturbed = module.forward(*args, **kwargs)[0]
        terms.append((output[0] - perturbed)[-4:])

    def step(scheduler: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(stepped) < len(terms):  # otherwise it is the step of the sound that belongs to the video
            stepped.append(len(terms))
            noise = noise + 0.8 * terms[-1]
        return stock(scheduler, noise, *args, **kwargs)

    stepped: list[int] = []
    stock = type(pipe.scheduler).step
    hooks = [model.register_forward_hook(note, with_kwargs=True) for model in find_transformers(pipe)]
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.scheduler), "step", step)
        expected = case.call(pipe, PROMPTS, **options)
    for hook in hooks:
        hook.remove()
    with dcm.cross_attention_guidance(pipe, 0.8, layers=[layer], mode=mode):
        actual = case.call(pipe, PROMPTS, **options)
    assert (stepped, actual.shape[0]) == ([1, 2, 3], 4)
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-5 * expected.abs().max().item())


@pytest.mark.parametrize("scale", [0, 0.0])
def test_scale_zero_is_stock(pipe: CogVideoXPipeline, scale: float) -> None:
    before = snapshot(pipe.transformer)
    with dcm.cross_attention_guidance(pipe, scale, layers=[1]):
        assert_same(pipe.transformer, before)
        actual = call(pipe)
    assert torch.equal(actual, call(pipe))


def test_random_numbers_are_those_of_stock(pipe: CogVideoXPipeline) -> None:
    torch.manual_seed(3)
    call(pipe, generator=None)
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    with dcm.cross_attention_guidance(pipe, layers=[1]):
        call(pipe, generator=None)
    assert torch.equal(torch.get_rng_state(), expected)


def test_what_others_keep_of_the_prediction_is_not_written_to(pipe: CogVideoXPipeline) -> None:
    kept: list[torch.Tensor] = []
    pipe.transformer.register_forward_hook(lambda module, args, output: kept.append(output[0]))
    call(pipe)
    guided(pipe)
    assert torch.equal(kept[0], kept[STEPS])
    assert not torch.equal(kept[1], kept[STEPS + 1])


def test_low_precision() -> None:
    pipe = tiny.make_pipeline(dtype=torch.bfloat16)
    actual, stock = guided(pipe), call(pipe)
    assert actual.dtype == stock.dtype
    assert actual.isfinite().all()
    assert not torch.equal(actual, stock)


def hook(pipe: CogVideoXPipeline) -> None:
    for module in pipe.transformer.modules():
        module.register_forward_hook(lambda *args: None, with_kwargs=True, always_call=True)


PREPARE: dict[str, Callable[[CogVideoXPipeline], Any]] = {
    "plain": lambda pipe: None,
    "fused": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "processors": lambda pipe: pipe.transformer.set_attn_processor(dcm.concept_attn_processors(pipe.transformer)),
    "hooks": hook,
}


@pytest.mark.parametrize("prepare", PREPARE.values(), ids=PREPARE)
def test_undo(pipe: CogVideoXPipeline, prepare: Callable[[CogVideoXPipeline], Any]) -> None:
    expected = guided(pipe)
    prepare(pipe)
    stock = call(pipe)
    before, attributes = snapshot(pipe.transformer), dict(vars(pipe))
    with dcm.cross_attention_guidance(pipe, layers=[1]):
        assert snapshot(pipe.transformer) != before
        actual = call(pipe)
    assert_same(pipe.transformer, before)
    assert vars(pipe).keys() == attributes.keys()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert torch.equal(call(pipe), stock)


def fail_in_block(pipe: CogVideoXPipeline, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pipe.transformer.transformer_blocks[2].ff, "forward", boom)


def fail_in_second_prediction(pipe: CogVideoXPipeline, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(guidance, "within_frames", boom)


def fail_in_scheduler(pipe: CogVideoXPipeline, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pipe.scheduler, "step", boom)


@pytest.mark.parametrize("fail", [fail_in_block, fail_in_second_prediction, fail_in_scheduler])
def test_undo_after_a_failure(
    pipe: CogVideoXPipeline, fail: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run of the same guidance is as if nothing had been, and so is the model behind it."""
    stock, expected = call(pipe), guided(pipe)
    before = snapshot(pipe.transformer)
    with dcm.cross_attention_guidance(pipe, layers=[1]):
        inside = snapshot(pipe.transformer)
        with monkeypatch.context() as patch:
            fail(pipe, patch)
            with pytest.raises(Boom):
                call(pipe)
        assert_same(pipe.transformer, inside)
        assert torch.equal(call(pipe), expected)
    assert_same(pipe.transformer, before)
    with monkeypatch.context() as patch:
        fail(pipe, patch)
        with pytest.raises(Boom):
            guided(pipe)
    assert_same(pipe.transformer, before)
    assert torch.equal(call(pipe), stock)


@pytest.mark.parametrize("attention", ["exact", "one_pass"])
@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_trace_and_guidance(pipe: CogVideoXPipeline, branch: str, attention: str) -> None:
    """In either order frames are those of guidance, and maps those of the model's own passes on the way."""
    options: dict[str, Any] = {"branch": branch, "attention": attention, "methods": ("concept_attention", "imap")}
    expected, before = guided(pipe), snapshot(pipe.transformer)
    with dcm.cross_attention_guidance(pipe, layers=[1]), dcm.trace(pipe, CONCEPTS, **options) as inner:
        assert torch.equal(call(pipe), expected)
    assert_same(pipe.transformer, before)
    with dcm.trace(pipe, CONCEPTS, **options) as outer, dcm.cross_attention_guidance(pipe, layers=[1]):
        assert torch.equal(call(pipe), expected)
    assert_same(pipe.transformer, before)
    with dcm.trace(pipe, CONCEPTS, steps=[0], **options) as unguided:
        call(pipe)
    with dcm.cross_attention_guidance(pipe, layers=[1]), dcm.trace(pipe, CONCEPTS, steps=[0], **options) as first:
        call(pipe)
    for method in options["methods"]:
        assert torch.equal(inner.get(method), outer.get(method))
        assert torch.equal(first.get(method), unguided.get(method))
        assert not torch.equal(inner.get(method), first.get(method))


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_weights_that_are_elsewhere(level: str) -> None:
    """Blocks that load weights, or whose parts do, run once more, in their order: each loads what comes next."""
    stays, moves = tiny.make_random_pipeline(), tiny.make_random_pipeline()
    cpu, runs = torch.device("cpu"), []
    moves.transformer.enable_group_offload(cpu, cpu, offload_type=level, num_blocks_per_group=1)
    call(moves)  # diffusers prepares the model in its first run
    before, expected = snapshot(moves.transformer), guided(stays, layers=[2])
    hooks = [
        block.norm1.register_forward_hook(lambda *args, layer=layer: runs.append(layer))
        for layer, block in enumerate(moves.transformer.transformer_blocks)
    ]
    actual = guided(moves, layers=[2])
    for taken in hooks:
        taken.remove()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert runs == 2 * STEPS * [0, 1, 2]
    assert_same(moves.transformer, before)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "scale": ({"scale": "1"}, r"^scale is '1'; expected a number, such as 1.0$"),
    "bool scale": ({"scale": True}, r"^scale is True; expected a number"),
    "infinite scale": ({"scale": math.inf}, r"^scale is inf; expected a number"),
    "mode": ({"mode": "mask"}, r"^unknown mode 'mask'; expected one of zero, renorm$"),
    "start": ({"start": -0.1}, r"^guidance from -0.1 to 1.0; expected fractions 0 <= start < stop <= 1$"),
    "no start": ({"start": "0.5"}, r"^guidance from '0.5' to 1.0; expected fractions"),
    "no stop": ({"stop": None}, r"^guidance from 0.0 to None; expected fractions"),
    "stop": ({"start": 0.5, "stop": 0.5}, r"^guidance from 0.5 to 0.5; expected fractions"),
    "stop above 1": ({"stop": 2}, r"^guidance from 0.0 to 2; expected fractions"),
    "layer": ({"layers": [3]}, r"^layer 3 is out of range; expected an integer of 0 to 2$"),
    "no layer": ({"layers": []}, r"^no layers; pass at least one layer index"),
    "one layer": ({"layers": 1}, r"^layers is 1; expected a list such as \[1\]$"),
    "unknown checkpoint": (
        {"layers": None},
        r"^no layers are known to be good for guiding this checkpoint; name some",
    ),
}


@pytest.mark.parametrize("scale", [{}, {"scale": 0.0}], ids=["on", "off"])
@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(
    pipe: CogVideoXPipeline, options: dict[str, Any], message: str, scale: dict[str, float]
) -> None:
    before = snapshot(pipe.transformer)
    with pytest.raises(dcm.ConceptMapsValueError, match=message):
        dcm.cross_attention_guidance(pipe, **({"layers": [1]} | scale | options)).__enter__()
    assert_same(pipe.transformer, before)


def test_a_bare_transformer(pipe: CogVideoXPipeline) -> None:
    message = "^guidance follows a pipeline, not a bare CogVideoXTransformer3DModel; pass the pipeline$"
    with pytest.raises(dcm.ConceptMapsError, match=message):
        dcm.cross_attention_guidance(pipe.transformer, layers=[1]).__enter__()


def test_guided_twice(pipe: CogVideoXPipeline) -> None:
    with (
        dcm.cross_attention_guidance(pipe, layers=[1]),
        pytest.raises(dcm.ConceptMapsError, match="^this CogVideoXTransformer3DModel is being guided already; leave"),
    ):
        dcm.cross_attention_guidance(pipe, layers=[1]).__enter__()


def test_cache(pipe: CogVideoXPipeline) -> None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
    )
    pipe.transformer.enable_cache(config)
    with (
        dcm.cross_attention_guidance(pipe, layers=[1]),
        pytest.raises(dcm.ConceptMapsError, match=r"^a cache would keep states .* call disable_cache\(\)"),
    ):
        call(pipe)


def test_context_parallelism(pipe: CogVideoXPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe.transformer, "_parallel_config", object(), raising=False)
    with (
        dcm.cross_attention_guidance(pipe, layers=[1]),
        pytest.raises(dcm.ConceptMapsError, match="^guidance does not work with context parallelism; disable it"),
    ):
        call(pipe)


@pytest.mark.parametrize("compile_it", ["whole", "in place", "blocks"])
def test_compiled(pipe: CogVideoXPipeline, compile_it: str) -> None:
    """Nothing is compiled before the first call, so that this is no matter of seconds."""
    if compile_it == "whole":
        pipe.transformer = torch.compile(pipe.transformer)
    elif compile_it == "in place":
        pipe.transformer.compile()
    else:
        for block in pipe.transformer.transformer_blocks:
            block.compile()
    message = "^guidance cannot change what torch.compile has compiled; guide it uncompiled$"
    with pytest.raises(dcm.ConceptMapsError, match=message):
        dcm.cross_attention_guidance(pipe, layers=[1]).__enter__()


def test_an_unconditional_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline of another host version might have its passes in another order."""
    case = CASES["Wan 2.1"]
    pipe = case.pipeline()
    monkeypatch.setattr(guidance._Guidance, "_difference", lambda *args: torch.zeros(()))
    with dcm.cross_attention_guidance(pipe, layers=[1]):
        attached = next(
            hook.__self__ for hook in pipe.transformer._forward_hooks.values() if hasattr(hook, "__self__")
        )
        drop = pipe.transformer.register_forward_hook(lambda *args: setattr(attached, "_delta", None))
        with pytest.raises(dcm.ConceptMapsError, match="^step 0 has an unconditional pass without a conditional one"):
            case.call(pipe, PROMPTS)
        drop.remove()
