"""A CogVideoX pipeline of a few blocks, run plain or watched in several ways, with times of its middle block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from benchmark_capture import Size, guided_step, stock_pipeline
from official_block import OfficialBlocks
from torch import nn

import diffusers_concept_maps as dcm

LAYERS = 3  # the first block starts the capture and the last one ends it: the middle one stands for all others
METHODS = ("imap", "concept_attention")
CONCEPTS = 8
FULL = Size(frames=13, height=30, width=45, heads=48, head_width=64, layers=LAYERS, text=226, text_width=4096)
SMALL = Size(frames=3, height=4, width=5, heads=6, head_width=16, layers=LAYERS, text=11, text_width=32)


@dataclass(frozen=True)
class Run:
    """One forward pass.

    Attributes:
        block: milliseconds of the middle block.
        forward: milliseconds of the transformer.
        peak: bytes of device memory at most.
        output: noise prediction.
    """

    block: float
    forward: float
    peak: int
    output: torch.Tensor


class _EventClock:
    """Times the calls of a module, hooks of others included: they lie between its own."""

    def __init__(self, module: nn.Module, *, measures: bool) -> None:
        self.milliseconds: Callable[[], float] = lambda: float("nan")
        self._measures = measures
        self.output: Any = None
        self._start: torch.cuda.Event | None = None
        self.handles = (
            module.register_forward_pre_hook(self._begin, prepend=True),
            module.register_forward_hook(self._end),
        )

    def _begin(self, module: nn.Module, args: Any) -> None:
        if self._measures:
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = output
        if self._start is not None:
            start, end = self._start, torch.cuda.Event(enable_timing=True)
            end.record()
            self.milliseconds = lambda: start.elapsed_time(end)


class BlockSubject:
    """A pipeline with random weights and fixed inputs; a guided step makes a batch of 2.

    Attributes:
        transformer: its transformer.
        pipe: the pipeline.
        concepts: embeddings of the concepts.
        inputs: what the pipeline is called with.
    """

    def __init__(self, size: Size, dtype: torch.dtype, device: str) -> None:
        self.pipe = stock_pipeline(size, dtype, device)
        self.transformer = self.pipe.transformer
        self.concepts = torch.randn(CONCEPTS, size.text_width).to(device, dtype)
        self.inputs = guided_step(size, dtype, device)
        self._size = size
        self._cuda = device == "cuda"

    def modes(self) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
        """How the pipeline can be run."""
        return {
            "stock": nullcontext,
            "exact": self._traced,
            "official": lambda: OfficialBlocks(self.transformer, self.concepts, self._size.frames),
            "one_pass": lambda: self._traced(attention="one_pass"),
        }

    @contextmanager
    def _traced(self, **options: str) -> Iterator[None]:
        """A capture; reads the maps at its end, so that one that recorded nothing raises."""
        with dcm.trace(self.pipe, concept_embeds=self.concepts, methods=METHODS, **options) as maps:
            yield
        for method in METHODS:
            maps.get(method)

    def run(self, mode: str) -> Run:
        """One guided step, whose transformer call is timed."""
        with self.modes()[mode]():
            block = _EventClock(self.transformer.transformer_blocks[LAYERS // 2], measures=self._cuda)
            forward = _EventClock(self.transformer, measures=self._cuda)
            try:
                peak = self._run()
            finally:
                for handle in (*block.handles, *forward.handles):
                    handle.remove()
        return Run(block.milliseconds(), forward.milliseconds(), peak, forward.output[0])

    def _run(self) -> int:
        if not self._cuda:
            self.pipe(**self.inputs)
            return 0
        torch.cuda.reset_peak_memory_stats()
        self.pipe(**self.inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
