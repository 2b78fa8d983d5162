"""The probe: what it hands over of every layer, what it refuses, when it stops, and what it makes in memory."""

from __future__ import annotations

import math
from functools import wraps
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox
from backbones._case import find_cases, seeded
from backbones._oracle import kept_state
from correspondence.hooked import FAMILIES, PROMPTS, Run, conditional, hooked_run, pipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusers_concept_maps as dcm
from diffusers_concept_maps import dispatch, reference_matching
from diffusers_concept_maps.attachment import DeepestLayerReached
from diffusers_concept_maps.correspondence.probe import LayerTokens, Probe, attach_probe
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError


def probed(name: str, **options: Any) -> list[LayerTokens]:
    """What a run of a family hands over."""
    handed: list[LayerTokens] = []
    probe = attach_probe(pipeline(name), handed.append, **options)
    try:
        FAMILIES[name].run(pipeline(name), PROMPTS)
    finally:
        probe.remove()
    return handed


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_those_that_attention_gets(name: str) -> None:
    family = FAMILIES[name]
    run: Run = hooked_run(pipeline(name), lambda: family.run(pipeline(name), PROMPTS))
    handed = probed(name, layers=range(family.layers))
    assert [(one.step, one.layer) for one in handed] == [(s, n) for s in range(3) for n in range(family.layers)]
    for one in handed:
        seen = conditional(family, run, one.step, one.layer, 2)
        assert (one.grid.frames, one.grid.height, one.grid.width) == (3, 3, 5)
        for side in ("query", "key", "text_key"):
            assert torch.equal(getattr(one, side).double(), getattr(seen, side))
        if one.text_mask is None:
            assert seen.text_mask.all()
        else:
            assert torch.equal(one.text_mask, seen.text_mask)


def test_single_blocks_follow_the_dual_ones() -> None:
    """HunyuanVideo has two of each, and the padding of its text is told in both."""
    handed = probed("HunyuanVideo", layers=[1, 2, 3], steps=[1])
    assert [(one.step, one.layer) for one in handed] == [(1, 1), (1, 2), (1, 3)]
    for one in handed:
        assert one.text_mask is not None
        assert 0 < one.text_mask.sum() < one.text_mask.numel()


def test_a_single_pass_ends_behind_the_deepest_layer() -> None:
    transformer, entered = tiny_cogvideox.make_transformer(), []
    for layer, block in enumerate(transformer.transformer_blocks):
        block.register_forward_hook(lambda *_, layer=layer: entered.append(layer))
    handed: list[LayerTokens] = []
    probe = attach_probe(transformer, handed.append, layers=[1], single_passes=True)
    with pytest.raises(DeepestLayerReached), torch.no_grad():
        transformer(**tiny_cogvideox.inputs(1, 5, 0))
    probe.remove()
    assert [one.layer for one in handed] == [1]
    assert 2 not in entered


def test_an_image_is_refused() -> None:
    inputs = tiny_cogvideox.inputs(1, 5, 0, frames=1, tokens=15)
    transformer = tiny_cogvideox.make_transformer()
    before = kept_state(transformer)
    probe = attach_probe(transformer, lambda _: None, layers=[0])
    with pytest.raises(ConceptMapsValueError, match="^there is only one frame, and nothing to match it with"):
        transformer(**inputs)
    probe.remove()
    assert kept_state(transformer) == before


def test_compiled_models_are_refused() -> None:
    transformer = tiny_cogvideox.make_transformer()
    transformer.transformer_blocks[0].compile(backend="eager")
    before = kept_state(transformer)
    with pytest.raises(ConceptMapsError, match=r"^frames cannot be matched in what torch.compile has compiled"):
        attach_probe(transformer, lambda _: None, layers=[0])
    assert kept_state(transformer) == before


def test_models_that_nobody_knows_are_refused() -> None:
    with pytest.raises(ConceptMapsError):
        attach_probe(torch.nn.Linear(1, 1), lambda _: None, layers=[0])


class Watch(TorchDispatchMode):
    """The largest tensor that is made while the probe is at work, and the number of its elements."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside = False
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == dispatch.NAMESPACE:  # what an op of ours makes inside counts, too
            with self:
                return getattr(reference_matching, func._opname)(*args)
        result = func(*args, **(kwargs or {}))
        if self.inside:
            sizes = [math.prod(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.largest = max([self.largest, *sizes])
        return result


def largest(monkeypatch: pytest.MonkeyPatch, height: int) -> tuple[int, int]:
    """Elements of the largest tensor for a clip so many tokens high, and tokens of one of its frames."""
    width, frames, pixels = 36, 2, (8 * 2 * height, 8 * 2 * 36)
    transformer = tiny_cogvideox.make_transformer(layers=1)
    tokens = frames * height * width
    angles = seeded(tokens, 8, seed=2).repeat_interleave(2, dim=1)
    inputs = tiny_cogvideox.inputs(1, 5, 0) | {
        "hidden_states": seeded(1, frames, 4, 2 * height, 2 * width, seed=0),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    watch, observe = Watch(), Probe.observe

    @wraps(observe)
    def telling(*args: Any, **kwargs: Any) -> None:
        watch.inside = True
        try:
            observe(*args, **kwargs)
        finally:
            watch.inside = False

    asked: dict[str, Any] = {"visibility": torch.ones(1, 5, dtype=torch.bool), "agreement": True}
    with monkeypatch.context() as context:
        context.setattr(Probe, "observe", telling)
        points = [[0, 200.0, 100.0]]
        with dcm.trace_correspondence(transformer, points, size=pixels, num_frames=5, **asked) as found, watch:
            transformer(**inputs)
    assert found.cell(0, 0).scores is not None
    return watch.largest, tokens // frames


def test_memory_does_not_grow_with_tokens_squared(monkeypatch: pytest.MonkeyPatch) -> None:
    (small, few), (large, many) = largest(monkeypatch, 32), largest(monkeypatch, 64)
    assert many == 2 * few < small
    assert large <= 2.01 * small
    assert large < many * many


def test_every_video_family_can_be_probed() -> None:
    """Of each the layers that attend between frames, in a bare transformer."""
    for case in find_cases():
        if case.grid[0] == 1 or case.name == "Qwen-Image-Layered":
            continue
        transformer, handed = case.make(), []
        probe = attach_probe(transformer, handed.append, layers=range(case.layers))
        with torch.no_grad():
            transformer(**case.inputs(2, case.text_lengths[-1], 1))
        probe.remove()
        assert [one.layer for one in handed] == list(range(case.layers))
        for one in handed:
            assert one.query.shape == one.key.shape
            assert one.query.shape[2] == case.tokens
