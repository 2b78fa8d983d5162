"""Where a forward pass stands in a run: its denoising step and the rows of its guidance branches.

Everything is read from the pipeline, nothing is changed in it and no tensor value is looked at, so that a device never
waits for the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """One forward pass.

    Attributes:
        step: 0-based denoising step.
        steps: number of steps of the run, None where only the transformer is known.
        starts_run: this is the first forward pass of a run.
        branches: rows of the batch per guidance branch, "cond" and, under batched guidance, "uncond".
    """

    step: int
    steps: int | None
    starts_run: bool
    branches: Mapping[str, slice]


class RunTracker:
    """Follows the runs of one pipeline, or counts the forward passes of a bare transformer.

    A pipeline writes the timestep it works on into `_current_timestep` and clears it at the end, and its scheduler
    gets a new `timesteps` tensor at the start of every run: the identities of the two objects tell step and run. A
    forward pass that another pipeline makes with the same transformer finds `_current_timestep` empty, or, after a
    run that raised, unchanged.
    """

    def __init__(self, pipe: Any | None) -> None:
        """Assign only; `pipe` is None for a bare transformer."""
        self._pipe = pipe
        self._timestep: object = None
        self._schedule: object = None
        self._step = -1
        self._rows = 0

    def locate(self, batch: int) -> Place | None:
        """The place of the forward pass that is about to run, None if it does not belong to the traced pipeline.

        Args:
            batch: its batch size.
        """
        if self._pipe is None:
            self._step += 1
            return Place(self._step, None, self._step == 0, {"cond": slice(0, batch)})
        timestep = self._pipe._current_timestep
        if timestep is None or timestep is self._timestep:
            return None
        self._timestep = timestep
        schedule = self._pipe.scheduler.timesteps
        starts_run = schedule is not self._schedule
        if starts_run:
            self._schedule, self._step = schedule, -1
            # Read once: dynamic guidance changes the scale during the run, the layout of the batch stays.
            self._rows = batch // 2 if self._pipe.guidance_scale > 1 else batch
        self._step += 1
        return Place(self._step, int(self._pipe.num_timesteps), starts_run, self._branches(batch))

    def _branches(self, batch: int) -> Mapping[str, slice]:
        """Batched guidance puts the unconditional half first; once guidance is off there is no such half."""
        if batch == 2 * self._rows:
            return {"uncond": slice(0, self._rows), "cond": slice(self._rows, batch)}
        return {"cond": slice(0, batch)}
