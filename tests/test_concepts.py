"""Concept embeddings against the text encoder's own states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox

import diffusers_concept_maps as dcm
from diffusers_concept_maps import backbones
from diffusers_concept_maps.concepts import check_concepts, check_embeds, encode_concepts

TEXTS = ["dog", "red rock", "the dog running", "on the beach"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_cogvideox.make_pipeline()


def states(pipe: Any, text: str) -> torch.Tensor:
    """States of the words of one text `[token, width]`, from token ids that are put together here."""
    words = [3 + tiny_cogvideox.WORDS.index(word) for word in text.split()]
    ids = [*words, pipe.tokenizer.eos_token_id]
    ids += [pipe.tokenizer.pad_token_id] * (tiny_cogvideox.TEXT_LENGTH - len(ids))
    with torch.no_grad():
        encoded: torch.Tensor = pipe.text_encoder(torch.tensor([ids])).last_hidden_state
    return encoded[0, : len(words)]


@pytest.mark.parametrize("policy", ["mean", "first", "last"])
def test_policies(pipe: Any, policy: str) -> None:
    expected = [
        {"mean": state.mean(0), "first": state[0], "last": state[-1]}[policy]
        for state in (states(pipe, text) for text in TEXTS)
    ]
    embeds = encode_concepts(backbones.find_backbone(pipe.transformer), pipe, TEXTS, policy)
    torch.testing.assert_close(embeds, torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert not embeds.requires_grad


def test_the_longest_concept_that_fits(pipe: Any) -> None:
    text = " ".join(["dog"] * (tiny_cogvideox.TEXT_LENGTH - 1))
    embeds = encode_concepts(backbones.find_backbone(pipe.transformer), pipe, [text], "last")
    torch.testing.assert_close(embeds[0], states(pipe, text)[-1], rtol=1e-5, atol=1e-6)


def test_a_known_word_beside_an_unknown_one(pipe: Any) -> None:
    backbone = backbones.find_backbone(pipe.transformer)
    known, mixed = (encode_concepts(backbone, pipe, [text], "first") for text in ("dog dog", "dog zebra"))
    assert not torch.equal(known, mixed)


def test_encoding_uses_no_random_numbers(pipe: Any) -> None:
    before = torch.get_rng_state()
    encode_concepts(backbones.find_backbone(pipe.transformer), pipe, TEXTS, "mean")
    assert torch.equal(torch.get_rng_state(), before)


def test_blanks_around_a_concept_do_not_count(pipe: Any) -> None:
    assert check_concepts(["  dog", "red rock \n"]) == ("dog", "red rock")
    with dcm.trace(pipe, [" dog ", "red rock"]) as maps:
        tiny_cogvideox.call(pipe)
    with dcm.trace(pipe, ["dog", "red rock"]) as clean:
        tiny_cogvideox.call(pipe)
    assert maps.concepts == ("dog", "red rock")
    assert torch.equal(maps.get(), clean.get())


def test_names_of_embeddings() -> None:
    embeds = torch.zeros(2, 3, 32)
    assert check_embeds(embeds, None, 32) == ("concept 0", "concept 1", "concept 2")
    assert check_embeds(embeds[0].bfloat16(), ("a", " b", "c"), 32) == ("a", "b", "c")


def test_given_embeddings_replace_encoding(pipe: Any) -> None:
    embeds = encode_concepts(backbones.find_backbone(pipe.transformer), pipe, TEXTS, "mean")
    with dcm.trace(pipe, TEXTS) as maps:
        tiny_cogvideox.call(pipe)
    with dcm.trace(pipe, concept_embeds=embeds) as given:
        tiny_cogvideox.call(pipe)
    assert given.concepts == ("concept 0", "concept 1", "concept 2", "concept 3")
    assert torch.equal(given.get(), maps.get())
