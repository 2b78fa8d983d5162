"""FLUX.2: its pipelines, references that are kept, chats and presets."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from backbones import tiny_flux2 as tiny
from backbones._case import Inputs, cast_inputs, seeded
from backbones._runs import METHODS, check_step, recorded_passes, word_maps
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from naive import Taps, all_heads, saliency
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones.flux2 import BACKBONE
from diffusers_concept_maps.parity import FLUX_CONCEPT_ATTENTION

EMBEDS = torch.randn(3, tiny.WIDTH, generator=torch.Generator().manual_seed(99))
REFERENCE = Image.effect_noise((64, 72), 60).convert("RGB")
IMAGE = torch.rand(1, 3, 20, 12, generator=torch.Generator().manual_seed(5))
MASK = (torch.rand(1, 1, 20, 12, generator=torch.Generator().manual_seed(6)) > 0.5).float()
NORMALIZED = {"concept_attention": "softmax", "cross_attention": "softmax", "gramcol": "zscore", "imap": "zscore"}
KEPT = 8
"""Tokens of a reference image of which keys and values are kept."""


@cache
def klein(name: str = "Flux2KleinPipeline") -> Any:
    pipe = getattr(diffusers, name)(**tiny.klein_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def dev() -> Any:
    return tiny.make_pipeline()


def check(pipe: Any, run: Callable[[], torch.Tensor], passes: int, step: int = 1) -> Inputs:
    return check_step(pipe, run, EMBEDS, (1, 5, 3), passes, step)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("references", [0, 1, 2])
def test_klein_leaves_references_out(references: int, scale: float) -> None:
    pipe, options = klein(), {"image": [REFERENCE] * references or None, "guidance_scale": scale}
    call = check(pipe, lambda: tiny.call(pipe, "a red dog", **options), 1 + (scale > 1))
    assert call["hidden_states"].shape[1] == 15 + references * 16 * 18


def test_klein_inpaints() -> None:
    pipe = klein("Flux2KleinInpaintPipeline")
    options = {"image": IMAGE, "mask_image": MASK, "strength": 0.9, "num_inference_steps": 4}
    call = check(pipe, lambda: tiny.call(pipe, "a red dog", **options), 2)
    assert call["hidden_states"].shape[1] == 30


@pytest.mark.parametrize("reference", [None, REFERENCE])
def test_dev_leaves_references_out(reference: Image.Image | None) -> None:
    pipe = dev()
    call = check(pipe, lambda: tiny.call(pipe, "a red dog", image=reference), 1)
    assert call["hidden_states"].shape[1] == (15 if reference is None else 15 + 16 * 18)


def test_half_precision() -> None:
    pipe = tiny.make_klein_pipeline().to(torch.bfloat16)
    check(pipe, lambda: tiny.call(pipe, "a red dog"), 2)


@pytest.mark.parametrize("reference", [None, REFERENCE])
def test_klein_that_keeps_references(reference: Image.Image | None) -> None:
    pipe = klein("Flux2KleinKVPipeline")
    call = check(pipe, lambda: tiny.call(pipe, "a red dog", image=reference), 1, step=0)
    assert call.get("kv_cache_mode") == (None if reference is None else "extract")
    with dcm.trace(pipe, concept_embeds=EMBEDS, methods=METHODS, steps=[0, 2]) as maps:
        on = tiny.call(pipe, "a red dog", image=reference)
    assert torch.equal(on, tiny.call(pipe, "a red dog", image=reference))
    assert maps.coverage["imap"].tolist() == [[True] * 4, [False] * 4, [True] * 4]
    assert all(maps.get(method).shape == (1, 3, 1, 5, 3) for method in METHODS)


def kept_call(transformer: Any, given: Inputs, mode: str) -> Inputs:
    """A call whose image stream has references in front, or one that is handed what such a call has kept."""
    batch, dtype = given["hidden_states"].shape[0], given["hidden_states"].dtype
    reference = seeded(batch, KEPT, 16, seed=77).to(dtype)
    extract = given | {
        "hidden_states": torch.cat([reference, given["hidden_states"]], 1),
        "img_ids": torch.cat([tiny.positions(2, 4, image=10), given["img_ids"]]),
        "kv_cache_mode": "extract",
        "num_ref_tokens": KEPT,
    }
    if mode == "extract":
        return extract
    with torch.no_grad():
        _, kept = transformer(**extract, return_dict=False)
    return given | {"kv_cache": kept, "kv_cache_mode": "cached"}


def keeping_transformer() -> Any:
    transformer = tiny.make_klein()
    for block in transformer.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in transformer.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return transformer


def taps_with_references(mode: str, given: Inputs, text: int) -> list[Taps]:
    """What every layer shows in float64, with concepts as text rows that nobody else sees and that see no text."""
    transformer, given = keeping_transformer().double(), cast_inputs(given, torch.float64)
    call, layers = kept_call(transformer, given, mode), []
    columns = slice(text, text + 3)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        logits = query @ key.mT / 4.0
        if query.shape[2] == text + 3 + 15:  # not references among themselves
            hidden = torch.zeros(logits.shape[-2:], dtype=torch.bool)
            hidden[:, columns] = True
            hidden[columns, columns] = False
            hidden[columns, :text] = True
            logits = logits.masked_fill(hidden, -torch.inf)
        output = logits.softmax(-1) @ value
        if query.shape[2] == text + 3 + 15:
            image = slice(text + 3, None)
            layers.append(Taps(query[:, :, image], output[:, :, image], key[:, :, columns], output[:, :, columns]))
        return output

    with (
        torch.no_grad(),
        tiny.joining(transformer, call, EMBEDS.double()) as joined,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        transformer(**joined)
    assert len(layers) == 4
    return layers


@pytest.mark.parametrize("text", [1, 5])
@pytest.mark.parametrize("mode", ["extract", "cached"])
def test_maps_where_references_are_kept(mode: str, text: int) -> None:
    transformer, given = keeping_transformer(), tiny.klein_inputs(2, text, 3)
    taps, call = taps_with_references(mode, given, text), kept_call(transformer, given, mode)
    with torch.no_grad():
        off = transformer(**call, return_dict=False)
    for method in METHODS:
        heads = range(4) if method == "imap" else None
        capture = dcm.trace(transformer, concept_embeds=EMBEDS, methods=[method], heads=heads)
        with torch.no_grad(), capture as maps:
            on = transformer(**call, return_dict=False)
        assert torch.equal(on[0], off[0])
        expected = saliency([taps], method, NORMALIZED[method], (1, 5, 3), all_heads)
        assert (maps.get() - expected).abs().max() <= 1e-4 * expected.abs().max()
    if mode == "extract":
        for own, stock in zip(on[1].double_block_caches, off[1].double_block_caches, strict=True):
            assert torch.equal(own.k_ref, stock.k_ref)
            assert torch.equal(own.v_ref, stock.v_ref)


def test_projections_that_are_fused_during_a_capture() -> None:
    given, maps = tiny.inputs(2, 5, 1), []
    for transformer in (tiny.make_transformer(), tiny.make_fused()):
        with torch.no_grad(), dcm.trace(transformer, concept_embeds=EMBEDS, methods=METHODS) as captured:
            transformer.fuse_qkv_projections()
            transformer(**given)
        maps.append(captured)
    for method in METHODS:
        assert torch.equal(maps[0].get(method), maps[1].get(method))


@pytest.mark.parametrize("side", ["left", "right"])
def test_concepts_are_words_of_a_chat(side: str) -> None:
    """Those that the template says itself are none of them: it ends with "a", and the one of dev has "sky"."""
    pipe = klein() if side == "right" else dev()
    pooled = []
    for text, rows in (("red dog", [2, 3]), ("a", [2]), ("sky", [2])):
        states, _ = pipe.encode_prompt(text, max_sequence_length=512)
        rows = rows if side == "right" else [-1 - row for row in range(1, len(rows) + 1)]
        pooled.append(states[0, rows].mean(0))
    maps = []
    for options in ({"concepts": ["red dog", "a", "sky"]}, {"concept_embeds": torch.stack(pooled)}):
        with dcm.trace(pipe, **options) as captured:
            tiny.call(pipe, "a red dog")
        maps.append(captured.get())
    torch.testing.assert_close(*maps, rtol=1e-4, atol=1e-6)


def test_policies_take_the_words_alone() -> None:
    pipe = klein()
    states, _ = pipe.encode_prompt("red dog", max_sequence_length=512)
    for policy, row in (("first", 2), ("last", 3)):
        maps = []
        own = {"concepts": ["red dog"], "token_policy": policy}
        for options in (own, {"concept_embeds": states[:1, row]}):
            with dcm.trace(pipe, **options, normalize="none") as captured:
                tiny.call(pipe, "a red dog")
            maps.append(captured.get())
        torch.testing.assert_close(*maps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_words_of_a_prompt_of_klein(scale: float) -> None:
    pipe = klein()
    with dcm.trace(pipe, target="prompt", steps=[0]) as maps, recorded_passes(pipe.transformer) as calls:
        tiny.call(pipe, "a red dog", guidance_scale=scale)
    assert maps.concepts == ("a", "red", "dog")
    expected = word_maps(pipe.transformer, {"a": [2], "red": [3], "dog": [4]}, calls[0])
    assert torch.equal(maps.get(), expected)


def test_words_of_a_prompt_of_dev() -> None:
    """Padded in front; "sky" is in the chat before it is in the prompt."""
    pipe = dev()
    with dcm.trace(pipe, target="prompt", steps=[0]) as maps, recorded_passes(pipe.transformer) as calls:
        tiny.call(pipe, "a red sky")
    expected = word_maps(pipe.transformer, {"a": [12], "red": [13], "sky": [14]}, calls[0])
    assert torch.equal(maps.get(), expected)


def test_marks_of_a_chat_that_has_none() -> None:
    """A processor then adds them, and a tokenizer of its own accord never does."""
    tokenizer = tiny.make_tokenizer(tiny.MISTRAL_TEMPLATE.removeprefix("{{ bos_token }}"))
    for processor, first in ((tiny.Processor(tokenizer), 6), (tokenizer, 5)):
        pipe = SimpleNamespace(system_message="the sky", tokenizer=processor)
        spans = BACKBONE.token_spans(pipe, "red dog", 16)
        assert [row for row, (start, stop) in enumerate(spans) if start < stop] == [first, first + 1]
        assert spans[first : first + 2] == [(0, 3), (4, 7)]


@pytest.mark.parametrize("prompt", ["<end", "dog", "a", "<end> <dog> a"])
def test_prompts_that_look_like_the_rest_of_the_chat(prompt: str) -> None:
    text = f"<user> {prompt}<end> <dog> a"
    spans = BACKBONE.token_spans(klein(), prompt, 32)
    covered = [row for row, (start, stop) in enumerate(spans) if start < stop]
    encoded = klein().tokenizer(text, return_offsets_mapping=True)
    inside = [row for row, (start, stop) in enumerate(encoded.offset_mapping) if 7 <= start < 7 + len(prompt)]
    assert covered == inside


def test_a_template_that_changes_the_prompt() -> None:
    pipe = tiny.make_klein_pipeline()
    pipe.tokenizer.chat_template = tiny.QWEN_TEMPLATE.replace("message['content']", "message['content']|upper")
    with (
        pytest.raises(dcm.ConceptMapsError, match="'a dog' is changed by the chat template of Flux2KleinPipeline"),
        dcm.trace(pipe, ["dog"], target="prompt"),
    ):
        tiny.call(pipe, "a dog")


def test_concepts_that_do_not_fit() -> None:
    with pytest.raises(dcm.ConceptMapsError, match="does not fit into the 512 tokens of a chat; shorten it"):
        dcm.capture.attach(klein(), [" ".join(["dog"] * 600)])
    with pytest.raises(dcm.ConceptMapsError, match="'zebra' has no word that the tokenizer knows"):
        dcm.capture.attach(klein(), ["zebra"])


@pytest.mark.parametrize("name", ["text_encoder", "tokenizer"])
def test_a_pipeline_without_its_encoder(name: str) -> None:
    pipe = diffusers.Flux2KleinPipeline(**(tiny.klein_components() | {name: None}))
    with pytest.raises(dcm.ConceptMapsError, match="this Flux2KleinPipeline has no tokenizer or text encoder"):
        dcm.capture.attach(pipe, ["dog"])


def test_encoding_leaves_the_random_state_alone() -> None:
    pipe = tiny.make_klein_pipeline()
    pipe.text_encoder.train()
    for layer in pipe.text_encoder.model.layers:
        layer.self_attn.attention_dropout = 0.5
    before = torch.get_rng_state()
    with dcm.trace(pipe, ["dog"]):
        assert torch.equal(torch.get_rng_state(), before)


def test_there_is_no_pooled_vector_to_leave_out() -> None:
    transformer, given = tiny.make_transformer(), tiny.inputs(1, 5, 1)
    maps = []
    for parity in (FLUX_CONCEPT_ATTENTION, None):
        with torch.no_grad(), dcm.trace(transformer, concept_embeds=EMBEDS, parity=parity) as captured:
            transformer(**given)
        maps.append(captured.get())
    assert torch.equal(*maps)


def test_presets() -> None:
    size = {"attention_head_dim": 8, "axes_dims_rope": (2, 2, 2, 2), "joint_attention_dim": 8}
    for layers, heads, name in ((48, 48, "FLUX.2-dev"), (24, 32, None)):
        with torch.device("meta"):
            transformer = diffusers.Flux2Transformer2DModel(
                num_layers=8, num_single_layers=layers, num_attention_heads=heads, **size
            )
        preset = BACKBONE.preset(transformer)
        assert (preset and preset.name) == name
    with torch.device("meta"):
        preset = BACKBONE.preset(
            diffusers.Flux2Transformer2DModel(num_layers=8, num_single_layers=48, num_attention_heads=48, **size)
        )
    assert preset is not None
    assert preset.layers == {"concept_attention": (5, 6, 7)}
    assert [round(preset.steps[1] * steps) for steps in (28, 50)] == [27, 49]
