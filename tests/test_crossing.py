"""Cross-attention in the core, on Wan: what it refuses, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from backbones import tiny_wan
from backbones._oracle import embeds_of, kept_state
from backbones.test_contract import output_of

import diffusers_concept_maps as dcm
from diffusers_concept_maps.parity import CONCEPT_ATTENTION, IMAP

METHODS = ("cross_attention", "gramcol", "imap")
IMAGE_TO_VIDEO = next(case for case in tiny_wan.CASES if case.name == "Wan image-to-video")


def test_layers_that_are_not_read_are_left_alone() -> None:
    transformer, inputs = tiny_wan.make_transformer(), tiny_wan.inputs(1, 5, 1)
    projected: list[int] = []
    for layer, block in enumerate(transformer.blocks):
        block.attn2.to_k.register_forward_hook(lambda *_, layer=layer: projected.append(layer))
    with dcm.trace(transformer, concept_embeds=embeds_of(IMAGE_TO_VIDEO), methods=METHODS, layers=[1]) as maps:
        output_of(transformer, inputs)
    assert projected == [0, 1, 1, 2]  # the text's keys, and those of the concepts once
    assert maps.coverage["imap"].tolist() == [[False, True, False]]


def test_dropout_of_a_model_in_training_draws_for_the_concepts_apart() -> None:
    transformer, inputs = tiny_wan.make_transformer(), tiny_wan.inputs(1, 5, 1)
    for block in transformer.blocks:
        block.attn2.to_k = torch.nn.Sequential(block.attn2.to_k, torch.nn.Dropout(0.5))
    transformer.train()
    torch.manual_seed(3)
    off, random = output_of(transformer, inputs), torch.get_rng_state()
    torch.manual_seed(3)
    with dcm.trace(transformer, concept_embeds=embeds_of(IMAGE_TO_VIDEO), methods=METHODS):
        assert torch.equal(output_of(transformer, inputs), off)
    assert torch.equal(torch.get_rng_state(), random)


def refuse(message: str, what: Any, *, value: bool = True, **options: Any) -> None:
    """Attaching raises `message` and changes nothing."""
    before = kept_state(getattr(what, "transformer", what))
    error = dcm.ConceptMapsValueError if value else dcm.ConceptMapsError
    with pytest.raises(error, match=message), dcm.trace(what, **({"methods": METHODS} | options)):
        raise AssertionError("attached")
    assert kept_state(getattr(what, "transformer", what)) == before


EMBEDS = {"concept_embeds": torch.zeros(2, tiny_wan.WIDTH)}
PROMPT = {"target": "prompt", "prompt_tokens": {"dog": [1], "sky": [2]}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"methods": ["concept_attention"], **EMBEDS},
            "^method 'concept_attention' compares what concepts have read, and text reads nothing in "
            "WanTransformer3DModel: its blocks have cross-attention; use cross_attention, gramcol, imap$",
        ),
        (
            {"reads": "image", **EMBEDS},
            "^reads is 'image', but concepts read nothing in WanTransformer3DModel, whose blocks have",
        ),
        (
            {"parity": "imap", **EMBEDS},
            "^parity='imap' has words of the prompt alone where blocks have cross-attention, as those of Wan.*; use "
            "target='prompt'$",
        ),
        (
            {"parity": CONCEPT_ATTENTION, **PROMPT},
            "^parity='concept_attention' reproduces code for joint attention, and the blocks of Wan.* leave it out$",
        ),
        (
            {"parity": replace(IMAP, crossing={"imap": IMAP.crossing["imap"]}), **PROMPT},
            "^parity='imap' has no method 'cross_attention'; its methods are imap$",
        ),
    ],
)
def test_what_cross_attention_has_not(options: dict[str, Any], message: str) -> None:
    refuse(message, tiny_wan.make_transformer(), **options)


def test_one_pass_has_nothing_to_join() -> None:
    refuse("one_pass", tiny_wan.make_transformer(), value=False, attention="one_pass", **EMBEDS)


def test_two_transformers_that_differ() -> None:
    pipe = tiny_wan.make_two()
    pipe.register_modules(transformer_2=tiny_wan.make_transformer(num_layers=2))
    message = "^transformer_2 has 2 layers of 4 heads, transformer has 3 of 4; expected two that are alike. Trace one"
    refuse(message, pipe, value=False, **EMBEDS)


def test_a_prompt_that_attention_does_not_read_as_a_whole() -> None:
    transformer, inputs = IMAGE_TO_VIDEO.make(), IMAGE_TO_VIDEO.inputs(1, 513, 1)
    message = (
        "^the transformer takes 513 text tokens and its attention reads the last 512 of them, so that the words of "
        "the prompt cannot be told; use max_sequence_length=512$"
    )
    with pytest.raises(dcm.ConceptMapsError, match=message), dcm.trace(transformer, methods=METHODS, **PROMPT):
        output_of(transformer, inputs)


def test_attention_outside_of_its_block() -> None:
    transformer, inputs = tiny_wan.make_transformer(), tiny_wan.inputs(1, 5, 1)
    attention = transformer.blocks[1].attn2
    transformer.blocks[0].register_forward_hook(lambda block, args, output: attention(output, args[1], None, None))
    capture = dcm.trace(transformer, methods=METHODS, **EMBEDS)
    with pytest.raises(dcm.ConceptMapsError, match="^an attention module ran outside of its block"), capture:
        output_of(transformer, inputs)
