"""Times on a GPU by CUDA events, always in interleaved pairs, and the two ceilings of the card.

Without a GPU the same code runs everything once and measures nothing: every time is NaN.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from benchmark_capture import bootstrap_interval

FLUSH_BYTES = 1 << 30  # more than any cache, and long enough for the host to queue what is timed behind it
SECONDS = 8.0  # after which a comparison has pairs enough
FEWEST_PAIRS = 5


@dataclass(frozen=True)
class Paired:
    """Two things timed in turns.

    Attributes:
        first: median milliseconds.
        second: likewise.
        ratio: median over the pairs of first / second.
        low: lower end of the 95% bootstrap interval of that median.
        high: upper end.
        pairs: how many.
    """

    first: float
    second: float
    ratio: float
    low: float
    high: float
    pairs: int


class Clock:
    """Measures on "cuda"; elsewhere it runs and measures nothing.

    Attributes:
        measures: whether there are times.
    """

    def __init__(self, device: str) -> None:
        self.measures = device == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self.measures else 0, dtype=torch.uint8, device=device)

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Time of one run with cold caches; NaN where nothing is measured."""
        if not self.measures:
            run()
            return float("nan")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def pair(self, first: Callable[[], object], second: Callable[[], object], pairs: int) -> Paired:
        """Time both in turns, each first every other time, after one untimed run of each."""
        return paired(
            lambda: self.milliseconds(first), lambda: self.milliseconds(second), pairs if self.measures else 0
        )

    def median(self, run: Callable[[], object], times: int = 20) -> float:
        """Median time of several runs, after an untimed one."""
        run()
        taken = [self.milliseconds(run) for _ in range(times if self.measures else 0)]
        return torch.tensor(taken).median().item() if taken else float("nan")


def paired(first: Callable[[], float], second: Callable[[], float], pairs: int) -> Paired:
    """Call two functions that return milliseconds in turns; with `pairs` 0 once each, for the NaNs."""
    first(), second()
    taken: list[tuple[float, float]] = []
    begin = time.monotonic()
    while len(taken) < pairs and (len(taken) < FEWEST_PAIRS or time.monotonic() - begin < SECONDS):
        if len(taken) % 2:
            late = second()
            taken.append((first(), late))
        else:
            early = first()
            taken.append((early, second()))
    if not taken:
        nan = float("nan")
        return Paired(nan, nan, nan, nan, nan, 0)
    table = torch.tensor(taken, dtype=torch.float64)
    ratios = table[:, 0] / table[:, 1]
    low, high = bootstrap_interval(ratios)
    medians = table.quantile(0.5, dim=0).tolist()
    return Paired(*medians, ratios.quantile(0.5).item(), low, high, len(taken))


@dataclass(frozen=True)
class Ceilings:
    """What the card can do at most, measured.

    Attributes:
        bandwidth: bytes per millisecond, read and written, of a copy.
        matmul: operations per millisecond of a bfloat16 matrix product.
    """

    bandwidth: float
    matmul: float

    def floor(self, moved: float, operations: float) -> float:
        """Milliseconds below which nothing that moves and computes that much can be."""
        return max(moved / self.bandwidth, operations / self.matmul)


def measure_ceilings(clock: Clock, device: str) -> Ceilings:
    """Copy 4 GB, multiply matrices of 8192 x 8192; on a CPU tiny ones."""
    count, size = (1 << 30, 8192) if clock.measures else (1 << 10, 16)
    source = torch.zeros(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * 4 * count / clock.median(lambda: target.copy_(source))
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    return Ceilings(bandwidth, 2 * size**3 / clock.median(lambda: left @ right))
