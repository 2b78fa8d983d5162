"""Processors that are replaced while a pipeline is guided: an error where nothing would be cut, and else nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from test_undo import assert_same, snapshot

import diffusers_concept_maps as dcm


def call(pipe: Any) -> torch.Tensor:
    return tiny.call(pipe, "a red dog")


def test_processors_of_guided_layers_that_are_replaced() -> None:
    pipe = tiny.make_random_pipeline()
    stock, message = call(pipe), r"guided layers \[1\] were replaced by CogVideoXAttnProcessor2_0, which cuts nothing"
    with dcm.cross_attention_guidance(pipe, layers=[1]):
        expected = call(pipe)
        pipe.transformer.transformer_blocks[0].attn1.processor = CogVideoXAttnProcessor2_0()
        assert torch.equal(call(pipe), expected)  # of a layer in which nothing is cut
        pipe.transformer.transformer_blocks[1].attn1.processor = CogVideoXAttnProcessor2_0()
        with pytest.raises(dcm.ConceptMapsError, match=message):
            call(pipe)
    assert torch.equal(call(pipe), stock)


def test_blocks_that_are_left_in_the_order_of_entering() -> None:
    """What `trace` puts back takes guidance along, and that is said."""
    pipe = tiny.make_random_pipeline()
    stock, before = call(pipe), snapshot(pipe.transformer)
    trace, guidance = dcm.trace(pipe, ["dog"]), dcm.cross_attention_guidance(pipe, layers=[1])
    trace.__enter__()
    guidance.__enter__()
    trace.__exit__(None, None, None)
    with pytest.raises(
        dcm.ConceptMapsError, match=r"were replaced by .*; .* leave blocks in the reverse of their order"
    ):
        call(pipe)
    guidance.__exit__(None, None, None)
    assert_same(pipe.transformer, before)
    assert torch.equal(call(pipe), stock)
