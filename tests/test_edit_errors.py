"""What cannot be edited, and edits that make no sense, are refused with a reason; nothing is left behind then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from backbones._case import find_cases
from diffusers import CogVideoXPipeline, PyramidAttentionBroadcastConfig
from test_undo import assert_same, snapshot

import diffusers_concept_maps as dcm
from diffusers_concept_maps import AttentionEdit, edit_attention

CASES = {case.name: case for case in find_cases()}
DOG = AttentionEdit("dog", scale=6.0)


@pytest.fixture
def pipe() -> CogVideoXPipeline:
    return tiny.make_random_pipeline()


def call(pipe: CogVideoXPipeline, prompt: Any = "a red dog", **options: Any) -> torch.Tensor:
    return tiny.call(pipe, prompt, **options)


def edited(pipe: CogVideoXPipeline, edits: Any = DOG, prompt: Any = "a red dog", **options: Any) -> torch.Tensor:
    with edit_attention(pipe, edits, **options):
        return call(pipe, prompt)


ARGUMENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: AttentionEdit("dog"), "'dog' has nothing to do; expected exactly one of scale, replace, tra"),
    "two": (
        lambda: AttentionEdit("dog", scale=2.0, transform=torch.sqrt),
        "'dog' has scale and transform; expected exactly one of",
    ),
    "negative": (lambda: AttentionEdit("dog", scale=-1.0), "scale is -1.0; expected a number of at least 0"),
    "bool": (lambda: AttentionEdit("dog", scale=True), "scale is True; expected a number"),
    "nan": (lambda: AttentionEdit("dog", scale=float("nan")), "scale is nan; expected a number"),
    "no function": (lambda: AttentionEdit("dog", transform=3), "transform is 3; expected a function"),  # type: ignore[arg-type]
    "list": (lambda: AttentionEdit("dog", scale=2.0, mask=[1]), "mask is a list; expected a tensor, bool or float"),  # type: ignore[arg-type]
    "integers": (
        lambda: AttentionEdit("dog", scale=2.0, mask=torch.ones(2, 2, dtype=torch.int64)),
        r"mask is torch.int64 \[2, 2\]; expected bool or float in 0..1",
    ),
    "bool map": (
        lambda: AttentionEdit("dog", replace=torch.ones(2, 2, dtype=torch.bool)),
        r"replace is torch.bool \[2, 2\]; expected float in 0..1, \[height, width\] or \[frame",
    ),
    "dimensions": (lambda: AttentionEdit("dog", scale=2.0, mask=torch.ones(2)), r"mask is torch.float32 \[2\]; expec"),
    "values": (lambda: AttentionEdit("dog", replace=torch.full((2, 2), 1.5)), "replace has values outside of 0..1"),
    "words": (lambda: AttentionEdit(3, scale=2.0), "words is 3; expected a word of the prompt, or a list of words"),  # type: ignore[arg-type]
    "no range": (lambda: AttentionEdit("dog", scale=2.0, time=1), "time is 1; expected fractions"),  # type: ignore[arg-type]
    "three times": (
        lambda: AttentionEdit("dog", scale=2.0, time=(0, 0.5, 1)),  # type: ignore[arg-type]
        r"time is \(0, 0.5, 1\); expected fractions",
    ),
    "texts": (
        lambda: AttentionEdit("dog", scale=2.0, time=("0", "1")),  # type: ignore[arg-type]
        r"time is \('0', '1'\); expected fractions",
    ),
    "time": (lambda: AttentionEdit("dog", scale=2.0, time=(0.5, 0.5)), r"time is \(0.5, 0.5\); expected fractions"),
}


@pytest.mark.parametrize(("make", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_edits(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match=message):
        make()


CALLS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no edit": (["dog"], {}, "edits has 'dog'; expected AttentionEdit objects"),
    "no list": (3, {}, "edits is 3; expected an AttentionEdit, or a list of them"),
    "no words": (AttentionEdit((), scale=2.0), {}, "an edit names no words; name at least one"),
    "layer": (DOG, {"layers": [3]}, "layer 3 is out of range; expected an integer of 0 to 2"),
    "step": (DOG, {"steps": [3]}, "step 3 is out of range; this run has 3 steps, 0 to 2"),
    "word": (
        AttentionEdit("cat", scale=2.0),
        {},
        "'cat' is not a word of the prompt 'a red dog'; name words that are",
    ),
    "positions": (DOG, {"prompt_tokens": {"cat": [1]}}, r"prompt_tokens has no positions of \['dog'\]"),
    "beyond": (DOG, {"prompt_tokens": {"dog": [40]}}, "prompt_tokens has token 40 for 'dog'"),
    "frames": (
        AttentionEdit("dog", scale=2.0, mask=torch.ones(2, 4, 4)),
        {},
        "mask has 2 frames; expected 1, the 3 of the token grid, or the video's",
    ),
    "too small": (
        AttentionEdit("dog", scale=2.0, mask=torch.arange(48 * 80).view(48, 80) < 3),
        {},
        "the edit of 'dog' reaches none of the 3 x 3 x 5 tokens; expected a mask that covers half of one",
    ),
    "too short": (AttentionEdit("dog", scale=2.0, time=(0.0, 0.1)), {}, "the edit of 'dog' reaches none of the 3 x"),
    "shape": (
        AttentionEdit("dog", transform=lambda share: share[0]),
        {},
        r"transform has returned \[3, 3, 5\]; expected a tensor of the shape it was given, \[4, 3, 3, 5\]",
    ),
    "not a number": (
        AttentionEdit("dog", transform=lambda share: share * torch.nan),
        {},
        "transform has returned shares that are not a number; expected numbers in 0..1",
    ),
    "no tensor": (AttentionEdit("dog", transform=lambda share: None), {}, "transform has returned NoneType; expected"),
}


@pytest.mark.parametrize(("edits", "options", "message"), CALLS.values(), ids=CALLS)
def test_wrong_calls(pipe: CogVideoXPipeline, edits: Any, options: dict[str, Any], message: str) -> None:
    call(pipe, num_inference_steps=1)
    before = snapshot(pipe.transformer)
    with pytest.raises(dcm.ConceptMapsValueError, match=message):
        edited(pipe, edits, **options)
    assert_same(pipe.transformer, before)


def test_refusals(pipe: CogVideoXPipeline) -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match="a bare transformer has no tokenizer; pass prompt_tokens"):
        edited(pipe.transformer)
    with (
        pytest.raises(dcm.ConceptMapsError, match="is being edited already; leave the other `with` block first"),
        edit_attention(pipe, DOG),
    ):
        edited(pipe)
    together = "guidance and edits of the attention do not go together; leave the other"
    with (
        pytest.raises(dcm.ConceptMapsError, match=together),
        dcm.cross_attention_guidance(pipe, layers=[1]),
        edit_attention(pipe, DOG),
    ):
        pass
    with (
        pytest.raises(dcm.ConceptMapsError, match=together),
        edit_attention(pipe, DOG),
        dcm.cross_attention_guidance(pipe, layers=[1]),
    ):
        pass
    embeds = torch.randn(1, 12, 32)
    with (
        pytest.raises(dcm.ConceptMapsError, match="was given prompt_embeds; pass prompt_tokens"),
        edit_attention(pipe, DOG),
    ):
        call(pipe, prompt_embeds=embeds, negative_prompt_embeds=embeds)
    flux = CASES["FLUX.1 dev"].make()
    with pytest.raises(dcm.ConceptMapsError, match=f"attention of a {type(flux).__name__} cannot be edited"):
        edited(flux)


def test_refused_hosts(pipe: CogVideoXPipeline) -> None:
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe._current_timestep
        )
    )
    with pytest.raises(dcm.ConceptMapsError, match=r"a cache would keep edited states .* call disable_cache\(\)"):
        edited(pipe)
    pipe.transformer.disable_cache()
    pipe.transformer._parallel_config = object()
    with pytest.raises(dcm.ConceptMapsError, match="edits do not work with context parallelism; disable it"):
        edited(pipe)
    del pipe.transformer._parallel_config
    pipe.transformer.transformer_blocks[1].compile()
    with pytest.raises(dcm.ConceptMapsError, match=r"what torch.compile has compiled cannot be edited"):
        edited(pipe)
