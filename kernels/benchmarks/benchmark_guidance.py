"""What a guided step costs over an unguided one: process CPU time, one thread, interleaved pairs.

A stock CogVideoX pipeline of 12 layers around a transformer of random weights takes one step with classifier-free
guidance, that is with a batch of 2. The first guided layer is at the depth of the 2B preset (13 of 30), and the two
others at the depths of its others; attention has about the share of a block's operations that it has at full size.
The whole step is timed, the scheduler's part included. In the official implementation it takes 1.77 times as long.

The guided prediction must be that of the formula with three terms, from stock attention with all its weights at hand,
and the stock one must be the same bit for bit with a scale of 0; otherwise no ratio is printed.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from benchmark_capture import Size, bootstrap_interval, guided_step, stock_pipeline
from torch.nn import functional

import diffusers_concept_maps as dcm

LIMIT = 1.35
TOLERANCE = 1e-4
DEPTHS, OF = (13, 17, 21), 30
FULL = Size(frames=13, height=12, width=15, heads=4, head_width=64, layers=12, text=32, text_width=256)
SMALL = Size(frames=3, height=4, width=5, heads=2, head_width=16, layers=12, text=8, text_width=32)


def guided_layers(size: Size) -> tuple[int, ...]:
    """The layers of the preset, brought to the depth of this transformer."""
    return tuple(depth * size.layers // OF for depth in DEPTHS)


@contextmanager
def cut_attention(size: Size, layers: tuple[int, ...]) -> Iterator[None]:
    """Within the context the attention calls of these numbers have no weights between frames, and are naive."""
    frame = torch.full((size.text + size.frames * size.height * size.width,), -1)
    frame[size.text :] = torch.arange(size.frames).repeat_interleave(size.height * size.width)
    allowed = (frame[:, None] == frame) | (frame[:, None] < 0) | (frame < 0)
    stock, calls = functional.scaled_dot_product_attention, iter(range(size.layers))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        if next(calls) not in layers:
            return stock(query, key, value, **options)
        return ((query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1) * allowed) @ value

    functional.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = stock  # type: ignore[assignment]


class Subject:
    """A pipeline of one size with fixed inputs."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.pipe = stock_pipeline(size)
        self.inputs = guided_step(size)

    def step(self, scale: float | None) -> tuple[float, torch.Tensor, dict[str, Any]]:
        """CPU seconds of a step, the prediction `[2, ...]` that the pipeline gets, and what it is made of.

        Args:
            scale: of the guidance; None is stock.
        """
        seen: dict[str, Any] = {}

        def look(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            seen.update(kwargs, prediction=output[0])

        if scale is None:
            return self._timed(look, seen)
        with dcm.cross_attention_guidance(self.pipe, scale, layers=guided_layers(self.size)):
            return self._timed(look, seen)

    def _timed(self, look: Any, seen: dict[str, Any]) -> tuple[float, torch.Tensor, dict[str, Any]]:
        hook = self.pipe.transformer.register_forward_hook(look, with_kwargs=True)
        start = time.process_time()
        self.pipe(**self.inputs)
        seconds = time.process_time() - start
        hook.remove()
        return seconds, seen.pop("prediction"), seen

    def check(self) -> float:
        """The largest difference between the guided prediction and the formula, relative to what guidance changes.

        Raises:
            SystemExit: it is too large, or a scale of 0 changes something.
        """
        _, stock, call = self.step(None)
        if not torch.equal(self.step(0.0)[1], stock):
            raise SystemExit("a scale of 0 is not stock: no ratio is reported")
        _, guided, _ = self.step(1.0)
        row = {name: value[1:] if name in _BATCHED else value for name, value in call.items()}
        with torch.no_grad(), cut_attention(self.size, guided_layers(self.size)):
            cut = self.pipe.transformer(**row)[0]
        expected = stock + (stock[1:] - cut)
        difference = float((guided - expected).abs().max() / (expected - stock).abs().max())
        if not difference <= TOLERANCE:
            raise SystemExit(f"the guided prediction is off by {difference:.2g}: no ratio is reported")
        return difference

    def pair(self, *, guided_first: bool) -> tuple[float, float]:
        """CPU seconds of an unguided and a guided step."""
        order = (1.0, None) if guided_first else (None, 1.0)
        seconds = {scale: self.step(scale)[0] for scale in order}
        return seconds[None], seconds[1.0]


_BATCHED = ("hidden_states", "encoder_hidden_states", "timestep")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9, help="timed pairs")
    parser.add_argument("--small", action="store_true", help="a size of milliseconds, to check that the script works")
    options = parser.parse_args()
    if options.pairs < 1:
        parser.error(f"--pairs is {options.pairs}; expected at least 1")
    torch.set_num_threads(1)
    size = SMALL if options.small else FULL
    print(f"{size}\nguided layers {guided_layers(size)}; batch 2, float32, one thread")
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {platform.platform()}", flush=True)
    subject = Subject(size)
    difference = subject.check()  # warms up as well
    ratios = []
    for index in range(options.pairs):
        stock, guided = subject.pair(guided_first=index % 2 == 1)
        ratios.append(guided / stock)
        print(f"pair {index + 1}: {stock:.4g} s without, {guided:.4g} s with, ratio {ratios[-1]:.3f}", flush=True)
    table = torch.tensor(ratios, dtype=torch.float64)
    low, high = bootstrap_interval(table)
    print(
        f"off the formula by {difference:.2g}; median ratio {table.quantile(0.5):.3f}, "
        f"95% bootstrap interval {low:.3f} to {high:.3f}, {min(ratios):.3f} to {max(ratios):.3f} in {options.pairs} "
        f"pairs; at most {LIMIT} is wanted at full size"
    )


if __name__ == "__main__":
    main()
