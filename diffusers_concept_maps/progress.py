"""Where a forward pass stands in a run: its denoising step and the rows of its guidance branches.

Everything is read from the pipeline and nothing is changed in it. No tensor value is looked at, so that a device never
waits for the host, unless the pipeline hands its transformer copies of timesteps: then one number per forward pass is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.utils import logging

from diffusers_concept_maps.backbones import Backbone
from diffusers_concept_maps.errors import ConceptMapsError

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Place:
    """One forward pass.

    Attributes:
        step: 0-based denoising step.
        steps: number of steps of the run, None where only the transformer is known.
        starts_run: this is the first forward pass of a run.
        rows: number of videos of the run.
        branch: the guidance branch that it is, where each has a forward pass of its own; None where they share one.
            "further" is a pass beside a shared one, for guidance that is not classifier-free (LTX-2).
    """

    step: int
    steps: int | None
    starts_run: bool
    rows: int
    branch: str | None = None

    def branches(self, batch: int) -> Mapping[str, slice]:
        """Rows of a batch per guidance branch, "cond" and "uncond", or one branch.

        Batched guidance puts the unconditional half first; once guidance is off, or a cache leaves that half out,
        there is none.
        """
        if self.branch is not None:
            return {self.branch: slice(0, batch)}
        if batch == 2 * self.rows:
            return {"uncond": slice(0, self.rows), "cond": slice(self.rows, batch)}
        return {"cond": slice(0, batch)}


class RunTracker:
    """Follows the runs of one pipeline, or counts the forward passes of a bare transformer.

    A pipeline's scheduler gets a new `timesteps` tensor at the start of every run, and most pipelines write the
    timestep they work on, a new object in every step, into `_current_timestep` and clear it at the end (Cosmos 2.5
    writes its number): the identities of these objects tell run and step. Which forward passes are the pipeline's own,
    and no other pipeline's with the same transformer, the timestep tells that the transformer is given:

    - It is a view of what the pipeline has written, even if a run that raised has left that behind, or of the
      scheduler's timesteps where the pipeline writes nothing (ConsisID); such a pipeline must not share its scheduler
      with another one of the same transformer.
    - Or it is a copy, of another scale or dtype: then it must have the value that `Backbone.timesteps` gives for the
      current step or, where the pipeline writes nothing, for this step or the next; if rounding makes them one, the
      number of passes tells, where `Backbone.passes` knows it. Whatever else a new step begins with is an error, since
      its place would be a guess, but for what comes after the last step.
    - Or it is a copy of what the pipeline has written, with a timestep for every frame (diffusion forcing). All passes
      of a run then have to be over the same frames.

    Where a guided step has two forward passes, the conditional one is the first.
    """

    def __init__(self, pipe: Any | None, backbone: Backbone) -> None:
        """Nothing has run yet.

        Args:
            pipe: the pipeline; None for a bare transformer.
            backbone: of its transformer.
        """
        self._pipe: Any = pipe
        self._backbone = backbone
        self._writes = hasattr(type(pipe), "current_timestep")
        self._left = None if pipe is None else self._own()  # by an earlier run: it stands for no step of ours
        self._schedule: object = None
        self._current: object = None  # kept, so that no other object gets the id in the mark
        self._mark: tuple[int, int] | None = None
        self._step = -1
        self._passes = 0
        self._rows = 0
        self._warned = False

    def locate(self, batch: int, timestep: object) -> Place | None:
        """The place of the forward pass that is about to run, None if it does not belong to the traced pipeline.

        Args:
            batch: its batch size.
            timestep: what the transformer was given as such.

        Raises:
            ConceptMapsError: the pipeline makes it, but its place cannot be told.
        """
        if self._pipe is None:
            self._step += 1
            return Place(self._step, None, self._step == 0, batch)
        own = self._own()
        if own is None or not isinstance(timestep, torch.Tensor):
            return None
        mark = self._mark_of(own, timestep)
        if mark is None or self._has_other_rows():
            return None
        if mark == self._mark:
            return self._further_pass(batch)
        self._mark, self._current, self._passes = mark, own, 1
        schedule = self._pipe.scheduler.timesteps
        starts_run = schedule is not self._schedule
        batched = self._backbone.batched_guidance
        if starts_run:
            self._schedule, self._step = schedule, -1
            # Read once: dynamic guidance changes the scale during the run, the layout of the batch stays.
            self._rows = batch // 2 if batched and self._is_guided() else batch
        self._step += 1
        return self._place(starts_run, None if batched else "cond")

    def _place(self, starts_run: bool, branch: str | None) -> Place:
        return Place(self._step, int(self._pipe.num_timesteps), starts_run, self._rows, branch)

    def _has_other_rows(self) -> bool:
        """Whether rows of a batch are of a third kind, neither conditional nor unconditional; says so, once.

        It is no error, because the host's pipelines (SD3) leave processors of theirs behind where one is raised.
        """
        if not getattr(self._pipe, "do_perturbed_attention_guidance", False):
            return False
        if not self._warned:
            self._warned = True
            logger.warning(
                f"{type(self._pipe).__name__} adds rows for perturbed attention to its batches, of which the guidance "
                f"branches cannot be told: nothing is recorded of this run. Call it with pag_scale=0."
            )
        return True

    def _is_guided(self) -> bool:
        """Whether there are two branches; scales of other kinds than `guidance_scale` may have a say in it (LTX-2)."""
        guided = getattr(self._pipe, "do_classifier_free_guidance", None)
        return bool(self._pipe.guidance_scale > 1 if guided is None else guided)

    def _own(self) -> object:
        """What the pipeline writes its timestep into; what its timesteps are taken from, if it does not."""
        return getattr(self._pipe, "_current_timestep", None) if self._writes else self._pipe.scheduler.timesteps

    def _further_pass(self, batch: int) -> Place | None:
        """Another pass in the same step: of guidance in two passes, of further guidance, or of somebody else."""
        if self._backbone.batched_guidance:
            return self._place(starts_run=False, branch="further") if batch == self._rows else None
        self._passes += 1
        if self._passes > 2 and 0 < self._step == int(self._pipe.num_timesteps) - 1:
            return None  # no step before had a third one, and the run may have ended: this is somebody else's
        if self._passes > 2:
            raise ConceptMapsError(
                f"step {self._step} has more than two forward passes, where guidance has a conditional and an "
                f"unconditional one; use the transformer for nothing else while the pipeline runs"
            )
        return self._place(starts_run=False, branch="uncond")

    def _mark_of(self, own: object, timestep: torch.Tensor) -> tuple[int, int] | None:
        """What all passes of a step have in common and those of no other; None if the pipeline does not make it."""
        if isinstance(own, torch.Tensor) and _share(own, timestep):
            return id(own), 0 if self._writes else timestep.data_ptr()
        if own is self._left:
            return None
        schedule: torch.Tensor = self._pipe.scheduler.timesteps
        if self._writes and isinstance(own, torch.Tensor) and own.ndim == 1:
            return self._check_frames(own, timestep, schedule)
        handed = self._backbone.handed_timesteps(self._pipe, schedule.to(timestep.device), timestep.dtype)
        if handed is None:
            return None
        # Where tokens have timesteps of their own, the largest: frames that are given have smaller ones. The smallest
        # where these frames keep some noise, and the others have less in the end.
        found = _places(handed, timestep.amax()) or _places(handed, timestep.amin())
        return self._check_written(own, schedule, found) if self._writes else self._check_next(schedule, found)

    def _check_frames(
        self, own: torch.Tensor, timestep: torch.Tensor, schedule: torch.Tensor
    ) -> tuple[int, int] | None:
        """The pipeline has written a timestep for every frame `[frame]`, and hands over `[video, frame]`."""
        if timestep.ndim != 2:
            return None
        # The rows of one loop are views of one tensor; every window has a loop of its own.
        same_loop = schedule is not self._schedule or _share(own, cast(torch.Tensor, self._current))
        if timestep.shape[1] != own.shape[0] or not same_loop:
            raise ConceptMapsError(
                f"{type(self._pipe).__name__} makes this clip in windows that overlap, and each would have maps of "
                f"its own; generate no more frames than base_num_frames, or without overlap_history"
            )
        # The first frames may be noised anew, and then have another timestep than the one it has written.
        return (id(own), 0) if bool(timestep[0, -1] == own[-1]) else None

    def _check_written(self, own: object, schedule: torch.Tensor, found: list[int]) -> tuple[int, int] | None:
        """The timestep handed over has to be the one that the pipeline has written, at one of the places `found`."""
        if isinstance(own, torch.Tensor) and _share(own, schedule):
            place = (own.storage_offset() - schedule.storage_offset()) // schedule.stride(0)
            found = [place] if place in found else []
        if found:
            # A number may be the same object in two runs, whose schedules are not.
            return id(own), 0 if isinstance(own, torch.Tensor) else id(schedule)
        if own is self._current:  # the step has begun: this is somebody else's pass
            return None
        raise self._unknown("is not the one it has written")

    def _check_next(self, schedule: torch.Tensor, found: list[int]) -> tuple[int, int] | None:
        """The timestep handed over has to be that of the current step or of the next, and of no other."""
        expected = self._backbone.passes(self._pipe)
        if schedule is self._schedule and self._mark is not None:
            near = [place for place in found if place - self._mark[1] in (0, 1)]
            if not found or (not near and self._mark[1] == len(schedule) - 1):  # the latter after the end of a run
                return None
            found = near
            if len(found) == 2 and expected is not None:
                found = found[:1] if self._passes < expected else found[1:]
        elif expected is not None:  # of a new run, whose first timestep may be rounded to the second
            found = found[:1]
        if len(found) != 1:
            raise self._unknown("is not that of one step alone, the current or the next")
        return id(schedule), found[0]

    def _unknown(self, what: str) -> ConceptMapsError:
        last = f"after step {self._step}" if self._step >= 0 else "at the start of a run"
        return ConceptMapsError(
            f"the timestep that {type(self._pipe).__name__} hands to its transformer {last} {what}, so that its step "
            f"cannot be told. Use the transformer for nothing else while the pipeline runs, and fewer steps or "
            f"float32 where timesteps are rounded to the same number; or trace the transformer itself"
        )


def _places(handed: torch.Tensor, value: torch.Tensor) -> list[int]:
    """Which steps that value is handed over in, in any of the ways `[..., step]`."""
    places: list[int] = (handed == value).reshape(-1, handed.shape[-1]).any(0).nonzero().flatten().tolist()
    return places


def _share(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether one is a view of the other, or both are of a third."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
