"""The ops against einsums in float64 that materialize everything."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from diffusers_concept_maps import ConceptMapsValueError, ops

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
@either_way
def test_gram_columns(inputs: Inputs, standardize: str) -> None:
    scores = ops.gram_columns(
        inputs.image_query, inputs.concept_key, inputs.image_output, WEIGHTS, FRAMES, standardize=standardize
    )
    assert_close(scores, join(gram_maps(inputs), WEIGHTS, standardize))


@pytest.mark.parametrize("frames", [1, TOKENS])
def test_gram_columns_of_one_frame_and_of_one_token_per_frame(frames: int) -> None:
    inputs = Inputs(2)
    query, feature = inputs.image_query.double(), inputs.image_output.double()
    scores = ops.gram_columns(inputs.image_query, inputs.concept_key, inputs.image_output, WEIGHTS, frames)
    if frames == 1:
        anchor = dots(inputs.concept_key, query).argmax(-1)
        column = feature.gather(2, anchor[..., None].expand(-1, -1, -1, WIDTH))
        maps = torch.einsum("rhcd,rhnd->rhcn", column, feature)
    else:
        maps = feature.square().sum(-1)[:, :, None].expand(-1, -1, 2, -1)
    assert_close(scores, join(maps, WEIGHTS, False))


def test_the_first_of_equal_anchors_is_taken() -> None:
    query = torch.zeros(1, 1, 6, 2)
    query[0, 0, [1, 2], 0] = 1.0  # in the first frame of three tokens; in the second all three are equal
    feature = torch.tensor([[2.0, 0.0], [3.0, 0.0], [5.0, 0.0], [7.0, 0.0], [11.0, 0.0], [13.0, 0.0]])[None, None]
    key = torch.tensor([1.0, 0.0])[None, None, None]
    scores = ops.gram_columns(query, key, feature, torch.ones(1, 1), 2)
    assert scores[0, 0].tolist() == [6.0, 9.0, 15.0, 49.0, 77.0, 91.0]


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_constant_map_is_zero_when_standardized(value: float) -> None:
    output = torch.full((ROWS, HEADS, TOKENS, WIDTH), value)
    concept = torch.ones(ROWS, HEADS, 2, WIDTH)
    scores = ops.output_similarity(concept, output, torch.ones(ROWS, HEADS), standardize="clip")
    assert torch.equal(scores, torch.zeros(ROWS, 2, TOKENS))


def test_inputs_are_left_alone() -> None:
    inputs, twin = Inputs(2), Inputs(2)
    weights = WEIGHTS.clone()
    ops.output_similarity(inputs.concept_output, inputs.image_output, weights, standardize="clip")
    ops.query_key_similarity(inputs.image_query, inputs.concept_key, weights)
    ops.gram_columns(inputs.image_query, inputs.concept_key, inputs.image_output, weights, FRAMES)
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


@pytest.mark.parametrize("op", ["output_similarity", "query_key_similarity", "gram_columns"])
def test_scores_refuse(op: str) -> None:
    def score(concept: tuple[int, ...], weights: tuple[int, ...]) -> Any:
        concepts, image = torch.zeros(concept), torch.zeros(2, 3, 21, 8)
        if op == "output_similarity":
            return ops.output_similarity(concepts, image, torch.ones(weights))
        if op == "query_key_similarity":
            return ops.query_key_similarity(image, concepts, torch.ones(weights))
        return ops.gram_columns(image, concepts, image, torch.ones(weights), 3)

    with pytest.raises(
        ConceptMapsValueError, match=rf"^the concept tensor has shape .*expected {_text((2, 3, 4, 8))}$"
    ):
        score((1, 3, 4, 8), (2, 3))
    with pytest.raises(ConceptMapsValueError, match=rf"^head_weights has shape \(3,\); expected {_text((2, 3))}$"):
        score((2, 3, 4, 8), (3,))


def test_gram_columns_refuses() -> None:
    image, concept, weights = torch.zeros(2, 3, 21, 8), torch.zeros(2, 3, 4, 8), torch.ones(2, 3)
    with pytest.raises(ConceptMapsValueError, match=rf"^image_output has shape {_text((2, 3, 21, 4))}; expected"):
        ops.gram_columns(image, concept, image[..., :4], weights, 3)
    with pytest.raises(ConceptMapsValueError, match="frames is 4, which does not divide the 21 image tokens"):
        ops.gram_columns(image, concept, image, weights, 4)


def test_frame_separability_refuses() -> None:
    with pytest.raises(ConceptMapsValueError, match="frames is 1; separability compares frames and needs at least 2"):
        ops.frame_separability(torch.zeros(2, 3, 21, 8), 1)
    with pytest.raises(ConceptMapsValueError, match="frames is 4, which does not divide the 21 image tokens"):
        ops.frame_separability(torch.zeros(2, 3, 21, 8), 4)


def _text(shape: tuple[int, ...]) -> str:
    return str(shape).replace("(", r"\(").replace(")", r"\)")
