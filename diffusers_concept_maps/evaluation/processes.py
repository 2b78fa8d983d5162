"""The processes of one launch, as `accelerate launch` and `torchrun` describe them to each in its environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError

_PATIENCE = timedelta(days=30)  # the slowest process may have hours of samples left; launchers end all if one fails
_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Process:
    """One of the processes that share the samples of a data set.

    Attributes:
        rank: from 0.
        count: of processes.
        local_rank: among those of this machine; the number of its GPU.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count or self.local_rank < 0:
            raise ConceptMapsValueError(
                f"process {self.rank} of {self.count} with local rank {self.local_rank}; expected ranks from 0, below "
                f"the number of processes"
            )

    def deal(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """This process's share of the names, one in turn to each."""
        return names[self.rank :: self.count]


def this_process() -> Process:
    """The process that a launcher made of this one; without a launcher, the only one.

    Raises:
        ConceptMapsValueError: the environment variables of launchers are no numbers, or incomplete.
    """
    if "WORLD_SIZE" not in os.environ:
        return Process()
    try:
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return Process(rank, count, int(os.environ.get("LOCAL_RANK", rank)))
    except (KeyError, ValueError) as error:
        raise ConceptMapsValueError(
            f"the environment variables RANK, WORLD_SIZE and LOCAL_RANK do not describe a process ({error}); start "
            f"with `accelerate launch` or `torchrun`, or unset WORLD_SIZE"
        ) from error


@contextmanager
def meeting(process: Process) -> Iterator[Callable[[], None]]:
    """A function that returns once every process of the launch has called it as often.

    Nothing is exchanged but that: it needs no GPU, and an initialized process group is left as it is.

    Raises:
        ConceptMapsError: the processes cannot find each other, or, from the function, one of them is gone.
    """
    if process.count == 1:
        yield lambda: None
        return
    from torch import distributed

    is_own = not distributed.is_initialized()
    if is_own:
        if missing := [name for name in _RENDEZVOUS if name not in os.environ]:
            raise ConceptMapsError(
                f"{process.count} processes and no {' and '.join(missing)} to meet at; start with `accelerate launch` "
                f"or `torchrun`, which set them"
            )
        distributed.init_process_group("gloo", rank=process.rank, world_size=process.count, timeout=_PATIENCE)
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE)

    def meet() -> None:
        try:
            distributed.barrier(group)
        except RuntimeError as error:
            raise ConceptMapsError(
                f"another of the {process.count} processes has ended early; see what it said, and start again: "
                f"finished samples are kept"
            ) from error

    try:
        yield meet
    finally:
        if is_own:
            distributed.destroy_process_group()
