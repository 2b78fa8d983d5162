"""Words of the prompt in Wan, and the maps that the official code makes of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import tiny_wan
from backbones.test_contract import close, output_of
from backbones.test_wan import METHODS, traced
from backbones.tiny_wan import CASES, call
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones.wan import BACKBONE

GOLDEN = os.environ.get("DCM_GOLDEN")
PROMPT = {"target": "prompt", "prompt_tokens": {"dog": [1], "sky": [2]}}


@pytest.mark.parametrize("text", [512, 500])
def test_words_of_the_prompt(text: int) -> None:
    """Words are concepts with the states that the prompt has, also where a short text shares its rows with images."""
    for case in (CASES[0], CASES[3]):
        transformer, inputs = case.make(), case.inputs(2, text, 1)
        if case is CASES[3]:
            inputs["encoder_hidden_states_image"] = tiny_wan.seeded(2, 20, 16, seed=5)
        off = output_of(transformer, inputs)
        with dcm.trace(
            transformer, methods=METHODS, target="prompt", prompt_tokens={"dog": [2], "sky": [text - 1]}
        ) as maps:
            assert torch.equal(output_of(transformer, inputs), off)
        embeds = inputs["encoder_hidden_states"][:, [2, text - 1]]
        with dcm.trace(transformer, methods=METHODS, concept_embeds=embeds) as expected:
            output_of(transformer, inputs)
        for method in METHODS:
            close(maps.get(method), expected.get(method), 1e-5)


def test_words_of_texts_of_different_lengths() -> None:
    """The rows of a word are counted from the start of each text, also where a longer one follows in a capture."""
    transformer, short, long = CASES[0].make(), CASES[0].inputs(1, 5, 1), CASES[0].inputs(1, 8, 2)
    off = output_of(transformer, long)
    with dcm.trace(transformer, methods=METHODS, steps=[1], **PROMPT) as expected:
        output_of(transformer, long)
        output_of(transformer, long)
    with dcm.trace(transformer, methods=METHODS, steps=[0, 1], **PROMPT) as both:
        output_of(transformer, short)
        one = {method: both.get(method) for method in METHODS}
        assert torch.equal(output_of(transformer, long), off)
    for method in METHODS:
        close(both.get(method), (one[method] + expected.get(method)) / 2, 1e-5)


def test_words_are_looked_for_in_the_prompt_as_it_is_tokenized() -> None:
    pipe = tiny_wan.make_pipeline()
    prompt = "  a\n red &amp;   dog "
    maps = traced(pipe, prompt, target="prompt")
    assert maps.concepts == ("a", "red", "dog")
    clean = BACKBONE.clean(prompt)
    assert clean == "a red & dog"
    with dcm.trace(pipe, methods=METHODS, target="prompt", prompt_tokens={"a": [0], "red": [1], "dog": [3]}) as given:
        call(pipe, clean)
    for method in METHODS:
        assert torch.equal(maps.get(method), given.get(method))


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Any], dict[str, torch.Tensor], WanTransformer3DModel]:
    """What the official code computed, with which facts, and the stock transformer with the same weights."""
    assert GOLDEN is not None
    facts = json.loads((Path(GOLDEN) / "imap_wan_h4d32_l3.json").read_text(encoding="utf-8"))
    tensors = load_file(Path(GOLDEN) / "imap_wan_h4d32_l3.safetensors")
    transformer = WanTransformer3DModel(**facts["config"]).eval()
    transformer.load_state_dict({name[3:]: value for name, value in tensors.items() if name.startswith("sd.")})
    return facts, tensors, transformer


@pytest.mark.skipif(GOLDEN is None, reason="DCM_GOLDEN does not name a folder of golden tensors")
class TestParity:
    @pytest.mark.parametrize(
        ("method", "key", "tolerance"),
        [("cross_attention", "cross_attention_maps", 1e-4), ("gramcol", "imap", 5e-4), ("imap", "sel_imap", 1e-4)],
    )
    def test_official_maps(self, golden: Any, method: str, key: str, tolerance: float) -> None:
        facts, tensors, transformer = golden
        inputs = {name[3:]: value for name, value in tensors.items() if name.startswith("in.")}
        tokens = {f"token {i}": [i] for i in range(facts["n_tokens"])}

        def maps_of(**options: Any) -> torch.Tensor:
            if method == "imap":
                options["heads"] = dcm.HeadSelection(top_k=facts["topk"])
            with dcm.trace(
                transformer, methods=[method], target="prompt", prompt_tokens=tokens, parity="imap", **options
            ) as maps:
                assert torch.equal(output_of(transformer, inputs), tensors["out.sample"])
            assert maps.get().shape[2:] == tuple(facts["grid"])
            return maps.get()[0].flatten(1)

        for layer in facts["layers"]:
            official = tensors[f"prompt.layer{layer}.{key}"][: len(tokens)]
            close(maps_of(layers=[layer]), official, tolerance)
        for suffix, layers in (("", facts["layers"]), ("_layers", facts["imap_layer"])):
            close(maps_of(layers=layers), tensors[f"prompt.agg.raw.{key}{suffix}"][: len(tokens)], tolerance)
            # The tensors are the transformer's; the official pipeline adds a second softmax.
            softmax = tensors[f"prompt.agg.softmax.{key}{suffix}"][: len(tokens)].softmax(0)
            close(maps_of(layers=layers, normalize="softmax"), softmax, tolerance)

    def test_official_maps_are_not_the_default(self, golden: Any) -> None:
        _, tensors, transformer = golden
        inputs = {name[3:]: value for name, value in tensors.items() if name.startswith("in.")}
        for method in METHODS:
            made = []
            for parity in (None, "imap"):
                with dcm.trace(
                    transformer, methods=[method], parity=parity, normalize="none", heads=[0], **PROMPT
                ) as maps:
                    output_of(transformer, inputs)
                made.append(maps.get())
            assert (made[0] - made[1]).abs().max() > 0.05 * made[1].abs().max()
