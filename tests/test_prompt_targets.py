"""Words of the prompt as targets: the maps are those of the prompt's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import naive
import naive_variants as variants
import pytest
import torch
from backbones import tiny_cogvideox as tiny
from diffusers import CogVideoXPipeline
from subwords import QUOTED, QUOTED_WORDS, REPEATED, ROCKET, ROCKET_WORDS, call, make_tokenizer, pipeline

import diffusers_concept_maps as dcm

METHODS = ["concept_attention", "cross_attention", "gramcol", "imap"]
DEFAULTS = {"concept_attention": "softmax", "cross_attention": "softmax", "gramcol": "zscore", "imap": "zscore"}


def expected(
    pipe: CogVideoXPipeline,
    calls: list[dict[str, Any]],
    rows: slice,
    words: Sequence[Sequence[Sequence[int]]],
    method: str,
    normalize: str,
    rule: naive.HeadRule = naive.all_heads,
    space: str = "output",
    layers: Sequence[int] = (0, 1, 2),
) -> torch.Tensor:
    """Maps of words that are given by position, per row of the batch."""
    model, maps = variants.VariantCogVideoX(pipe.transformer), []
    for step in calls:
        shown = model.layers(step, rows, torch.zeros(1, 32))
        maps.append(
            [variants.word_map(method, normalize, shown[layer], words, tiny.GRID[0], rule, space) for layer in layers]
        )
    return variants.saliency(maps, tiny.GRID)


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("normalize", [None, "none", "softmax", "zscore"])
def test_words_of_several_tokens(normalize: str | None, rope: bool) -> None:
    pipe, words = pipeline(rope), ["running", "dog", "rocket"]
    frames = call(pipe)
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe, words, target="prompt", methods=METHODS, normalize=normalize) as maps,
    ):
        assert torch.equal(call(pipe), frames)
    assert maps.concepts == tuple(words)
    assert maps.metadata["target"] == "prompt"
    positions = [[ROCKET_WORDS[word] for word in words]]
    for method in METHODS:
        reference = expected(pipe, calls, slice(1, 2), positions, method, normalize or DEFAULTS[method])
        variants.assert_close(maps.get(method), reference)


def test_occurrences_are_averaged() -> None:
    pipe, words = pipeline(), ["dog", "rockets", "rock"]
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe, words, target="prompt", methods=METHODS) as maps,
    ):
        call(pipe, REPEATED)
    positions = [[[0, 3], [4, 5, 6], [7]]]
    for method in METHODS:
        variants.assert_close(
            maps.get(method), expected(pipe, calls, slice(1, 2), positions, method, DEFAULTS[method])
        )


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_every_prompt_of_a_batch_has_its_own_positions(guidance_scale: float) -> None:
    pipe, words = pipeline(), ["running", "dog", "a", "rocket"]
    options = {"prompt": [ROCKET, QUOTED], "guidance_scale": guidance_scale}
    frames = call(pipe, **options)
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe, words, target="prompt", methods=METHODS) as maps,
    ):
        assert torch.equal(call(pipe, **options), frames)
    positions = [[table[word] for word in words] for table in (ROCKET_WORDS, QUOTED_WORDS)]
    rows = slice(2, 4) if guidance_scale > 1 else slice(0, 2)
    for method in METHODS:
        variants.assert_close(maps.get(method), expected(pipe, calls, rows, positions, method, DEFAULTS[method]))


def test_all_words_and_another_prompt_in_the_same_trace() -> None:
    pipe = pipeline()
    with dcm.trace(pipe, target="prompt") as maps:
        assert maps.concepts == ()
        for prompt, words in ((ROCKET, ROCKET_WORDS), (QUOTED, QUOTED_WORDS)):
            with tiny.recorded_calls(pipe.transformer) as calls:
                call(pipe, prompt)
            assert maps.concepts == tuple(words)
            reference = expected(pipe, calls, slice(1, 2), [list(words.values())], "concept_attention", "softmax")
            variants.assert_close(maps.get(), reference)
    assert maps.concepts == tuple(QUOTED_WORDS)
    torch.testing.assert_close(maps.get().sum(1), torch.ones(1, *tiny.GRID))  # padding has no part in the softmax


def test_phrases() -> None:
    pipe = pipeline()
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe, ["red rocket", " the dog running "], target="prompt") as maps,
    ):
        call(pipe)
    positions = [[[1, 2, 3], [5, 6, 7, 8]]]
    assert maps.concepts == ("red rocket", "the dog running")
    variants.assert_close(maps.get(), expected(pipe, calls, slice(1, 2), positions, "concept_attention", "softmax"))


@pytest.mark.parametrize("space", ["value", "query_key"])
def test_spaces_of_prompt_words(space: str) -> None:
    pipe, words = pipeline(), ["dog", "rocket"]
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe, words, target="prompt", space=space, normalize="none") as maps,
    ):
        call(pipe)
    positions = [[ROCKET_WORDS[word] for word in words]]
    reference = expected(pipe, calls, slice(1, 2), positions, "concept_attention", "none", space=space)
    variants.assert_close(maps.get(), reference)


def test_heads_layers_and_steps() -> None:
    pipe, words = pipeline(), ["dog", "rocket"]
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe, words, target="prompt", methods=METHODS, heads=[1, 3], layers=[0, 2], steps=[1]) as maps,
    ):
        call(pipe, num_inference_steps=3)
    positions, rule = [[ROCKET_WORDS[word] for word in words]], naive.listed_heads([1, 3])
    for method in METHODS:
        reference = expected(pipe, calls[1:2], slice(1, 2), positions, method, DEFAULTS[method], rule, layers=(0, 2))
        variants.assert_close(maps.get(method), reference)
        assert maps.coverage[method].nonzero().tolist() == [[1, 0], [1, 2]]


def test_one_word_has_no_softmax() -> None:
    """Also where it is found out only when the prompt is known."""
    pipe = pipeline()
    for concepts in (["dog"], None):
        with tiny.recorded_calls(pipe.transformer) as calls, dcm.trace(pipe, concepts, target="prompt") as maps:
            call(pipe, "dog")
            variants.assert_close(maps.get(), expected(pipe, calls, slice(1, 2), [[[0]]], "concept_attention", "none"))
            assert maps.metadata["methods"]["concept_attention"]["normalize"] == "none"
            if concepts is None:
                call(pipe, "dog sky")
                assert maps.metadata["methods"]["concept_attention"]["normalize"] == "softmax"


def test_a_softmax_that_was_asked_for_is_refused_for_one_word() -> None:
    """As for concepts, and as soon as it can be known."""
    message = "^a softmax over a single concept is 1 everywhere; add a concept or use 'zscore'$"
    with dcm.trace(pipeline(), target="prompt", normalize="softmax") as maps:
        call(pipeline(), "dog sky")
        two_words = maps.get().clone()
        with pytest.raises(dcm.ConceptMapsValueError, match=message):
            call(pipeline(), "dog")
    torch.testing.assert_close(two_words.sum(1), torch.ones(1, *tiny.GRID))
    with (
        pytest.raises(dcm.ConceptMapsValueError, match=message),
        dcm.trace(pipeline(), target="prompt", prompt_tokens={"dog": [0]}, normalize="softmax"),
    ):
        pass


def test_negative_prompts_and_another_length() -> None:
    pipe = pipeline()
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe, ["running", "red"], target="prompt") as maps,
    ):
        call(pipe, negative_prompt="running dog sky", max_sequence_length=10)
    assert calls[0]["encoder_hidden_states"].shape[1] == 10
    reference = expected(pipe, calls, slice(1, 2), [[[7, 8], [1]]], "concept_attention", "softmax")
    variants.assert_close(maps.get(), reference)


@pytest.mark.parametrize(
    ("prompt", "word", "length"),
    [
        (ROCKET, "running", 9),  # the last token that is left is the end mark
        (ROCKET, "running", 8),  # half a word is none
        (ROCKET, "running", 7),
        (ROCKET, "dog", 7),
        (ROCKET, "dog", 3),
        (REPEATED, "dog", 4),  # not all of its occurrences are left
    ],
)
def test_words_that_are_cut_off(prompt: str, word: str, length: int) -> None:
    with (
        pytest.raises(dcm.ConceptMapsError, match=f"'{word}' lies beyond the {length} tokens.*max_sequence_length"),
        dcm.trace(pipeline(), [word], target="prompt"),
    ):
        call(pipeline(), prompt, max_sequence_length=length)


def test_the_last_word_that_is_not_cut_off() -> None:
    pipe = pipeline()
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe, ["dog", "the"], target="prompt") as maps,
    ):
        call(pipe, max_sequence_length=8)
    reference = expected(pipe, calls, slice(1, 2), [[[6], [5]]], "concept_attention", "softmax")
    variants.assert_close(maps.get(), reference)


def test_a_pipeline_that_returns_maps() -> None:
    pipe = pipeline()
    mixed, words = dcm.with_concept_maps(pipe), ["dog", "rocket"]
    with dcm.trace(pipe, words, target="prompt") as maps:
        frames = call(pipe)
    out = mixed(
        ROCKET, concepts=words, target="prompt", num_inference_steps=2, guidance_scale=4.0, output_type="latent",
        max_sequence_length=tiny.TEXT_LENGTH, generator=torch.Generator().manual_seed(7), **tiny.SIZE,
    )  # fmt: skip
    assert torch.equal(out.frames, frames)
    assert torch.equal(out.concept_maps.get(), maps.get())
    assert "encode_prompt" not in mixed.__dict__


def test_a_pipeline_that_returns_maps_of_all_words() -> None:
    mixed = dcm.with_concept_maps(pipeline())
    out = mixed(
        ROCKET, target="prompt", num_inference_steps=1, guidance_scale=4.0, output_type="latent",
        max_sequence_length=tiny.TEXT_LENGTH, **tiny.SIZE,
    )  # fmt: skip
    assert out.concept_maps.concepts == tuple(ROCKET_WORDS)


def test_fused_projections() -> None:
    pipe = tiny.make_pipeline()
    pipe.register_modules(tokenizer=make_tokenizer(), text_encoder=pipeline().text_encoder)
    tensors = []
    for fused in (False, True):
        if fused:
            pipe.transformer.fuse_qkv_projections()
        with dcm.trace(pipe, ["dog", "rocket"], target="prompt") as maps:
            call(pipe)
        tensors.append(maps.get())
    torch.testing.assert_close(*tensors, rtol=1e-4, atol=1e-5)


def test_save_and_load(tmp_path: Path) -> None:
    with dcm.trace(pipeline(), target="prompt", methods=METHODS) as maps:
        call(pipeline())
    maps.save(tmp_path / "words.safetensors")
    loaded = dcm.load(tmp_path / "words.safetensors")
    assert loaded.concepts == tuple(ROCKET_WORDS)
    assert loaded.metadata == maps.metadata
    for method in METHODS:
        assert torch.equal(loaded.get(method), maps.get(method))
        assert torch.equal(loaded.coverage[method], maps.coverage[method])
    assert torch.equal(loaded["rocket"].tensor, maps["rocket"].tensor)


def test_prompt_tokens_with_prompt_embeds() -> None:
    """Padding may be a target when it is asked for by position."""
    pipe = pipeline()
    positive, negative = pipe.encode_prompt(
        [ROCKET, QUOTED], "", do_classifier_free_guidance=True, max_sequence_length=tiny.TEXT_LENGTH
    )
    tables = {"dog": [6], "padding": [11], "rocket": [2, 3]}
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe, target="prompt", prompt_tokens=tables, methods=METHODS) as maps,
    ):
        call(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative)
    assert maps.concepts == tuple(tables)
    for method in METHODS:
        reference = expected(pipe, calls, slice(2, 4), [list(tables.values())] * 2, method, DEFAULTS[method])
        variants.assert_close(maps.get(method), reference)


def test_prompt_tokens_of_some_words_in_another_order() -> None:
    pipe, tables = pipeline(), {"dog": [6], "red": [1], "rocket": [3, 2, 2]}  # named twice, counted once
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe, ["rocket", "dog"], target="prompt", prompt_tokens=tables, normalize="none") as maps,
    ):
        call(pipe)
    assert maps.concepts == ("rocket", "dog")
    reference = expected(pipe, calls, slice(1, 2), [[[2, 3], [6]]], "concept_attention", "none")
    variants.assert_close(maps.get(), reference)


def test_prompt_tokens_of_a_bare_transformer() -> None:
    pipe, tables = pipeline(), {"dog": [6], "rocket": [2, 3]}
    with (
        tiny.recorded_calls(pipe.transformer) as calls,
        dcm.trace(pipe.transformer, target="prompt", prompt_tokens=tables, normalize="none") as maps,
    ):
        call(pipe)
    reference = expected(pipe, calls, slice(0, 2), [[[6], [2, 3]]] * 2, "concept_attention", "none")
    variants.assert_close(maps.get(), reference)


def test_a_position_beyond_the_text() -> None:
    with (
        pytest.raises(dcm.ConceptMapsError, match="prompt_tokens has token 10 for 'dog'; .*10 tokens, 0 to 9"),
        dcm.trace(pipeline(), target="prompt", prompt_tokens={"red": [1], "dog": [2, 10]}),
    ):
        call(pipeline(), max_sequence_length=10)


def test_prompt_embeds_without_positions() -> None:
    """Also after a run whose prompt was known."""
    pipe = pipeline()
    positive, negative = pipe.encode_prompt(ROCKET, "", max_sequence_length=tiny.TEXT_LENGTH)
    with dcm.trace(pipe, ["dog"], target="prompt"):
        call(pipe)
        with pytest.raises(dcm.ConceptMapsError, match="was given prompt_embeds; pass prompt_tokens"):
            call(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative)


def test_a_word_that_only_one_prompt_has() -> None:
    with (
        pytest.raises(dcm.ConceptMapsError, match="'red' is not a word of the prompt 'the \"dog\""),
        dcm.trace(pipeline(), ["red"], target="prompt"),
    ):
        call(pipeline(), [ROCKET, QUOTED])


@pytest.mark.parametrize("prompt", ["", " ... "])
def test_a_prompt_without_words(prompt: str) -> None:
    with (
        pytest.raises(dcm.ConceptMapsError, match="has no words"),
        dcm.trace(pipeline(), target="prompt"),
    ):
        call(pipeline(), prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "words"}, "unknown target 'words'; expected one of concepts, prompt"),
        ({"branch": "uncond"}, "branch is 'uncond', but only the conditional branch has the words"),
        ({"branch": "both"}, "branch is 'both', but only the conditional branch has the words"),
        ({"concept_embeds": torch.zeros(1, 32)}, "target='prompt' reads the prompt's own tokens"),
        ({"prompt_tokens": {"dog": []}}, "no token of 'dog's"),
        ({"prompt_tokens": {"dog": [-1]}}, "token of 'dog' -1 is out of range"),
        ({"prompt_tokens": {}}, "no concepts"),
        ({"prompt_tokens": {"dog": [1]}, "concepts": ["cat"]}, "prompt_tokens has no positions of .'cat'."),
        ({"prompt_tokens": {"dog": [1]}, "target": "concepts"}, "pass target='prompt' with them"),
        ({"concepts": []}, "no concepts"),
        ({"concepts": "dog"}, "concepts is the string 'dog'"),
        ({"reads": "image"}, "reads is 'image'"),
        (
            {"token_policy": "first"},
            "^token_policy is 'first', but .* words of the prompt are the targets; leave it out",
        ),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    processors = pipeline().transformer.attn_processors
    with (
        pytest.raises(dcm.ConceptMapsError, match=message),
        dcm.trace(pipeline(), **{"target": "prompt", **options}),
    ):
        pass
    assert pipeline().transformer.attn_processors == processors
    assert "encode_prompt" not in pipeline().__dict__


def test_a_bare_transformer_has_no_tokenizer() -> None:
    with (
        pytest.raises(dcm.ConceptMapsError, match="a bare transformer has no tokenizer; pass prompt_tokens"),
        dcm.trace(pipeline().transformer, ["dog"], target="prompt"),
    ):
        pass
