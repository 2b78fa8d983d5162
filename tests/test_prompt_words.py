"""Which tokens of a prompt a word is, and how the pipeline is listened to for the prompt and let go again."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from hypothesis import given
from hypothesis import strategies as st
from subwords import QUOTED, QUOTED_WORDS, REPEATED, ROCKET, ROCKET_WORDS, call, make_tokenizer, pipeline
from transformers import ByT5Tokenizer

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones.cogvideox import BACKBONE
from diffusers_concept_maps.prompt import PromptTokens
from diffusers_concept_maps.tokens import find_tokens, spans_inside, token_spans, words_of


def tokens_of(prompt: str, word: str, length: int = 64) -> list[list[int]]:
    return find_tokens(token_spans(make_tokenizer(), prompt, length), prompt, word)


def test_the_test_tokenizer_splits_words() -> None:
    tokens = make_tokenizer().convert_ids_to_tokens(make_tokenizer()(ROCKET).input_ids)
    assert tokens == ["▁a", "▁red", "▁rock", "et", ",", "▁the", "▁dog", "▁run", "ning", "</s>"]


@pytest.mark.parametrize(("prompt", "words"), [(ROCKET, ROCKET_WORDS), (QUOTED, QUOTED_WORDS)])
def test_tokens_of_words(prompt: str, words: dict[str, list[int]]) -> None:
    assert words_of(prompt) == tuple(words)
    for word, positions in words.items():
        assert tokens_of(prompt, word) == [positions]


@pytest.mark.parametrize(
    ("prompt", "word", "positions"),
    [
        (REPEATED, "dog", [[0], [3]]),  # not the beginning of "dogs"
        (REPEATED, "dogs", [[1, 2]]),
        (REPEATED, "rock", [[7]]),
        (REPEATED, "rockets", [[4, 5, 6]]),
        (REPEATED, "dogs dog", [[1, 2, 3]]),
        ("the dog (dog), dog", "dog", [[1], [4], [7]]),  # another token within brackets
        ("a red\n rocket", "red rocket", [[1, 2, 3]]),
        ("red red red", "red red", [[0, 1]]),  # as any search: the second one overlaps
        ("dog-dog", "dog", [[0], [2]]),
        ("the_dog", "dog", [[2]]),
        ("\U0001f415 dog \u00e9\U0001f415 dog", "dog", [[2], [5]]),  # characters of several bytes
    ],
)
def test_tokens_of_hard_cases(prompt: str, word: str, positions: list[list[int]]) -> None:
    assert tokens_of(prompt, word) == positions


def test_unknown_words_are_told_apart() -> None:
    """Both are `<unk>`; only the text knows which is which."""
    tokenizer, prompt = tiny.make_tokenizer(), "a zebra on the moon"
    spans = token_spans(tokenizer, prompt, tiny.TEXT_LENGTH)
    assert find_tokens(spans, prompt, "zebra") == [[1]]
    assert find_tokens(spans, prompt, "moon") == [[4]]
    with pytest.raises(dcm.ConceptMapsError, match="'unicorn' is not a word of the prompt"):
        find_tokens(spans, prompt, "unicorn")


@pytest.mark.parametrize("word", ["cat", "roc", "ocket", "Dog", "run", "rocket, dog", "dog dog"])
def test_what_is_no_word_of_the_prompt(word: str) -> None:
    with pytest.raises(dcm.ConceptMapsError, match=f"'{word}' is not a word of the prompt '{ROCKET}'"):
        tokens_of(ROCKET, word)


@given(
    st.lists(st.sampled_from(["a", "the", "dog", "dogs", "rocket", "running", "zoo", "(dog)", '"dog",']), min_size=1)
)
def test_tokens_spell_their_word(parts: list[str]) -> None:
    """The tokens of every occurrence of every word, and no others, are made of the word's characters."""
    prompt = " ".join(parts)
    tokenizer = make_tokenizer()
    ids = tokenizer(prompt).input_ids
    pieces = tokenizer.convert_ids_to_tokens(ids)
    for word in words_of(prompt):
        found = tokens_of(prompt, word, 512)
        assert len(found) == [part.strip('()",') for part in parts].count(word)
        for positions in found:
            spelled = "".join("?" if pieces[i] == "<unk>" else pieces[i] for i in positions).replace("▁", "")
            assert spelled == word.replace("zoo", "?")


@given(st.text(st.sampled_from("adgo_'-. ,(\n\u2019\u00e9\u72d7\U0001f415"), max_size=30))
def test_every_word_of_a_prompt_is_found(prompt: str) -> None:
    for word in words_of(prompt):
        for positions in tokens_of(prompt, word, 512):
            assert positions


def test_words_leave_punctuation_out() -> None:
    assert words_of("A man's dog, state-of-the-art; 4 dogs (a dog) - don’t!") == (
        "A", "man's", "dog", "state-of-the-art", "4", "dogs", "a", "don’t",
    )  # fmt: skip


def test_a_tokenizer_that_knows_no_characters() -> None:
    pipe = tiny.make_pipeline()
    pipe.register_modules(tokenizer=ByT5Tokenizer())
    with pytest.raises(dcm.ConceptMapsError, match="ByT5Tokenizer does not tell which characters.*prompt_tokens"):
        token_spans(pipe.tokenizer, "a dog", 12)


def test_several_videos_of_every_prompt_follow_one_another() -> None:
    words = PromptTokens(pipeline(), BACKBONE, ("dog", "a"), None, official=True)
    words.listen()
    try:
        pipeline().encode_prompt([ROCKET, QUOTED], max_sequence_length=tiny.TEXT_LENGTH)
        rows = words.rows(4, tiny.TEXT_LENGTH, torch.device("cpu"))
        assert rows.indices is None
        assert rows.weights.argmax(2).tolist() == [[6, 0], [6, 0], [3, 8], [3, 8]]
        assert torch.equal(rows.weights.sum(2), torch.ones(4, 2))
        with pytest.raises(dcm.ConceptMapsError, match="3 videos were generated from 2 prompts"):
            words.rows(3, tiny.TEXT_LENGTH, torch.device("cpu"))
    finally:
        words.stop()
    assert "encode_prompt" not in pipeline().__dict__


@pytest.mark.parametrize(("handed", "found"), [(ROCKET, [6]), (QUOTED, [3]), (None, [3])])
def test_several_prompts_before_a_run(handed: str | None, found: list[int]) -> None:
    """The one whose embeddings the transformer is handed; the last, as guidance is batched, where they are unknown."""
    words = PromptTokens(pipeline(), BACKBONE, ("dog",), None, official=False)
    words.listen()
    try:
        states = {
            prompt: pipeline().encode_prompt(prompt, max_sequence_length=tiny.TEXT_LENGTH)[0]
            for prompt in (ROCKET, QUOTED)
        }
        text = states[handed] if handed else torch.zeros(1, tiny.TEXT_LENGTH, 32)
        rows = words.rows(1, tiny.TEXT_LENGTH, torch.device("cpu"), text)
    finally:
        words.stop()
    assert rows.indices is not None
    assert rows.indices.tolist() == found


def test_nothing_is_left_in_the_pipeline() -> None:
    pipe = pipeline()
    call(pipe)  # a run sets attributes of the pipeline's own
    before = set(pipe.__dict__)
    with dcm.trace(pipe, ["dog"], target="prompt"):
        assert "encode_prompt" in pipe.__dict__
        call(pipe)
    with pytest.raises(RuntimeError, match="stop"), dcm.trace(pipe, ["dog"], target="prompt"):  # noqa: PT012
        call(pipe)
        raise RuntimeError("stop")
    with pytest.raises(TypeError, match="unexpected"), dcm.trace(pipe, ["dog"], target="prompt"):
        pipe.encode_prompt("dog", unexpected=1)
    assert "encode_prompt" not in before
    assert set(pipe.__dict__) == before


def test_a_function_that_the_user_set_is_called_and_put_back() -> None:
    pipe, prompts = pipeline(), []

    def encode_prompt(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        prompts.append(prompt)
        return type(pipe).encode_prompt(pipe, prompt, *args, **kwargs)

    pipe.__dict__["encode_prompt"] = encode_prompt
    try:
        with dcm.trace(pipe, ["dog", "rocket"], target="prompt") as maps:
            call(pipe)
        assert pipe.__dict__["encode_prompt"] is encode_prompt
        assert prompts == [ROCKET]
        with pytest.raises(RuntimeError, match="stop"), dcm.trace(pipe, ["dog"], target="prompt"):
            raise RuntimeError("stop")
        assert pipe.__dict__["encode_prompt"] is encode_prompt
        assert maps.get().shape == (1, 2, *tiny.GRID)
    finally:
        del pipe.__dict__["encode_prompt"]


def test_a_function_that_the_user_sets_meanwhile_stays() -> None:
    pipe = pipeline()
    try:
        with dcm.trace(pipe, ["dog"], target="prompt"):
            theirs = pipe.encode_prompt = lambda *args, **kwargs: type(pipe).encode_prompt(pipe, *args, **kwargs)
        assert pipe.__dict__["encode_prompt"] is theirs
    finally:
        del pipe.__dict__["encode_prompt"]


def test_an_attachment_that_fails_listens_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no hook")

    monkeypatch.setattr(pipe.transformer, "register_forward_hook", fail)
    with pytest.raises(RuntimeError, match="no hook"), dcm.trace(pipe, ["dog"], target="prompt"):
        pass
    assert "encode_prompt" not in pipe.__dict__


def test_encode_prompt_keeps_its_signature() -> None:
    pipe = pipeline()
    stock = inspect.signature(pipe.encode_prompt)
    with dcm.trace(pipe, ["dog"], target="prompt"):
        assert inspect.signature(pipe.encode_prompt) == stock
        assert torch.equal(
            pipe.encode_prompt("dog", max_sequence_length=12)[0],
            type(pipe).encode_prompt(pipe, "dog", max_sequence_length=12)[0],
        )


def test_tokens_of_a_template_that_reach_into_the_prompt() -> None:
    spans = [(0, 3), (3, 6), (6, 8), (8, 12), (0, 0)]
    assert spans_inside(spans, 4, "abcde") == [(0, 0), (0, 2), (2, 4), (4, 5), (0, 0)]
