"""The ops against einsums in float64 that materialize everything."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from diffusers_concept_maps import ConceptMapsValueError, ops, reference

ROWS, HEADS, FRAMES, PLACES, WIDTH, TEXT = 2, 3, 3, 7, 8, 5
TOKENS = FRAMES * PLACES
TOLERANCE = 2e-5  # of the largest value; scores are float32, whatever goes in
OWN_DTYPE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # concept attention stays in its dtype
WEIGHTS = torch.tensor([[0.5, 0.0, 2.0], [1.0, 1.0, 0.0]])


class Inputs:
    """Random inputs; image tensors are slices of a buffer `[R, TEXT + N, H D]`, as an attention processor has them."""

    def __init__(self, concepts: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        random = partial(torch.randn, generator=generator)

        def image() -> torch.Tensor:
            joint = random(ROWS, TEXT + TOKENS, HEADS * WIDTH).to(dtype)
            return joint.view(ROWS, -1, HEADS, WIDTH).transpose(1, 2)[:, :, TEXT:]

        def concept() -> torch.Tensor:
            return random(ROWS, HEADS, concepts, WIDTH).to(dtype)

        self.image_query, self.image_key, self.image_value, self.image_output = image(), image(), image(), image()
        self.concept_query, self.concept_key = concept(), concept()
        self.concept_value, self.concept_output = concept(), concept()
        assert not self.image_query.is_contiguous()


def join(maps: torch.Tensor, weights: torch.Tensor, standardize: str) -> torch.Tensor:
    """Weighted sum over heads of `[R, H, C, N]`, each standardized first if asked for."""
    if standardize == "clip":
        maps = (maps - maps.mean(-1, keepdim=True)) / maps.std(-1, correction=0, keepdim=True)
    return torch.einsum("rhcn,rh->rcn", maps, weights.double())


def dots(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.einsum("rhcd,rhnd->rhcn", left.double(), right.double())


def gram_maps(inputs: Inputs) -> torch.Tensor:
    """Gram-matrix columns `[R, H, C, N]`; a near tie must not decide between two of them."""
    logits = dots(inputs.concept_key, inputs.image_query).unflatten(3, (FRAMES, PLACES))
    best, second = logits.topk(2).values.unbind(-1)
    assert (best - second).min() > 1e-4 * logits.abs().max()
    feature = inputs.image_output.double().unflatten(2, (FRAMES, PLACES))
    gram = torch.einsum("rhfpd,rhfqd->rhfpq", feature, feature)
    anchor = torch.nn.functional.one_hot(logits.argmax(-1), PLACES).double()  # [R, H, C, F, P]
    return torch.einsum("rhcfp,rhfpq->rhcfq", anchor, gram).flatten(3)


def assert_close(scores: torch.Tensor, expected: torch.Tensor) -> None:
    assert scores.dtype == torch.float32
    assert scores.shape == expected.shape
    assert (scores - expected).abs().max() <= TOLERANCE * expected.abs().max()


every_input = pytest.mark.parametrize(
    "inputs",
    [
        pytest.param(Inputs(concepts, dtype), id=f"{concepts}-{dtype}")
        for concepts in (1, 4)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ],
)


def gram_columns(inputs: Inputs, frames: int, **options: Any) -> torch.Tensor:
    index, _, _ = ops.query_key_argmax(inputs.image_query, inputs.concept_key, frames)
    return ops.gram_columns(inputs.image_output, index, WEIGHTS, **options)


either_way = pytest.mark.parametrize("standardize", ["none", "clip"])


@every_input
def test_concept_attention(inputs: Inputs) -> None:
    key = torch.cat([inputs.concept_key, inputs.image_key], 2)
    value = torch.cat([inputs.concept_value, inputs.image_value], 2)
    weights = (dots(inputs.concept_query, key) / math.sqrt(WIDTH)).softmax(-1)
    expected = torch.einsum("rhcn,rhnd->rhcd", weights, value.double())
    output = ops.concept_attention(
        inputs.concept_query, inputs.concept_key, inputs.concept_value, inputs.image_key, inputs.image_value
    )
    assert output.dtype == inputs.concept_query.dtype
    assert output.shape == expected.shape
    assert (output - expected).abs().max() <= OWN_DTYPE[output.dtype] * expected.abs().max()


@every_input
@either_way
def test_output_similarity(inputs: Inputs, standardize: str) -> None:
    maps = dots(inputs.concept_output, inputs.image_output)
    scores = ops.output_similarity(inputs.concept_output, inputs.image_output, WEIGHTS, standardize=standardize)
    assert_close(scores, join(maps, WEIGHTS, standardize))


@every_input
@either_way
def test_query_key_similarity(inputs: Inputs, standardize: str) -> None:
    maps = dots(inputs.concept_key, inputs.image_query) / math.sqrt(WIDTH)
    scores = ops.query_key_similarity(inputs.image_query, inputs.concept_key, WEIGHTS, standardize=standardize)
    assert_close(scores, join(maps, WEIGHTS, standardize))


@every_input
def test_query_key_similarity_without_scale(inputs: Inputs) -> None:
    maps = dots(inputs.concept_key, inputs.image_query)
    scores = ops.query_key_similarity(inputs.image_query, inputs.concept_key, WEIGHTS, scaled=False)
    assert_close(scores, join(maps, WEIGHTS, "none"))


@every_input
def test_query_key_argmax(inputs: Inputs) -> None:
    logits = dots(inputs.concept_key, inputs.image_query).unflatten(3, (FRAMES, PLACES)) / math.sqrt(WIDTH)
    best = logits.topk(2)
    index, value, gap = ops.query_key_argmax(inputs.image_query, inputs.concept_key, FRAMES)
    assert index.dtype == torch.int64
    assert torch.equal(index, best.indices[..., 0])
    assert_close(value, best.values[..., 0])
    assert_close(gap, best.values[..., 0] - best.values[..., 1])


def test_the_only_token_of_a_frame_leads_by_any_margin() -> None:
    inputs = Inputs(2)
    index, value, gap = ops.query_key_argmax(inputs.image_query, inputs.concept_key, TOKENS)
    assert torch.equal(index, torch.zeros(ROWS, HEADS, 2, TOKENS, dtype=torch.int64))
    assert_close(value, dots(inputs.concept_key, inputs.image_query) / math.sqrt(WIDTH))
    assert torch.equal(gap, torch.full_like(value, torch.inf))


@every_input
@pytest.mark.parametrize("joint", [False, True])
def test_attention_probabilities(inputs: Inputs, joint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_CHUNK", 4)  # several chunks, the last one smaller
    tokens = torch.arange(inputs.concept_key.shape[2]).flip(0)[:3]
    keys = torch.cat([inputs.concept_key, inputs.image_key], 2) if joint else inputs.concept_key
    maps = (dots(inputs.image_query, keys) / math.sqrt(WIDTH)).softmax(-1)[..., tokens].mT
    scores = ops.attention_probabilities(
        inputs.image_query, inputs.concept_key, tokens, WEIGHTS, inputs.image_key if joint else None
    )
    assert_close(scores, join(maps, WEIGHTS, "none"))


@every_input
def test_accumulate_similarity(inputs: Inputs) -> None:
    maps = dots(inputs.concept_output, inputs.image_output)
    start = torch.linspace(-1, 1, maps[:, 0].numel()).view_as(maps[:, 0])
    total = start.clone()
    result = ops.accumulate_similarity_(total, inputs.concept_output, inputs.image_output, WEIGHTS, scale=-0.5)
    assert result is total
    assert_close(total, start - 0.5 * join(maps, WEIGHTS, "none"))


@every_input
def test_similarity_and_statistics(inputs: Inputs) -> None:
    scores, statistics = ops.similarity_and_statistics(inputs.concept_output, inputs.image_output, WEIGHTS, FRAMES)
    assert_close(scores, join(dots(inputs.concept_output, inputs.image_output), WEIGHTS, "none"))
    feature = inputs.image_output.double().unflatten(2, (FRAMES, PLACES))
    means = feature.mean(3, keepdim=True)
    assert statistics.tokens == TOKENS
    assert_close(statistics.mean, (means - feature.mean((2, 3), keepdim=True)).squeeze(3))
    assert_close(statistics.within, (feature - means).square().sum((2, 3, 4)))


def test_a_key_of_weight_zero_is_not_read() -> None:
    inputs = Inputs(4)
    arguments = (inputs.concept_query, inputs.concept_key, inputs.concept_value, inputs.image_key, inputs.image_value)
    weights = (dots(inputs.concept_query, inputs.image_key) / math.sqrt(WIDTH)).softmax(-1)
    expected = torch.einsum("rhcn,rhnd->rhcd", weights, inputs.image_value.double())
    output = ops.concept_attention(*arguments, multiplicity=torch.zeros(4))
    assert (output - expected).abs().max() <= OWN_DTYPE[output.dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_concept_attention_under_autocast(dtype: torch.dtype) -> None:
    inputs = Inputs(3, dtype)
    arguments = [inputs.concept_query, inputs.concept_key, inputs.concept_value, inputs.image_key, inputs.image_value]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ops.concept_attention(*arguments)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, ops.concept_attention(*(tensor.bfloat16() for tensor in arguments)))


@every_input
@either_way
def test_gram_columns(inputs: Inputs, standardize: str) -> None:
    scores = gram_columns(inputs, FRAMES, standardize=standardize)
    assert_close(scores, join(gram_maps(inputs), WEIGHTS, standardize))


@pytest.mark.parametrize("frames", [1, TOKENS])
def test_gram_columns_of_one_frame_and_of_one_token_per_frame(frames: int) -> None:
    inputs = Inputs(2)
    query, feature = inputs.image_query.double(), inputs.image_output.double()
    scores = gram_columns(inputs, frames)
    if frames == 1:
        anchor = dots(inputs.concept_key, query).argmax(-1)
        column = feature.gather(2, anchor[..., None].expand(-1, -1, -1, WIDTH))
        maps = torch.einsum("rhcd,rhnd->rhcn", column, feature)
    else:
        maps = feature.square().sum(-1)[:, :, None].expand(-1, -1, 2, -1)
    assert_close(scores, join(maps, WEIGHTS, False))


def test_the_first_of_equal_anchors_is_taken() -> None:
    query = torch.zeros(1, 1, 6, 4)
    query[0, 0, [1, 2], 0] = 1.0  # in the first frame of three tokens; in the second all three are equal
    feature = torch.tensor([[2.0, 0.0], [3.0, 0.0], [5.0, 0.0], [7.0, 0.0], [11.0, 0.0], [13.0, 0.0]])[None, None]
    key = torch.tensor([1.0, 0.0, 0.0, 0.0])[None, None, None]
    index, value, gap = ops.query_key_argmax(query, key, 2)
    assert index.tolist() == [[[[1, 0]]]]
    assert value.tolist() == [[[[0.5, 0.0]]]]
    assert gap.tolist() == [[[[0.0, 0.0]]]]
    scores = ops.gram_columns(feature, index, torch.ones(1, 1))
    assert scores[0, 0].tolist() == [6.0, 9.0, 15.0, 49.0, 77.0, 91.0]


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_constant_map_is_zero_when_standardized(value: float) -> None:
    output = torch.full((ROWS, HEADS, TOKENS, WIDTH), value)
    concept = torch.ones(ROWS, HEADS, 2, WIDTH)
    scores = ops.output_similarity(concept, output, torch.ones(ROWS, HEADS), standardize="clip")
    assert torch.equal(scores, torch.zeros(ROWS, 2, TOKENS))


@pytest.mark.parametrize("standardize", ["none", "clip", "text"])
def test_a_head_of_weight_zero_is_not_read(standardize: str) -> None:
    """Head 1 has weight 0 in the first row, where it is not a number."""
    inputs, broken = Inputs(2), Inputs(2)
    for tensor in (broken.image_query, broken.image_output, broken.concept_key, broken.concept_output):
        tensor[0, 1] = torch.nan

    def maps(inputs: Inputs) -> list[torch.Tensor]:
        return [
            ops.output_similarity(inputs.concept_output, inputs.image_output, WEIGHTS, standardize=standardize),
            ops.query_key_similarity(inputs.image_query, inputs.concept_key, WEIGHTS, standardize=standardize),
            gram_columns(inputs, FRAMES, standardize=standardize),
            ops.attention_probabilities(inputs.image_query, inputs.concept_key, torch.tensor([1]), WEIGHTS),
        ]

    for actual, expected in zip(maps(broken), maps(inputs), strict=True):
        assert torch.equal(actual, expected)


def test_inputs_are_left_alone() -> None:
    inputs, twin = Inputs(2), Inputs(2)
    weights = WEIGHTS.clone()
    ops.output_similarity(inputs.concept_output, inputs.image_output, weights, standardize="clip")
    ops.query_key_similarity(inputs.image_query, inputs.concept_key, weights)
    index, _, _ = ops.query_key_argmax(inputs.image_query, inputs.concept_key, FRAMES)
    found = index.clone()
    ops.gram_columns(inputs.image_output, index, weights)
    assert torch.equal(index, found)
    ops.frame_separability(inputs.image_output, FRAMES)
    assert torch.equal(weights, WEIGHTS)
    assert all(torch.equal(tensor, vars(twin)[name]) for name, tensor in vars(inputs).items())


def attend(**changed: torch.Tensor) -> None:
    arguments = {name: torch.zeros(2, 3, 4, 8) for name in ("query", "key", "value")}
    arguments |= {name: torch.zeros(2, 3, 21, 8) for name in ("image_key", "image_value")}
    ops.concept_attention(**(arguments | changed))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("key", (2, 3, 5, 8), (2, 3, 4, 8)),
        ("value", (2, 3, 4, 7), (2, 3, 4, 8)),
        ("image_value", (2, 3, 20, 8), (2, 3, 21, 8)),
    ],
)
def test_concept_attention_refuses(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    with pytest.raises(ConceptMapsValueError, match=rf"^{name} has shape {_text(shape)}; expected {_text(expected)}$"):
        attend(**{name: torch.zeros(shape)})


def test_concept_attention_refuses_other_heads() -> None:
    image = torch.zeros(2, 5, 21, 8)
    message = rf"^image_key has shape {_text((2, 5, 21, 8))}; expected {_text((2, 3, 21, 8))}$"
    with pytest.raises(ConceptMapsValueError, match=message):
        attend(image_key=image, image_value=image)


def test_concept_attention_refuses_other_weights() -> None:
    with pytest.raises(ConceptMapsValueError, match=r"^multiplicity has shape \(5,\); expected \(4,\)$"):
        attend(multiplicity=torch.ones(5))


@pytest.mark.parametrize("op", ["output_similarity", "query_key_similarity", "attention_probabilities"])
def test_scores_refuse(op: str) -> None:
    def score(concept: tuple[int, ...], weights: tuple[int, ...]) -> Any:
        concepts, image = torch.zeros(concept), torch.zeros(2, 3, 21, 8)
        if op == "output_similarity":
            return ops.output_similarity(concepts, image, torch.ones(weights))
        if op == "query_key_similarity":
            return ops.query_key_similarity(image, concepts, torch.ones(weights))
        return ops.attention_probabilities(image, concepts, torch.tensor([0]), torch.ones(weights))

    with pytest.raises(
        ConceptMapsValueError, match=rf"^the concept tensor has shape .*expected {_text((2, 3, 4, 8))}$"
    ):
        score((1, 3, 4, 8), (2, 3))
    with pytest.raises(ConceptMapsValueError, match=rf"^head_weights has shape \(3,\); expected {_text((2, 3))}$"):
        score((2, 3, 4, 8), (3,))


def test_query_key_argmax_refuses() -> None:
    image = torch.zeros(2, 3, 21, 8)
    with pytest.raises(
        ConceptMapsValueError, match=rf"^the concept tensor has shape .*; expected {_text((2, 3, 4, 8))}$"
    ):
        ops.query_key_argmax(image, torch.zeros(2, 1, 4, 8), 3)
    with pytest.raises(ConceptMapsValueError, match="frames is 4, which does not divide the 21 image tokens"):
        ops.query_key_argmax(image, torch.zeros(2, 3, 4, 8), 4)


def test_gram_columns_refuses() -> None:
    image, index, weights = torch.zeros(2, 3, 21, 8), torch.zeros(2, 3, 4, 3, dtype=torch.int64), torch.ones(2, 3)
    with pytest.raises(ConceptMapsValueError, match=rf"^index has shape .*; expected {_text((2, 3, 4, 3))}$"):
        ops.gram_columns(image, index[:, :1], weights)
    with pytest.raises(ConceptMapsValueError, match=rf"^head_weights has shape .*; expected {_text((2, 3))}$"):
        ops.gram_columns(image, index, weights[:1])
    with pytest.raises(ConceptMapsValueError, match="frames is 3, which does not divide the 20 image tokens"):
        ops.gram_columns(image[:, :, :20], index, weights)
    with pytest.raises(ConceptMapsValueError, match=r"^multiplicity has shape \(3,\); expected \(4,\)$"):
        ops.gram_columns(image, index, weights, standardize="text", multiplicity=torch.ones(3))
    with pytest.raises(ConceptMapsValueError, match="standardize is 'frame'; expected 'none', 'clip' or 'text'"):
        ops.gram_columns(image, index, weights, standardize="frame")


def test_one_row_has_no_deviation_over_the_text() -> None:
    image, text, weights = torch.ones(2, 3, 21, 8), torch.ones(2, 3, 1, 8), torch.ones(2, 3)
    with pytest.raises(
        ConceptMapsValueError, match="standardize is 'text' over 1 concepts; a deviation needs at least"
    ):
        ops.output_similarity(text, image, weights, standardize="text")
    alone = ops.output_similarity(text, image, weights, standardize="text", multiplicity=torch.tensor([9.0]))
    assert torch.equal(alone, torch.zeros(2, 1, 21))


def test_attention_probabilities_refuses() -> None:
    image, text, weights = torch.zeros(2, 3, 21, 8), torch.zeros(2, 3, 4, 8), torch.ones(2, 3)
    with pytest.raises(ConceptMapsValueError, match=rf"^image_key has shape .*; expected {_text((2, 3, 21, 8))}$"):
        ops.attention_probabilities(image, text, torch.tensor([0]), weights, image[:, :, 1:])
    with pytest.raises(ConceptMapsValueError, match=r"^tokens are torch.int32 \(1,\); expected torch.int64 \[C\]$"):
        ops.attention_probabilities(image, text, torch.tensor([0], dtype=torch.int32), weights)
    with pytest.raises(ConceptMapsValueError, match=r"^tokens are torch.int64 \(\); expected torch.int64 \[C\]$"):
        ops.attention_probabilities(image, text, torch.tensor(0), weights)


def test_accumulate_similarity_refuses() -> None:
    image, concept, weights = torch.zeros(2, 3, 21, 8), torch.zeros(2, 3, 4, 8), torch.ones(2, 3)
    with pytest.raises(ConceptMapsValueError, match=rf"^total has shape .*; expected {_text((2, 4, 21))}$"):
        ops.accumulate_similarity_(torch.zeros(2, 4, 20), concept, image, weights)
    with pytest.raises(ConceptMapsValueError, match=r"^total is torch.bfloat16; expected torch.float32"):
        ops.accumulate_similarity_(torch.zeros(2, 4, 21, dtype=torch.bfloat16), concept, image, weights)


def test_frame_separability_refuses() -> None:
    with pytest.raises(ConceptMapsValueError, match="frames is 1; separability compares frames and needs at least 2"):
        ops.frame_separability(torch.zeros(2, 3, 21, 8), 1)
    with pytest.raises(ConceptMapsValueError, match="frames is 4, which does not divide the 21 image tokens"):
        ops.frame_separability(torch.zeros(2, 3, 21, 8), 4)
    with pytest.raises(ConceptMapsValueError, match="frames is 1; separability compares frames and needs at least 2"):
        ops.similarity_and_statistics(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 21, 8), torch.ones(2, 3), 1)


def _text(shape: tuple[int, ...]) -> str:
    return str(shape).replace("(", r"\(").replace(")", r"\)")
