"""Whole pipeline runs under the parity switches against float64 maps with every padded row of the text axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import naive
import naive_variants as variants
import pytest
import torch
from backbones import tiny_cogvideox as tiny
from diffusers import CogVideoXPipeline

import diffusers_concept_maps as dcm
from diffusers_concept_maps import ops
from diffusers_concept_maps.accumulate import Accumulator
from diffusers_concept_maps.backbones import Grid
from diffusers_concept_maps.parity import CONCEPT_ATTENTION, IMAP, Parity

CONCEPTS = ["dog", "red rock", "sky"]
PROMPTS = ["a red dog running on the beach", "the sky on a rock"]
METHODS = {
    "imap": ["concept_attention", "cross_attention", "gramcol", "imap"],
    "concept_attention": ["concept_attention", "cross_attention"],
}
# Of the largest value; the z-scores of GramCol are ill-conditioned where texts nearly agree, and it sums the heads.
TOLERANCE = {"concept_attention": 3e-5, "cross_attention": 3e-5, "gramcol": 3e-4, "imap": 1e-4}
pipeline = tiny.shaken_pipeline


def call(pipe: CogVideoXPipeline, prompt: Any = PROMPTS[0], **options: Any) -> torch.Tensor:
    """Two steps, with a seed that makes no near tie of anchors."""
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(2), **options}
    return tiny.call(pipe, prompt, **settings)


def first_tokens(pipe: CogVideoXPipeline, concepts: Sequence[str], length: int = 16) -> torch.Tensor:
    """The text encoder's state of the first token of every concept, each padded to a length."""
    ids = pipe.tokenizer(list(concepts), padding="max_length", max_length=length, return_tensors="pt").input_ids
    assert ids.shape == (len(concepts), length)
    with torch.no_grad():
        states: torch.Tensor = pipe.text_encoder(ids).last_hidden_state[:, 0]
    return states


def padded(embeds: torch.Tensor, length: int) -> torch.Tensor:
    """Zero embeddings behind those of the concepts `[..., C, width]`, up to the length of the text."""
    rows = embeds.new_zeros(*embeds.shape[:-2], length - embeds.shape[-2], embeds.shape[-1])
    return torch.cat([embeds, rows], -2)


def expected(
    pipe: CogVideoXPipeline,
    calls: list[dict[str, Any]],
    rows: slice,
    embeds: torch.Tensor,
    parity: str,
    method: str,
    softmax: bool,
    *,
    rule: naive.HeadRule = naive.all_heads,
    layers: Sequence[int] = (0, 1, 2),
    grid: tuple[int, int, int] = tiny.GRID,
) -> torch.Tensor:
    """Maps of the concepts `[R, C, frame, height, width]`, from `[C, width]` or `[R, C, width]`."""
    model, steps = variants.VariantCogVideoX(pipe.transformer), []
    for step in calls:
        shown = model.layers(step, rows, padded(embeds, step["encoder_hidden_states"].shape[1]))
        steps.append(
            [
                variants.official_layer(method, softmax, shown[layer], shown[layer].concepts, grid[0], rule)
                for layer in layers
            ]
        )
    keep = [range(embeds.shape[-2])] * steps[0][0].shape[0]
    return variants.official_saliency(steps, keep, grid, again=softmax and parity == "imap")


def check(
    parity: str,
    concepts: Sequence[str] = CONCEPTS,
    *,
    normalize: str | None = None,
    rope: bool = True,
    branch: str = "cond",
    embeds: torch.Tensor | None = None,
    heads: Any = None,
    rule: naive.HeadRule = naive.all_heads,
    layers: Sequence[int] = (0, 1, 2),
    steps: Sequence[int] = (0, 1),
    grid: tuple[int, int, int] = tiny.GRID,
    **options: Any,
) -> list[dict[str, Any]]:
    """Compare every method of a parity switch, in one run whose frames are those of the stock pipeline."""
    pipe, softmax = pipeline(rope), (normalize or {"imap": "none"}.get(parity)) != "none"
    frames = call(pipe, **options)
    traced = dcm.trace(
        pipe,
        list(concepts),
        methods=METHODS[parity],
        parity=parity,
        normalize=normalize,
        branch=branch,
        concept_embeds=embeds,
        heads=heads,
        layers=layers,
        steps=steps,
    )
    with tiny.recorded_calls(pipe.transformer) as calls, traced as maps:
        assert torch.equal(call(pipe, **options), frames)
    embeds = first_tokens(pipe, concepts) if embeds is None else embeds
    batch = calls[0]["hidden_states"].shape[0]
    half = slice(batch // 2, batch) if options.get("guidance_scale", 4.0) > 1 else slice(0, batch)
    parts = {"cond": half} if branch == "cond" else {"uncond": slice(0, batch // 2), "cond": half}
    for name, rows in parts.items():
        of_branch = maps[name] if branch == "both" else maps
        assert of_branch.metadata["parity"] == parity
        for method in METHODS[parity]:
            reference = expected(
                pipe, [calls[step] for step in steps], rows, embeds, parity, method, softmax,
                rule=rule, layers=layers, grid=grid,
            )  # fmt: skip
            variants.assert_close(of_branch.get(method), reference, TOLERANCE[method])
    return calls


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("normalize", [None, "none", "softmax"])
@pytest.mark.parametrize("parity", METHODS)
def test_batched_guidance(parity: str, normalize: str | None, rope: bool) -> None:
    check(parity, normalize=normalize, rope=rope, prompt=PROMPTS)


@pytest.mark.parametrize("normalize", ["none", "softmax"])
@pytest.mark.parametrize("parity", METHODS)
def test_without_guidance_and_both_branches(parity: str, normalize: str) -> None:
    check(parity, normalize=normalize, guidance_scale=1.0)
    check(parity, normalize=normalize, branch="both", negative_prompt="cat")


@pytest.mark.parametrize("normalize", ["none", "softmax"])
@pytest.mark.parametrize("length", [3, 4, 9, 17])
@pytest.mark.parametrize("parity", METHODS)
def test_another_text_length(parity: str, length: int, normalize: str) -> None:
    """The text axis is as long as the prompt's; of 4 tokens for 3 concepts one is padding, of 3 none."""
    calls = check(parity, normalize=normalize, max_sequence_length=length)
    assert calls[0]["encoder_hidden_states"].shape[1] == length


@pytest.mark.parametrize("normalize", ["none", "softmax"])
@pytest.mark.parametrize("parity", METHODS)
def test_a_single_concept(parity: str, normalize: str) -> None:
    """IMAP's second softmax is replaced by the range 0 to 1 then."""
    check(parity, ["dog"], normalize=normalize, prompt=PROMPTS)


def test_a_single_concept_is_scaled_over_every_clip() -> None:
    with dcm.trace(pipeline(), ["dog"], methods=["imap"], parity="imap", normalize="softmax") as maps:
        call(pipeline(), PROMPTS, num_inference_steps=1)
    flat = maps.get().flatten(1)
    assert torch.equal(flat.amin(1), torch.zeros(2))
    assert torch.equal(flat.amax(1), torch.ones(2))


@pytest.mark.parametrize("normalize", ["none", "softmax"])
@pytest.mark.parametrize("parity", [IMAP, CONCEPT_ATTENTION])
def test_concepts_that_are_not_padded(parity: Parity, normalize: str) -> None:
    pipe, methods, softmax = pipeline(), METHODS[parity.name], normalize == "softmax"
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe, CONCEPTS, methods=methods, parity=replace(parity, padded=False), normalize=normalize) as maps,
    ):
        call(pipe, PROMPTS)
    model = variants.VariantCogVideoX(pipe.transformer)
    shown = [model.layers(step, slice(2, 4), first_tokens(pipe, CONCEPTS)) for step in calls]
    for method in methods:
        steps = [
            [variants.official_layer(method, softmax, layer, layer.concepts, 3, naive.all_heads) for layer in layers]
            for layers in shown
        ]
        again = softmax and parity is IMAP
        reference = variants.official_saliency(steps, [range(3)] * 2, tiny.GRID, again=again)
        variants.assert_close(maps.get(method), reference, TOLERANCE[method])


def test_a_constant_map_of_a_single_concept_is_zero() -> None:
    """Its range 0 to 1 would be a division of zero by zero."""
    maps = Accumulator(Grid(1, 2, 3), softmax_steps=True)
    maps.add(torch.tensor([[[0.3] * 6], [[0.0, 1, 2, 3, 4, 5]]]), 0, 0)
    maps.close_step()
    expected = torch.tensor([[[[[0.0] * 3] * 2]], [[[[0.0, 0.2, 0.4], [0.6, 0.8, 1.0]]]]])
    torch.testing.assert_close(maps.mean(), expected)


@pytest.mark.parametrize("normalize", ["none", "softmax"])
@pytest.mark.parametrize("parity", METHODS)
def test_layers_steps_and_listed_heads(parity: str, normalize: str) -> None:
    check(
        parity, normalize=normalize, layers=(0, 2), steps=(0, 2), num_inference_steps=3, heads=(1, 2),
        rule=naive.listed_heads((1, 2)),
    )  # fmt: skip


@pytest.mark.parametrize("normalize", ["none", "softmax"])
def test_motion_heads(normalize: str) -> None:
    check("imap", normalize=normalize, heads=dcm.HeadSelection(top_k=2), rule=naive.best_heads(2), prompt=PROMPTS)


@pytest.mark.parametrize("parity", METHODS)
def test_another_grid(parity: str) -> None:
    check(parity, height=64, width=48, num_frames=5, grid=(2, 4, 3), normalize="softmax")


@pytest.mark.parametrize("branch", ["cond", "both"])
def test_embeddings_of_their_own_for_every_video(branch: str) -> None:
    embeds = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(3))
    check("imap", embeds=embeds, prompt=PROMPTS, branch=branch)


def test_texts_of_equal_anchors_have_no_score() -> None:
    """Their columns are the same, so that the z-score over the text is zero, and not a quotient of rounding errors."""
    generator = torch.Generator().manual_seed(0)
    query, output = (torch.randn(1, 4, 45, 16, generator=generator) for _ in range(2))
    key = torch.randn(1, 4, 1, 16, generator=generator)
    for rows in range(2, 8):
        multiplicity = torch.ones(rows)
        multiplicity[-1] = 226 - rows
        keys = key * torch.linspace(1, 2, rows)[:, None]  # different, with one best match
        index, _, _ = ops.query_key_argmax(query, keys, 3)
        scores = ops.gram_columns(output, index, torch.ones(1, 4), standardize="text", multiplicity=multiplicity)
        assert torch.equal(scores, torch.zeros(1, rows, 45))


@pytest.mark.parametrize("parity", METHODS)
def test_half_precision(parity: str) -> None:
    """The weight of the padding row is in the dtype of the attention; maps are float32."""
    pipe = tiny.make_pipeline(dtype=torch.bfloat16)
    frames = call(pipe)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS[parity][:2], parity=parity, normalize="none") as maps:
        assert torch.equal(call(pipe), frames)
    pipe.to(torch.float32)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS[parity][:2], parity=parity, normalize="none") as exact:
        call(pipe)
    for method in METHODS[parity][:2]:
        variants.assert_close(maps.get(method), exact.get(method), 0.1)


def test_many_steps() -> None:
    """Means over layers are softmaxed in every step: their order matters, and nothing of a step is left over."""
    check("imap", normalize="softmax", num_inference_steps=5, steps=(0, 1, 2, 3, 4))


def test_a_second_run_starts_anew() -> None:
    with dcm.trace(pipeline(), CONCEPTS, methods=["imap"], parity="imap", normalize="softmax") as maps:
        call(pipeline(), PROMPTS[1])
        call(pipeline())
    with dcm.trace(pipeline(), CONCEPTS, methods=["imap"], parity="imap", normalize="softmax") as alone:
        call(pipeline())
    assert torch.equal(maps.get(), alone.get())


def test_the_embedding_is_the_first_token_padded_to_16() -> None:
    pipe = pipeline()
    maps = []
    for length in (16, tiny.TEXT_LENGTH):
        with dcm.trace(pipe, concept_embeds=first_tokens(pipe, CONCEPTS, length), parity="imap") as given:
            call(pipe)
        maps.append(given.get())
    with dcm.trace(pipe, CONCEPTS, parity="imap") as encoded:
        call(pipe)
    scale = float(maps[0].abs().max())
    assert (encoded.get() - maps[0]).abs().max() < 1e-6 * scale
    assert (encoded.get() - maps[1]).abs().max() > 1e-3 * scale  # padding is seen by the text encoder


POSITIONS = {PROMPTS[0]: {"a": 0, "red": 1, "dog": 2, "on": 4, "the": 5}, PROMPTS[1]: {"the": 0, "on": 2, "a": 3}}


@pytest.mark.parametrize("normalize", ["none", "softmax"])
@pytest.mark.parametrize(
    ("prompts", "words"), [(PROMPTS[:1], ["dog", "red", "on"]), (PROMPTS, ["on", "a"]), (PROMPTS, ["the"])]
)
def test_prompt_words(prompts: list[str], words: list[str], normalize: str) -> None:
    """Scored beside all tokens of the text, padding included."""
    pipe = pipeline()
    traced = dcm.trace(pipe, words, target="prompt", parity="imap", methods=["gramcol", "imap"], normalize=normalize)
    with tiny.recorded_calls(pipe.transformer) as calls, traced as maps:
        call(pipe, prompts)
    model, keep = variants.VariantCogVideoX(pipe.transformer), [[POSITIONS[p][w] for w in words] for p in prompts]
    rows, softmax = slice(len(prompts), 2 * len(prompts)), normalize == "softmax"
    shown = [model.layers(step, rows, torch.zeros(1, 32)) for step in calls]
    for method in ["gramcol", "imap"]:
        steps = [
            [variants.official_layer(method, softmax, layer, layer.text, 3, naive.all_heads) for layer in layers]
            for layers in shown
        ]
        reference = variants.official_saliency(steps, keep, tiny.GRID, again=softmax)
        variants.assert_close(maps.get(method), reference, TOLERANCE[method])


def test_a_prompt_word_is_the_first_token_of_its_first_occurrence() -> None:
    pipe, prompt = pipeline(), "a dog on a red dog"
    tensors = []
    for options in ({"concepts": ["dog", "red dog"]}, {"prompt_tokens": {"dog": [1], "red dog": [4]}}):
        with dcm.trace(pipe, target="prompt", parity="imap", methods=["gramcol"], **options) as maps:
            call(pipe, prompt)
        tensors.append(maps.get())
    assert torch.equal(*tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parity": "IMAP"}, "unknown parity 'IMAP'; expected None or one of concept_attention, imap"),
        ({"parity": ""}, "unknown parity ''"),
        ({"parity": "concept_attention", "methods": ["imap"]}, "parity='concept_attention' has no method 'imap'"),
        ({"parity": "concept_attention", "methods": ["concept_attention", "gramcol"]}, "has no method 'gramcol'"),
        ({"parity": "imap", "normalize": "zscore"}, "parity='imap' reproduces one implementation"),
        ({"parity": "imap", "space": "value"}, "leave space, reads and token_policy alone"),
        ({"parity": "concept_attention", "reads": "image"}, "leave space, reads and token_policy alone"),
        ({"parity": "imap", "normalize": "minmax"}, "unknown normalize 'minmax'"),
        ({"parity": "imap", "token_policy": "last"}, "leave space, reads and token_policy alone"),
        ({"parity": "imap", "target": "prompt"}, "parity='imap' has no 'concept_attention' for words of the prompt"),
        (
            {"parity": "imap", "target": "prompt", "methods": ["imap", "cross_attention"]},
            "parity='imap' has no 'cross_attention' for words of the prompt",
        ),
    ],
)
def test_what_parity_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(dcm.ConceptMapsError, match=message), dcm.trace(pipeline(), CONCEPTS, **options):
        pass


def test_too_many_concepts_for_the_prompt() -> None:
    with (
        pytest.raises(dcm.ConceptMapsError, match="pads 3 concepts to the 2 tokens.*name fewer concepts"),
        dcm.trace(pipeline(), CONCEPTS, parity="imap"),
    ):
        call(pipeline(), "dog", max_sequence_length=2)
