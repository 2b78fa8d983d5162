"""The attention in which image tokens see one another: it can be watched and replaced in every video family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import pytest
import torch
from backbones._case import Case, Inputs, cast_inputs, find_cases, seeded
from backbones._oracle import embeds_of, kept_state
from diffusers.models.attention_dispatch import attention_backend
from torch.nn import functional

import diffusers_concept_maps as dcm
from diffusers_concept_maps.attachment import Attachment
from diffusers_concept_maps.backbones import Grid, find_backbone
from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.listener import Pass, PassListener
from diffusers_concept_maps.processors import video

CASES = [case for case in find_cases() if case.grid[0] > 1 and case.name != "Qwen-Image-Layered"]
"""All that make videos; the frames of that one are the layers of an image."""

KNOWN = {case.name: case for case in CASES}
DISPATCH = "dispatch_attention_fn"


@dataclass
class Seen:
    """What one attention call has shown."""

    attention: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    text: slice
    image: slice
    mask: torch.Tensor | None


@dataclass
class Asked:
    """What a replaced attention call was asked for."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    text: slice
    image: slice
    mask: torch.Tensor | None
    linear: bool
    grid: Grid


class Watcher(PassListener[Pass]):
    """Stores everything, and replaces attention where it is told how."""

    way: Callable[[Asked], torch.Tensor] | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: list[Seen] = []
        self.asked: list[Asked] = []

    def includes(self, place: Any) -> bool:
        return True

    def open(self, announced: Any, current: Pass, present: Any, device: torch.device) -> Pass:
        return current

    def observe(
        self, attention: Any, *heads: torch.Tensor, text: slice, image: slice, concepts: Any = None, mask: Any = None
    ) -> None:
        self.seen.append(Seen(attention, *(tensor.clone() for tensor in heads), text, image, mask))

    def restrict(self, *heads: torch.Tensor, mask: Any = None, linear: bool = False, **places: slice) -> torch.Tensor:
        assert self._pass is not None
        assert self.way is not None
        self.asked.append(Asked(*heads, **places, mask=mask, linear=linear, grid=self._pass.grid))
        return self.way(self.asked[-1])


@contextmanager
def watched(transformer: Any, way: Callable[[Asked], torch.Tensor] | None = None) -> Iterator[Watcher]:
    backbone = find_backbone(transformer)
    sites = {transformer: backbone.matching_sites(transformer)}
    count = len(sites[transformer])
    watcher = Watcher(backbone, sites, None, layers=range(count), branches=("cond",))
    watcher.restricts, watcher.way = way is not None, way
    attachment = Attachment(watcher, backbone, sites, deepest=count - 1)
    try:
        yield watcher
    finally:
        attachment.remove()


@cache
def transformer_of(case: Case) -> Any:
    return case.make()


def output_of(transformer: Any, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a fraction of the largest number."""
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()


def attend(asked: Asked, allowed: torch.Tensor | None = None) -> torch.Tensor:
    """Plain attention over what the mask lets see and, if it is given, what is allowed `[S, S]`."""
    if asked.linear:
        weights = asked.query @ asked.key.mT
        return (weights if allowed is None else weights * allowed) @ asked.value
    mask = asked.mask
    if allowed is not None and mask is not None:
        mask = mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -torch.inf)
    mask = allowed if mask is None else mask
    return functional.scaled_dot_product_attention(asked.query, asked.key, asked.value, attn_mask=mask)


def attend_within_frames(asked: Asked) -> torch.Tensor:
    """No token of the grid sees one of another frame."""
    frame = torch.full((asked.query.shape[2],), -1)
    grid = asked.grid
    frame[asked.image][grid.tokens] = torch.arange(grid.frames).repeat_interleave(grid.height * grid.width)
    rows, columns = frame[:, None], frame[None]
    return attend(asked, (rows == columns) | (rows < 0) | (columns < 0))


def naive(seen: Seen, asked: Asked) -> torch.Tensor:
    """The output of an attention call in float64, from what it has shown and the mask that a replacement is given."""
    query, key, value = seen.query.double(), seen.key.double(), seen.value.double()
    if asked.linear:
        return (query @ key.mT) @ value
    logits = query @ key.mT / query.shape[-1] ** 0.5
    if asked.mask is not None and asked.mask.dtype == torch.bool:
        logits = logits.masked_fill(~asked.mask, -torch.inf)
    elif asked.mask is not None:
        logits = logits + asked.mask.double()
    blind = logits.isneginf().all(-1, keepdim=True)
    return logits.softmax(-1).masked_fill(blind, 0) @ value


@pytest.mark.parametrize("case", CASES, ids=str)
class TestEveryVideoFamily:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_watching_changes_nothing(self, case: Case, dtype: torch.dtype) -> None:
        transformer = transformer_of(case) if dtype == torch.float32 else case.make().to(dtype)
        for batch, length in ((1, case.text_lengths[-1]), (2, case.text_lengths[0])):
            inputs = cast_inputs(case.inputs(batch, length, 1), dtype)
            off, before = output_of(transformer, inputs), kept_state(transformer)
            with watched(transformer) as watcher:
                on = output_of(transformer, inputs)
            assert off.isfinite().all()
            assert torch.equal(on, off)
            assert kept_state(transformer) == before
            assert torch.equal(output_of(transformer, inputs), off)
            sites = watcher._sites[transformer]
            assert [seen.attention for seen in watcher.seen] == [site.attention for site in sites]
            assert len(sites) == case.layers

    def test_what_is_shown_gives_the_output(self, case: Case) -> None:
        transformer, inputs = transformer_of(case), case.inputs(2, case.text_lengths[-1], 1)
        with watched(transformer) as watcher:
            output_of(transformer, inputs)
        with watched(transformer, attend) as replaced:
            output_of(transformer, inputs)
        for seen, asked in zip(watcher.seen, replaced.asked, strict=True):
            tokens = seen.query.shape[2]
            assert len(range(tokens)[seen.image]) == case.start + case.tokens + case.behind
            assert sorted([*range(tokens)[seen.text], *range(tokens)[seen.image]]) == [*range(tokens)]
            assert not range(tokens)[seen.text] or case.joint
            assert (asked.text, asked.image) == (seen.text, seen.image)
            assert (seen.mask is None) == (asked.mask is None)
            assert seen.mask is None or torch.equal(seen.mask, cast(torch.Tensor, asked.mask))
            assert seen.output.shape == seen.query.shape == seen.key.shape == seen.value.shape
            shown = seen.image if case.row_by_row else slice(None)  # where padding of the text reads nothing
            assert distance(seen.output[:, :, shown], naive(seen, asked)[:, :, shown]) < 1e-5

    def test_attention_is_replaced(self, case: Case) -> None:
        transformer, inputs = transformer_of(case), case.inputs(2, case.text_lengths[-1], 1)
        off, before = output_of(transformer, inputs), kept_state(transformer)
        with watched(transformer, attend) as watcher:
            assert distance(output_of(transformer, inputs), off) < 1e-4
        assert len(watcher.asked) == len(watcher.seen) == case.layers
        with watched(transformer, attend_within_frames):
            assert distance(output_of(transformer, inputs), off) > 1e-2
        assert kept_state(transformer) == before
        assert torch.equal(output_of(transformer, inputs), off)


@pytest.mark.parametrize("case", [*{case.make.__module__: case for case in reversed(CASES)}.values()], ids=str)
def test_watching_a_compiled_model(case: Case) -> None:
    """A graph shows the same, and gives what it gives unwatched."""
    torch._dynamo.reset()
    transformer, inputs = case.make(), case.inputs(2, case.text_lengths[-1], 1)
    with watched(transformer) as eager:
        output_of(transformer, inputs)
    for site in find_backbone(transformer).matching_sites(transformer):
        site.block.compile(fullgraph=True, backend="eager")
    off = output_of(transformer, inputs)
    with watched(transformer) as watcher:
        assert torch.equal(output_of(transformer, inputs), off)
    assert len(watcher.seen) == len(eager.seen) == case.layers
    for seen, expected in zip(watcher.seen, eager.seen, strict=True):
        assert seen.attention is expected.attention
        tokens = range(seen.query.shape[2])
        assert tokens[seen.image] == tokens[expected.image]
        for name in ("query", "key", "value", "output"):
            assert distance(getattr(seen, name), getattr(expected, name)) < 1e-4


def check_watched(transformer: Any, inputs: Inputs) -> Watcher:
    """Watching changes nothing, and attention is replaced."""
    off = output_of(transformer, inputs)
    with watched(transformer) as watcher:
        assert torch.equal(output_of(transformer, inputs), off)
    with watched(transformer, attend):
        assert distance(output_of(transformer, inputs), off) < 1e-4
    with watched(transformer, attend_within_frames):
        assert distance(output_of(transformer, inputs), off) > 1e-2
    return watcher


@pytest.mark.parametrize("name", ["Wan 2.1", "SkyReels-V2 image-to-video"])
def test_fused_projections(name: str) -> None:
    transformer, inputs = KNOWN[name].make(), KNOWN[name].inputs(2, KNOWN[name].text_lengths[-1], 1)
    for block in transformer.blocks:
        block.attn1.fuse_projections()
    assert check_watched(transformer, inputs).seen


def test_two_who_listen_at_once() -> None:
    """A capture reads the cross-attention while another one watches the video see itself, in the same processors."""
    case = KNOWN["Wan 2.1"]
    transformer, inputs, embeds = transformer_of(case), case.inputs(2, 5, 1), embeds_of(case)
    off, before = output_of(transformer, inputs), kept_state(transformer)
    with dcm.trace(transformer, concept_embeds=embeds, methods=case.methods) as expected:
        output_of(transformer, inputs)
    with dcm.trace(transformer, concept_embeds=embeds, methods=case.methods) as maps, watched(transformer) as watcher:
        assert torch.equal(output_of(transformer, inputs), off)
    assert len(watcher.seen) == case.layers
    for method in case.methods:
        assert torch.equal(maps.get(method), expected.get(method))
    assert kept_state(transformer) == before


@pytest.mark.parametrize("name", ["LTX-2", "LTX-2.3"])
def test_mask_between_tokens_of_the_video(name: str) -> None:
    """It comes as numbers to add, and a replacement is given it."""
    case = KNOWN[name]
    inputs = case.inputs(2, 5, 1)
    tokens = case.tokens
    inputs["video_self_attention_mask"] = (torch.arange(tokens) > 2).float().expand(2, tokens, tokens)
    plain = output_of(transformer_of(case), case.inputs(2, 5, 1))
    assert distance(output_of(transformer_of(case), inputs), plain) > 1e-3
    check_watched(transformer_of(case), inputs)


def test_perturbed_attention() -> None:
    """Rows that are perturbed are shown as they are before; a block all of whose rows are has nothing to show."""
    case = KNOWN["LTX-2.3"]
    transformer, inputs = transformer_of(case), case.inputs(2, 5, 1)
    plain = output_of(transformer, inputs)
    with watched(transformer) as expected:
        output_of(transformer, inputs)
    some = inputs | {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": torch.tensor([1.0, 0.0])}
    assert distance(output_of(transformer, some), plain) > 1e-3
    watcher = check_watched(transformer, some)
    assert torch.equal(watcher.seen[1].output, expected.seen[1].output)
    every = some | {"perturbation_mask": torch.zeros(2)}
    off = output_of(transformer, every)
    with watched(transformer) as watcher:
        assert torch.equal(output_of(transformer, every), off)
    blocks = transformer.transformer_blocks
    assert [seen.attention for seen in watcher.seen] == [blocks[0].attn1, blocks[2].attn1]


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_sparse_attention(fraction: float) -> None:
    """It is watched, and not replaced."""
    case = KNOWN["Kandinsky 5"]
    transformer, inputs = transformer_of(case), case.inputs(1, 5, 3)
    inputs["hidden_states"] = seeded(1, 2, 16, 32, 4, seed=3)
    inputs["visual_rope_pos"] = [torch.arange(count) for count in (2, 8, 16)]
    squares = torch.eye(4, dtype=torch.bool)[None, None]
    inputs["sparse_params"] = {"to_fractal": True, "sta_mask": squares, "P": fraction}
    with attention_backend("flex"):
        off, before = output_of(transformer, inputs), kept_state(transformer)
        with watched(transformer) as watcher:
            assert torch.equal(output_of(transformer, inputs), off)
        assert [seen.query.shape for seen in watcher.seen] == [(1, 4, 256, 12)] * 3
        if fraction == 1:
            for seen in watcher.seen:
                asked = Asked(seen.query, seen.key, seen.value, seen.text, seen.image, None, False, Grid(2, 8, 16))
                assert distance(seen.output, naive(seen, asked)) < 1e-5
        with watched(transformer, attend), pytest.raises(ConceptMapsError, match="^this Kandinsky 5 has sparse atten"):
            output_of(transformer, inputs)
        assert kept_state(transformer) == before
        assert torch.equal(output_of(transformer, inputs), off)


@pytest.mark.parametrize("name", ["Wan 2.1", "SkyReels-V2", "LTX-Video", "LTX-2", "Kandinsky 5", "HunyuanVideo"])
def test_attention_backend_and_parallel_configuration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of the video is dispatched with what the host has told its processors."""
    transformer, inputs = KNOWN[name].make(), KNOWN[name].inputs(1, 5, 1)
    backbone, marker = find_backbone(transformer), object()
    told: list[tuple[Any, Any]] = []
    places = [inspect.getmodule(cls) for cls in type(backbone).__mro__]
    module = next((place for place in places if hasattr(place, DISPATCH)), video)
    dispatch = getattr(module, DISPATCH)

    def note(*heads: torch.Tensor, backend: Any, parallel_config: Any, **options: Any) -> torch.Tensor:
        told.append((backend, parallel_config))
        return dispatch(*heads, **options)

    off = output_of(transformer, inputs)
    for site in backbone.matching_sites(transformer):
        site.attention.processor._attention_backend = "native"
        site.attention.processor._parallel_config = marker
    monkeypatch.setattr(module, DISPATCH, note)
    with watched(transformer) as watcher:
        assert torch.equal(output_of(transformer, inputs), off)
    assert told == [("native", marker)] * len(watcher.seen)
