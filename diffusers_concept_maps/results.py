"""The maps of one capture: means per method and guidance branch, their coverage, and kept axes on request."""

from __future__ import annotations

import json

import torch
from diffusers.utils import logging

from diffusers_concept_maps.accumulate import Accumulator
from diffusers_concept_maps.backbones import Grid
from diffusers_concept_maps.detail import DetailMaps, check_path
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.plan import CapturePlan

logger = logging.get_logger(__name__)

_FORMAT = "diffusers_concept_maps/detail/1"


class Results:
    """Filled by the recorder, read by `ConceptMaps`."""

    def __init__(self, plan: CapturePlan) -> None:
        """Nothing is recorded yet.

        Raises:
            ConceptMapsValueError: the file of the kept axes cannot be where it is wanted.
        """
        if plan.detail_path is not None:
            check_path(plan.detail_path)
        self._plan = plan
        self._steps: int | None = None
        self._grid = Grid(0, 0, 0)
        self._accumulators: dict[tuple[str, str], Accumulator] = {}
        self._detail: DetailMaps | None = None
        self._finished: dict[str, torch.Tensor] | None = None

    def start_run(self, steps: int | None) -> None:
        """A run of the pipeline begins, of so many steps if known: what an earlier one left is dropped."""
        self._steps = steps
        self._restart()

    def expect(self, grid: Grid, rows: dict[str, int]) -> None:
        """The next maps are on this grid, with so many rows per branch."""
        kept = [(a, rows[branch]) for (branch, _), a in self._accumulators.items() if branch in rows]
        if not all(accumulator.fits(grid, count) for accumulator, count in kept):
            logger.warning(
                "The size of the batch or of the token grid changed within a capture: its maps start anew. Use one "
                "capture per size to keep them all."
            )
            self._restart()
        self._grid = grid
        if self._plan.detail and self._detail is None:
            self._detail = self._start_detail(next(iter(rows.values())))  # branches are of the same videos

    def add(self, branch: str, method: str, step: int, layer: int, scores: torch.Tensor) -> None:
        """Add the map `[row, concept, token]` of one layer and step."""
        accumulator = self._accumulators.get((branch, method))
        if accumulator is None:
            again = self._plan.parity is not None and self._plan.parity.softmax_again
            accumulator = Accumulator(self._grid, softmax_steps=again and self._plan.methods[method].softmax)
            self._accumulators[branch, method] = accumulator
        accumulator.add(scores, step, layer)
        if self._detail is not None and "head" not in self._plan.detail:
            self._add_detail(branch, method, self._index(method, step, layer), scores)

    def add_head(self, branch: str, method: str, step: int, layer: int, head: int, scores: torch.Tensor) -> None:
        """Add the map `[row, concept, token]` of one head to the kept axes."""
        self._add_detail(branch, method, (*self._index(method, step, layer), head), scores)

    def close_step(self) -> None:
        """All layers of a step have been added."""
        for accumulator in self._accumulators.values():
            accumulator.close_step()

    def close(self, *, failed: bool) -> None:
        """The capture ends; kept axes are finished, or dropped if it failed."""
        if self._detail is not None and not failed:
            self._finished = self._detail.finish()
        elif self._detail is not None:
            self._detail.discard()
        self._detail = None

    def read(self, branch: str, method: str) -> torch.Tensor:
        """The map of one method, float32 on the CPU `[row, concept, frame, height, width]`.

        Raises:
            ConceptMapsError: nothing has been recorded.
        """
        return self._recorded(branch, method).mean()

    def coverage(self, branch: str, method: str) -> torch.Tensor:
        """Which steps and layers a map is made of, bool `[step, layer]`.

        Raises:
            ConceptMapsError: nothing has been recorded.
        """
        recorded = self._recorded(branch, method).recorded
        steps = self._steps if self._steps is not None else max(step for step, _ in recorded) + 1
        table = torch.zeros(steps, self._plan.depth, dtype=torch.bool)
        for step, layer in recorded:
            table[step, layer] = True
        return table

    def detail(self, branch: str, method: str) -> torch.Tensor:
        """Maps with the kept axes first `[layer, step, head, row, concept, frame, height, width]`.

        Raises:
            ConceptMapsError: none were asked for, or the capture has not ended well.
        """
        if not self._plan.detail:
            raise ConceptMapsError("no axes were kept; pass detail=('layer', 'step') or the like to the capture")
        if self._finished is None:
            raise ConceptMapsError(
                "maps of kept axes are complete after the `with` block, if a run was recorded and nothing raised in it"
            )
        self._recorded(branch, method)
        return self._finished[_tensor_name(branch, method)]

    def _restart(self) -> None:
        self._accumulators = {}
        if self._detail is not None:
            self._detail.discard()
        self._detail = None

    def _recorded(self, branch: str, method: str) -> Accumulator:
        accumulator = self._accumulators.get((branch, method))
        if accumulator is None or not accumulator.recorded:
            raise ConceptMapsError(
                f"nothing has been recorded for branch {branch!r}; run the traced pipeline inside the `with` block"
                + (", with guidance" if branch == "uncond" else "")
            )
        return accumulator

    def _start_detail(self, rows: int) -> DetailMaps:
        """Room for every branch of the plan: the first pass may have one only, and a later one the other as well."""
        grid, kept = (self._grid.frames, self._grid.height, self._grid.width), {}
        steps = self._recorded_steps() if "step" in self._plan.detail else []
        for method, plan in self._plan.methods.items():
            sizes = {"layer": len(plan.layers), "step": len(steps), "head": self._plan.head_count}
            axes = tuple(sizes[axis] for axis in self._plan.detail)
            for branch in self._plan.branches:
                kept[_tensor_name(branch, method)] = (*axes, rows, len(self._plan.names), *grid)
        header = {
            "format": _FORMAT,
            "axes": [*self._plan.detail, "row", "concept", "frame", "height", "width"],
            "concepts": self._plan.names,
            "steps": steps,
            "layers": {name: sorted(plan.layers) for name, plan in self._plan.methods.items()},
        }
        return DetailMaps(kept, len(self._plan.detail), self._plan.detail_path, json.dumps(header))

    def _recorded_steps(self) -> list[int]:
        """The steps that this run will record, for the step axis."""
        if self._steps is None and not isinstance(self._plan.steps, frozenset):
            raise ConceptMapsValueError(
                "detail keeps the step axis, and a bare transformer does not tell how many steps there will be; name "
                "them in steps="
            )
        if self._steps is None:
            return sorted(self._plan.steps)  # type: ignore[arg-type]  # a frozenset, see above
        return [step for step in range(self._steps) if self._plan.includes(step, self._steps)]

    def _index(self, method: str, step: int, layer: int) -> tuple[int, ...]:
        """Position along the kept layer and step axes."""
        place = {
            "layer": sorted(self._plan.methods[method].layers).index(layer),
            "step": self._recorded_steps().index(step) if "step" in self._plan.detail else 0,
        }
        return tuple(place[axis] for axis in self._plan.detail if axis in place)

    def _add_detail(self, branch: str, method: str, index: tuple[int, ...], scores: torch.Tensor) -> None:
        assert self._detail is not None  # axes are kept
        shape = (self._grid.frames, self._grid.height, self._grid.width)
        self._detail.add(_tensor_name(branch, method), index, torch.unflatten(scores, 2, shape))


def _tensor_name(branch: str, method: str) -> str:
    return f"{branch}.{method}"
