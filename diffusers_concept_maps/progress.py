"""Where a forward pass stands in a run: its denoising step and the rows of its guidance branches.

Everything is read from the pipeline, nothing is changed in it and no tensor value is looked at, so that a device never
waits for the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Place:
    """One forward pass.

    Attributes:
        step: 0-based denoising step.
        steps: number of steps of the run, None where only the transformer is known.
        starts_run: this is the first forward pass of a run.
        rows: number of videos of the run.
    """

    step: int
    steps: int | None
    starts_run: bool
    rows: int

    def branches(self, batch: int) -> Mapping[str, slice]:
        """Rows of a batch per guidance branch, "cond" and, under batched guidance, "uncond".

        Batched guidance puts the unconditional half first; once guidance is off, or a cache leaves that half out,
        there is none.
        """
        if batch == 2 * self.rows:
            return {"uncond": slice(0, self.rows), "cond": slice(self.rows, batch)}
        return {"cond": slice(0, batch)}


class RunTracker:
    """Follows the runs of one pipeline, or counts the forward passes of a bare transformer.

    A pipeline writes the timestep it works on into `_current_timestep` and clears it at the end, and its scheduler
    gets a new `timesteps` tensor at the start of every run: the identities of the two objects tell step and run. The
    timestep that the transformer is given is a view of the former. It is not in a forward pass that another pipeline
    makes with the same transformer, even if a run that raised has left `_current_timestep` behind. A pipeline that
    does not write it (ConsisID) is known by its timesteps, which are views of its scheduler's; it must then not
    share the scheduler with another pipeline of the same transformer.
    """

    def __init__(self, pipe: Any | None) -> None:
        """Assign only; `pipe` is None for a bare transformer."""
        self._pipe = pipe
        self._timestep: object = None
        self._schedule: object = None
        self._step = -1
        self._rows = 0

    def locate(self, batch: int, timestep: object) -> Place | None:
        """The place of the forward pass that is about to run, None if it does not belong to the traced pipeline.

        Args:
            batch: its batch size.
            timestep: what the transformer was given as such.
        """
        if self._pipe is None:
            self._step += 1
            return Place(self._step, None, self._step == 0, batch)
        current = _current(self._pipe, timestep)
        if current is None or current is self._timestep:
            return None
        self._timestep = current
        schedule = self._pipe.scheduler.timesteps
        starts_run = schedule is not self._schedule
        if starts_run:
            self._schedule, self._step = schedule, -1
            # Read once: dynamic guidance changes the scale during the run, the layout of the batch stays.
            self._rows = batch // 2 if self._pipe.guidance_scale > 1 else batch
        self._step += 1
        return Place(self._step, int(self._pipe.num_timesteps), starts_run, self._rows)


def _current(pipe: Any, timestep: object) -> object:
    """An object that stands for the timestep the pipeline works on, None if it is not the one that runs."""
    writes = hasattr(type(pipe), "current_timestep")
    own = getattr(pipe, "_current_timestep", None) if writes else pipe.scheduler.timesteps
    if not isinstance(own, torch.Tensor) or not isinstance(timestep, torch.Tensor):
        return None
    if own.untyped_storage().data_ptr() != timestep.untyped_storage().data_ptr():
        return None
    return own if writes else timestep
