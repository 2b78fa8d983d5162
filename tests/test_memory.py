"""What a capture allocates, tensor by tensor: nothing that grows with steps or layers, and nothing large."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import cache, wraps
from itertools import product
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox
from diffusers import CogVideoXPipeline
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusers_concept_maps as dcm
from diffusers_concept_maps import dispatch, reference
from diffusers_concept_maps.accumulate import Accumulator
from diffusers_concept_maps.processors import joint
from diffusers_concept_maps.recorder import Recorder

METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")
HEADS, WIDTH, TEXT = 4, 16, tiny_cogvideox.TEXT_LENGTH
FRAMES, HEIGHT, COLUMNS = tiny_cogvideox.GRID
TOKENS = FRAMES * HEIGHT * COLUMNS
CONCEPTS = ["dog", "cat", "sky", "red rock", "beach", "running", "on the beach"]
QUERY = 2 * HEADS * (TEXT + TOKENS) * WIDTH
"""Elements of the query of one layer, for the two rows of a guided call."""


class Watch(TorchDispatchMode):
    """Registers every storage that is made, apart for what the recorder makes and what is made beside it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside = False
        self.peak = 0
        self.made: list[tuple[int, ...]] = []
        self.beside: list[tuple[str, tuple[int, ...]]] = []
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def live(self) -> int:
        """Bytes made by the recorder that are still held."""
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        return sum(size for _, size in self._live.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == dispatch.NAMESPACE:  # what an op of ours makes inside counts, too
            with self:
                return getattr(reference, func._opname)(*args)
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata in known:  # a view, or written in place
                continue
            if self.inside:
                self.made.append(tuple(tensor.shape))
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.peak = max(self.peak, self.live)
            else:
                self.beside.append((str(func), tuple(tensor.shape)))
        return result


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


@cache
def pipeline(layers: int) -> CogVideoXPipeline:
    return tiny_cogvideox.make_pipeline(layers=layers)


def watched(
    monkeypatch: pytest.MonkeyPatch, *, steps: int = 2, layers: int = 2, branch: str = "cond"
) -> tuple[Watch, int]:
    """A traced run under a `Watch` that knows when the recorder is at work, and the bytes that its maps hold."""
    watch, pipe = Watch(), pipeline(layers)

    def telling(method: Any) -> Any:
        @wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before, watch.inside = watch.inside, True
            try:
                return method(*args, **kwargs)
            finally:
                watch.inside = before

        return wrapped

    with monkeypatch.context() as context:
        for name in ("begin", "end", "hold", "records", "answer", "observe"):
            context.setattr(Recorder, name, telling(getattr(Recorder, name)))
        with dcm.trace(pipe, CONCEPTS, methods=METHODS, branch=branch) as maps, watch:
            tiny_cogvideox.call(pipe, num_inference_steps=steps)
        assert maps is not None  # it keeps the accumulators alive up to here
        return watch, watch.live


def large(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Shapes that span heads, concepts or prompt tokens, and image tokens, in any order and folding."""
    text = (len(CONCEPTS), TEXT, len(CONCEPTS) + TEXT)
    tokens = ([TOKENS], [FRAMES, TOKENS // FRAMES], [FRAMES, HEIGHT, COLUMNS], [TOKENS + TEXT])
    forbidden = [
        folded
        for count, place, rows in product(text, tokens, (1, 2))
        for folded in ([rows * HEADS, count, *place], [rows * HEADS * count, *place])
    ]
    return [shape for shape in shapes if any(Counter(sizes) <= Counter(shape) for sizes in forbidden)]


def test_nothing_grows_with_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [watched(monkeypatch, steps=steps) for steps in (2, 8, 32)]
    assert len({watch.peak for watch, _ in runs}) == 1
    assert len({held for _, held in runs}) == 1


def test_nothing_grows_with_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [watched(monkeypatch, layers=layers) for layers in (2, 8)]
    assert len({watch.peak for watch, _ in runs}) == 1
    assert len({held for _, held in runs}) == 1


@pytest.mark.parametrize(("branch", "rows"), [("cond", 1), ("uncond", 1), ("both", 2)])
def test_only_the_accumulators_are_held(monkeypatch: pytest.MonkeyPatch, branch: str, rows: int) -> None:
    _, held = watched(monkeypatch, branch=branch)
    assert held == len(METHODS) * rows * len(CONCEPTS) * TOKENS * 4


@pytest.mark.parametrize("branch", ["cond", "both"])
def test_nothing_large_is_made(monkeypatch: pytest.MonkeyPatch, branch: str) -> None:
    watch, _ = watched(monkeypatch, branch=branch)
    assert len(watch.made) > 100
    assert large(watch.made) == []
    assert [shape for shape in watch.made if math.prod(shape) > QUERY] == []


def test_beside_the_recorder_a_run_makes_what_a_stock_run_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Watch()
    with stock:
        tiny_cogvideox.call(pipeline(2), num_inference_steps=2)
    watch, _ = watched(monkeypatch)
    assert len(stock.beside) > 100
    assert watch.beside == stock.beside


def test_an_op_that_materializes_all_heads_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def every_head(concept: torch.Tensor, image: torch.Tensor, weights: torch.Tensor, *_: Any) -> torch.Tensor:
        logits = torch.einsum("rhcd,rhnd->rhcn", concept, image)
        return (logits * weights[..., None, None]).sum(1)

    monkeypatch.setattr(reference, "similarity", every_head)
    watch, _ = watched(monkeypatch)
    assert large(watch.made) != []


def test_a_list_of_maps_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[torch.Tensor] = []
    add = Accumulator.add

    def keep(accumulator: Accumulator, scores: torch.Tensor, step: int, layer: int) -> None:
        kept.append(scores)
        add(accumulator, scores, step, layer)

    monkeypatch.setattr(Accumulator, "add", keep)
    runs = [watched(monkeypatch, steps=steps) for steps in (2, 8)]
    assert runs[0][0].peak < runs[1][0].peak
    assert runs[0][1] < runs[1][1]


def test_a_copy_beside_the_recorder_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    project = joint._SharedJointProcessor._project

    def copying(*args: Any) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.clone() for tensor in project(*args))

    watch, _ = watched(monkeypatch)
    monkeypatch.setattr(joint._SharedJointProcessor, "_project", copying)
    assert len(watched(monkeypatch)[0].beside) > len(watch.beside)
