"""Running mean of a method's maps over layers and steps: one float32 tensor, however many there are."""

from __future__ import annotations

import torch

from diffusers_concept_maps.backbones import Grid


class Accumulator:
    """Sum and count of the maps `[row, concept, token]` of one method and guidance branch."""

    def __init__(self, grid: Grid) -> None:
        """Assign only; memory is taken by the first map."""
        self.grid = grid
        self._total: torch.Tensor | None = None
        self._count = 0

    def fits(self, grid: Grid, rows: int) -> bool:
        """Whether maps of this grid and number of rows can be added."""
        return grid == self.grid and (self._total is None or self._total.shape[0] == rows)

    def add(self, scores: torch.Tensor) -> None:
        """Add the float32 map `[row, concept, token]` of one layer and step."""
        if self._total is None:
            # An ordinary tensor even under inference mode, so that later calls outside of it may add in place.
            with torch.inference_mode(False):
                self._total = torch.zeros(scores.shape, dtype=torch.float32, device=scores.device)
        self._total.add_(scores)
        self._count += 1

    def mean(self) -> torch.Tensor:
        """Mean over what was added, as float32 CPU tensor `[row, concept, frame, height, width]`."""
        assert self._total is not None  # accumulators are made when there is something to add
        shape = (self.grid.frames, self.grid.height, self.grid.width)
        return torch.unflatten(self._total / self._count, 2, shape).cpu()
