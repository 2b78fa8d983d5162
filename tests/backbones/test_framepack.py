"""FramePack beyond the contract: sections, words of the prompt behind the image, processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from backbones import tiny_framepack as tiny
from backbones.tiny_hunyuan_video import SIZE, WIDTH
from diffusers import HunyuanVideoFramepackPipeline
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones import find_backbone

METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")


@pytest.fixture(scope="module")
def pipe() -> HunyuanVideoFramepackPipeline:
    return tiny.make_pipeline()


def call(pipe: HunyuanVideoFramepackPipeline, prompt: str = "a red dog", **options: Any) -> Sequence[torch.Tensor]:
    """Two sections with two steps of two passes each."""
    settings: dict[str, Any] = {
        **(SIZE | {"num_frames": 18}),
        "latent_window_size": 3,
        "num_inference_steps": 2,
        "negative_prompt": "a cat",
        "true_cfg_scale": 2.0,
        "max_sequence_length": 8,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    image = Image.new("RGB", (80, 48), (90, 20, 200))
    sections: Sequence[torch.Tensor] = pipe(image, prompt=prompt, **(settings | options)).frames
    return sections


def test_maps_are_those_of_the_last_section(pipe: HunyuanVideoFramepackPipeline) -> None:
    off = call(pipe)
    calls: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    embeds = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(3))
    with dcm.trace(pipe, concept_embeds=embeds, methods=METHODS, branch="both", steps=[1]) as maps:
        on = call(pipe)
    hook.remove()
    assert len(off) == 2
    assert all(torch.equal(a, b) for a, b in zip(on, off, strict=True))
    assert len(calls) == 8
    for branch, inputs in zip(("cond", "uncond"), calls[6:], strict=True):
        with dcm.trace(pipe.transformer, concept_embeds=embeds, methods=METHODS) as expected, torch.no_grad():
            pipe.transformer(**inputs)
        for method in METHODS:
            assert maps[branch].get(method).shape == (1, 2, 3, 3, 5)
            actual, reference = maps[branch].get(method), expected.get(method)
            torch.testing.assert_close(actual, reference, rtol=0, atol=1e-5 * float(reference.abs().max()))


def test_words_of_the_prompt_stand_behind_the_image(pipe: HunyuanVideoFramepackPipeline) -> None:
    with dcm.trace(pipe, ["red", "dog"], target="prompt", methods=METHODS) as found:
        call(pipe)
    positions = {"red": [4 + 1], "dog": [4 + 2]}
    with dcm.trace(pipe, target="prompt", prompt_tokens=positions, methods=METHODS) as given:
        call(pipe)
    for method in METHODS:
        assert torch.equal(found.get(method), given.get(method))


def test_length_of_the_text() -> None:
    backbone = find_backbone(tiny.make_transformer())
    assert backbone.text_length(tiny.inputs(1, 5, 0)) == 2 + 3  # cut to the tokens of its prompt
    assert backbone.text_length(tiny.inputs(2, 5, 0)) == 2 + 5


def test_processors_can_be_set_without_a_method_of_the_model(pipe: HunyuanVideoFramepackPipeline) -> None:
    mixed = dcm.with_concept_maps(tiny.make_pipeline())
    processors = dcm.concept_attn_processors(mixed.transformer)
    assert len(processors) == 5  # four blocks and the token refiner
    mixed.set_attn_processor(processors)
    for name, processor in processors.items():
        assert mixed.transformer.get_submodule(name.removesuffix(".processor")).processor is processor
    off, on = call(pipe), call(mixed, concepts=["dog"])
    assert all(torch.equal(a, b) for a, b in zip(on, off, strict=True))
    with pytest.raises(dcm.ConceptMapsError, match="5 attention modules, and 1 processors"):
        mixed.set_attn_processor(dict(list(processors.items())[:1]))
