"""Running means of maps over layers and steps: one float32 tensor each, however many layers and steps there are."""

from __future__ import annotations

import torch

from diffusers_concept_maps.backbones import Grid


class Accumulator:
    """Mean of the maps `[row, concept, token]` of one method and guidance branch, and where they came from.

    Attributes:
        grid: token grid of the maps.
        recorded: the (step, layer) pairs that the mean is made of.
    """

    def __init__(self, grid: Grid, softmax_steps: bool) -> None:
        """Assign only; memory is taken by the first map.

        Args:
            grid: token grid of the maps.
            softmax_steps: softmax the mean over the layers of every step before it is added to the others.
        """
        self.grid = grid
        self.recorded: set[tuple[int, int]] = set()
        self._softmax_steps = softmax_steps
        self._total: torch.Tensor | None = None
        self._count = 0
        self._step: torch.Tensor | None = None
        self._step_recorded: set[tuple[int, int]] = set()

    def fits(self, grid: Grid, rows: int) -> bool:
        """Whether maps of this grid and number of rows can be added."""
        total = self._total if self._total is not None else self._step
        return grid == self.grid and (total is None or total.shape[0] == rows)

    def add(self, scores: torch.Tensor, step: int, layer: int) -> None:
        """Add the float32 map `[row, concept, token]` of one layer and step."""
        if self._softmax_steps:
            if any(other != step for other, _ in self._step_recorded):  # left by a pass that raised
                self._step, self._step_recorded = None, set()
            self._step = _sum(self._step, scores)
            self._step_recorded.add((step, layer))
        else:
            self._total, self._count = _sum(self._total, scores), self._count + 1
            self.recorded.add((step, layer))

    def close_step(self) -> None:
        """All layers of a step have been added."""
        if self._step is not None:
            mean = self._step / len(self._step_recorded)
            self._total, self._count = _sum(self._total, _softmax_or_rescale(mean)), self._count + 1
            self.recorded |= self._step_recorded
            self._step, self._step_recorded = None, set()

    def mean(self) -> torch.Tensor:
        """Mean over what was added, as float32 CPU tensor `[row, concept, frame, height, width]`."""
        assert self._total is not None  # only called where `recorded` has something
        shape = (self.grid.frames, self.grid.height, self.grid.width)
        return torch.unflatten(self._total / self._count, 2, shape).cpu()


def _sum(total: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
    if total is None:
        # An ordinary tensor even under inference mode, so that later calls outside of it may add in place.
        with torch.inference_mode(False):
            total = torch.zeros(scores.shape, dtype=torch.float32, device=scores.device)
    return total.add_(scores)


def _softmax_or_rescale(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the concepts; a single concept is scaled to 0..1 over its clip."""
    if scores.shape[1] > 1:
        return scores.softmax(1)
    low, high = scores.amin((1, 2), keepdim=True), scores.amax((1, 2), keepdim=True)
    return (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny)
