"""Edits in whole runs: where and when they are asked for and nowhere else, beside captures, and undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from backbones._case import find_cases, seeded
from diffusers import CogVideoXPipeline
from edited import scaled
from test_undo import Boom, assert_same, boom, snapshot
from torch.utils._python_dispatch import TorchDispatchMode

import diffusers_concept_maps as dcm
from diffusers_concept_maps import AttentionEdit, edit_attention
from diffusers_concept_maps.editing.amending import AmendedAttention
from diffusers_concept_maps.upsample import gather_frames, spread_frames

CASES = {case.name: case for case in find_cases()}
PROMPTS = ["a red dog", "the sky on a dog running"]
FRAMES, HEIGHT, WIDTH = tiny.GRID
DOG = AttentionEdit("dog", scale=6.0)


@pytest.fixture
def pipe() -> CogVideoXPipeline:
    return tiny.make_random_pipeline()


def call(pipe: CogVideoXPipeline, prompt: Any = "a red dog", **options: Any) -> torch.Tensor:
    return tiny.call(pipe, prompt, **options)


def edited(pipe: CogVideoXPipeline, edits: Any = DOG, prompt: Any = "a red dog", **options: Any) -> torch.Tensor:
    with edit_attention(pipe, edits, **options):
        return call(pipe, prompt)


def outputs(pipe: Any, layer: int, run: Callable[[], Any]) -> list[torch.Tensor]:
    """What the attention of a layer returns of the video in every forward pass."""
    kept: list[torch.Tensor] = []
    hook = pipe.transformer.transformer_blocks[layer].attn1.register_forward_hook(
        lambda module, args, output: kept.append(output[0].clone())
    )
    run()
    hook.remove()
    return kept


@pytest.mark.parametrize("scale", [1, 1.0])
def test_the_identity_is_stock(pipe: CogVideoXPipeline, scale: float) -> None:
    stock = call(pipe)
    before = snapshot(pipe.transformer)
    nowhere = torch.zeros(48, 80, dtype=torch.bool)
    edits = [AttentionEdit("dog", scale=scale), AttentionEdit("dog", scale=3.0, mask=nowhere)]
    for chosen in (edits, []):
        with edit_attention(pipe, chosen):
            assert_same(pipe.transformer, before)
            assert torch.equal(call(pipe), stock)


@pytest.mark.parametrize("transform", [lambda share: share, torch.clone])
def test_a_transform_that_changes_nothing(pipe: CogVideoXPipeline, transform: Callable[..., Any]) -> None:
    """That cannot be known beforehand, and the attention is computed anew."""
    stock = call(pipe)
    torch.testing.assert_close(edited(pipe, AttentionEdit("dog", transform=transform)), stock, rtol=0, atol=1e-5)


def test_random_numbers_are_those_of_stock(pipe: CogVideoXPipeline) -> None:
    torch.manual_seed(3)
    call(pipe, generator=None)
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    with edit_attention(pipe, DOG):
        call(pipe, generator=None)
    assert torch.equal(torch.get_rng_state(), expected)


def region(name: str) -> tuple[dict[str, Any], torch.Tensor]:
    """Options of an edit, and the tokens `[frame, height, width]` that they stand for."""
    inside = torch.zeros(FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
    if name == "pixels":
        mask = torch.zeros(48, 80, dtype=torch.bool)
        mask[16:32, 40:75] = True  # of the last column of tokens 11 of 16 pixels, of the one before all, and half
        inside[:, 1, 3:] = True
        inside[:, 1, 2] = True
        return {"mask": mask}, inside
    if name == "video":
        video = torch.zeros(9, HEIGHT, WIDTH, dtype=torch.bool)
        video[3:, 0] = True  # of frames 1 to 4, of the second token frame, two
        inside[1:, 0] = True
        return {"mask": video}, inside
    if name == "tokens":
        inside[1, 2, 4] = inside[2, 0] = True
        return {"mask": inside.float()}, inside
    inside[1:2] = True
    return {"time": (0.4, 0.8)}, inside


@pytest.mark.parametrize("name", ["pixels", "video", "tokens", "time"])
def test_tokens_outside_are_those_of_stock(pipe: CogVideoXPipeline, name: str) -> None:
    """In the first edited layer, to the bit, in both guidance branches; inside something has changed."""
    options, inside = region(name)
    stock = outputs(pipe, 1, lambda: call(pipe, PROMPTS))
    edits = AttentionEdit("dog", scale=6.0, **options)
    actual = outputs(pipe, 1, lambda: edited(pipe, edits, PROMPTS, layers=[1], steps=[0]))
    where = inside.flatten()
    assert torch.equal(actual[0][:2], stock[0][:2])
    assert torch.equal(actual[0][2:, ~where], stock[0][2:, ~where])
    assert (actual[0][2:, where] - stock[0][2:, where]).abs().amax(-1).min() > 1e-4


def test_only_the_steps_that_are_asked_for(pipe: CogVideoXPipeline) -> None:
    def inputs(run: Callable[[], Any]) -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, args, given: kept.append(given["hidden_states"]), with_kwargs=True
        )
        run()
        hook.remove()
        return kept

    stock, actual = inputs(lambda: call(pipe)), inputs(lambda: edited(pipe, steps=[1]))
    assert [torch.equal(a, b) for a, b in zip(stock, actual, strict=True)] == [True, True, False]
    both = inputs(lambda: edited(pipe, steps=range(3)))
    assert torch.equal(both[2], inputs(lambda: edited(pipe))[2])


@pytest.mark.parametrize("name", ["CogVideoX", "HunyuanVideo", "Wan 2.1", "LTX-Video", "SD3", "Cosmos", "Mochi"])
def test_every_prompt_has_its_own_words(name: str) -> None:
    """Edited together or one by one, in batched guidance and in two passes."""
    case = CASES[name]
    pipe = case.pipeline()
    edits = [AttentionEdit("dog", scale=6.0), AttentionEdit(["a", "dog"], replace=torch.full((2, 2), 0.4))]
    noise: list[torch.Tensor] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: noise.append(given["hidden_states"].clone()), with_kwargs=True
    )
    stock = case.call(pipe, PROMPTS)
    hook.remove()
    with edit_attention(pipe, edits):
        together = case.call(pipe, PROMPTS)
        latents = noise[0][-2:]
        for row, prompt in enumerate(PROMPTS):
            alone = case.call(pipe, [prompt], latents=latents[row : row + 1])
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-4 * alone.abs().max().item())
    assert (together - stock).abs().amax((1, 2)).min() > 1e-3
    assert torch.equal(case.call(pipe, PROMPTS), stock)


def hook(pipe: CogVideoXPipeline) -> None:
    for module in pipe.transformer.modules():
        module.register_forward_hook(lambda *args: None, with_kwargs=True, always_call=True)


PREPARE: dict[str, Callable[[CogVideoXPipeline], Any]] = {
    "plain": lambda pipe: None,
    "fused": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "processors": lambda pipe: pipe.transformer.set_attn_processor(dcm.concept_attn_processors(pipe.transformer)),
    "router": lambda pipe: pipe.transformer.set_attn_processor(dcm.ConceptAttnProcessor()),
    "hooks": hook,
}


@pytest.mark.parametrize("prepare", PREPARE.values(), ids=PREPARE)
def test_undo(pipe: CogVideoXPipeline, prepare: Callable[[CogVideoXPipeline], Any]) -> None:
    expected = edited(pipe)
    prepare(pipe)
    stock = call(pipe)
    before, attributes = snapshot(pipe.transformer), dict(vars(pipe))
    with edit_attention(pipe, DOG):
        assert snapshot(pipe.transformer) != before
        actual = call(pipe)
    assert_same(pipe.transformer, before)
    assert vars(pipe).keys() == attributes.keys()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert torch.equal(call(pipe), stock)


def test_undo_after_a_failure(pipe: CogVideoXPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, expected = call(pipe), edited(pipe)
    before, attributes = snapshot(pipe.transformer), dict(vars(pipe))
    failing = ((pipe.transformer.transformer_blocks[2].ff, "forward"), (AmendedAttention, "attend"))
    for module, name in (*failing, (pipe.scheduler, "step")):
        with edit_attention(pipe, DOG):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, boom)
                with pytest.raises(Boom):
                    call(pipe)
            assert torch.equal(call(pipe), expected)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, boom)
            with pytest.raises(Boom):
                edited(pipe)
        assert_same(pipe.transformer, before)
    assert vars(pipe).keys() == attributes.keys()
    assert torch.equal(call(pipe), stock)


@pytest.mark.parametrize("attention", ["exact", "one_pass"])
def test_a_capture_sees_the_edited_run(pipe: CogVideoXPipeline, attention: str) -> None:
    """In either order; frames are those of the edits alone, and outputs of an edited layer are the edited ones."""
    options: dict[str, Any] = {"methods": ("concept_attention", "imap"), "attention": attention}
    expected, before = edited(pipe), snapshot(pipe.transformer)
    atol = 0.0 if attention == "exact" else 1e-5
    with edit_attention(pipe, DOG), dcm.trace(pipe, ["dog", "sky"], **options) as inner:
        torch.testing.assert_close(call(pipe), expected, rtol=0, atol=atol)
    assert_same(pipe.transformer, before)
    with dcm.trace(pipe, ["dog", "sky"], **options) as outer, edit_attention(pipe, DOG):
        torch.testing.assert_close(call(pipe), expected, rtol=0, atol=atol)
    assert_same(pipe.transformer, before)
    with dcm.trace(pipe, ["dog", "sky"], **options) as unedited:
        call(pipe)
    for method in options["methods"]:
        assert torch.equal(inner.get(method), outer.get(method))
        assert not torch.allclose(inner.get(method), unedited.get(method), atol=1e-4)


def test_outputs_of_an_edited_layer(pipe: CogVideoXPipeline) -> None:
    """What a method compares in the layer itself: the query and key of the model, and the edited output."""
    own: dict[str, Any] = {"layers": [1], "steps": [0]}
    traced: dict[str, Any] = own | {"methods": ("cross_attention", "gramcol"), "target": "prompt"}
    with dcm.trace(pipe, ["dog", "red"], **traced) as stock:
        call(pipe)
    with edit_attention(pipe, DOG, **own), dcm.trace(pipe, ["dog", "red"], **traced) as maps:
        call(pipe)
    assert torch.equal(maps.get("cross_attention"), stock.get("cross_attention"))
    assert not torch.allclose(maps.get("gramcol"), stock.get("gramcol"), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    query, key, value = (seeded(2, 3, 40, 16, seed=seed).to(dtype) for seed in (1, 2, 3))
    tokens = torch.zeros(2, 40, dtype=torch.bool)
    tokens[:, 3:5] = tokens[1, 7] = True
    attention = AmendedAttention(query, key, value, None)
    bias = 20 * seeded(2, 3, 40, seed=4)
    bias[:, :, 0], bias[:, :, 1] = -torch.inf, torch.inf
    attention.add(bias, tokens)
    logits = query.double() @ key.double().mT / 4 + bias.double().clamp(-1e9, 1e9)[..., None] * tokens[:, None, None]
    expected = logits.softmax(-1) @ value.double()
    torch.testing.assert_close(attention.attend(torch.arange(40)).double(), expected, rtol=0, atol=0.02)
    share = (logits.softmax(-1) * tokens[:, None, None]).sum(-1)[:, :, 2:]
    torch.testing.assert_close(attention.log_odds(tokens)[:, :, 2:].sigmoid().double(), share, rtol=0, atol=0.01)


def test_log_odds_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, tokens = [seeded(2, 3, 11, 8, seed=seed) for seed in (1, 2, 3)], torch.arange(11).expand(2, 11) < 4
    for mask in (None, seeded(2, 1, 11, 11, seed=5), seeded(2, 1, 11, 11, seed=5) > -1, seeded(2, 1, 1, 11, seed=6)):
        attention = AmendedAttention(*heads, mask)
        whole = attention.log_odds(tokens)
        with monkeypatch.context() as patch:
            patch.setattr("diffusers_concept_maps.editing.amending._CHUNK", 3 * 6 * 11)
            torch.testing.assert_close(attention.log_odds(tokens), whole)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return made


def test_nothing_of_the_size_of_the_attention_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (seeded(1, 2, 600, 16, seed=seed) for seed in (1, 2, 3))
    tokens = torch.arange(600)[None] < 3
    monkeypatch.setattr("diffusers_concept_maps.editing.amending._CHUNK", 2 * 600 * 10)
    with Largest() as largest:
        attention = AmendedAttention(query, key, value, None)
        attention.add(attention.log_odds(tokens), tokens)
        attention.attend(torch.arange(600))
    assert largest.numbers <= 2 * 600 * 24


def test_gradients_flow_through_edits(pipe: CogVideoXPipeline) -> None:
    inputs = {
        "hidden_states": seeded(1, 3, 4, 6, 10, seed=1).requires_grad_(),
        "encoder_hidden_states": seeded(1, 4, 32, seed=2),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": pipe._prepare_rotary_positional_embeddings(48, 80, 3, torch.device("cpu")),
        "return_dict": False,
    }
    with edit_attention(pipe.transformer, DOG, prompt_tokens={"dog": [1]}):
        pipe.transformer(**inputs)[0].square().mean().backward()
    assert inputs["hidden_states"].grad.isfinite().all()


def test_frames_of_the_video_to_those_of_the_grid() -> None:
    values = seeded(9, 2, seed=1)
    expected = torch.stack([values[0], values[1:5].mean(0), values[5:].mean(0)])
    torch.testing.assert_close(gather_frames(values, 3, frames_per_latent=4), expected)
    grid = seeded(3, 2, 2, seed=2)
    spread = spread_frames(grid, 9, frames_per_latent=4)
    torch.testing.assert_close(gather_frames(spread, 3, frames_per_latent=4), grid)


def test_a_mask_in_pixels_that_is_no_multiple(pipe: CogVideoXPipeline) -> None:
    soft = torch.zeros(HEIGHT * 7, WIDTH * 3)
    soft[:7, :3] = 0.5
    small = torch.zeros(HEIGHT, WIDTH)
    small[0, 0] = 0.5
    assert torch.equal(
        edited(pipe, AttentionEdit("dog", scale=6.0, mask=soft)),
        edited(pipe, AttentionEdit("dog", scale=6.0, mask=small)),
    )


def test_a_phrase_and_two_words_are_one_share(pipe: CogVideoXPipeline) -> None:
    phrase = edited(pipe, AttentionEdit("red dog", scale=2.5))
    torch.testing.assert_close(edited(pipe, AttentionEdit(["red", "dog"], scale=2.5)), phrase, rtol=0, atol=1e-6)
    one_by_one = [AttentionEdit("red", scale=2.5), AttentionEdit("dog", scale=2.5)]
    torch.testing.assert_close(edited(pipe, one_by_one), phrase, rtol=0, atol=1e-4)
    assert scaled(1.0)(torch.tensor(0.3)) == 0.3
