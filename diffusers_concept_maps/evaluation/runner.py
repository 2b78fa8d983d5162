"""Evaluation of a model's maps on a data set: sample by sample, resumable, by any number of processes.

Every sample's result depends on the sample and the settings alone, the seed of its noise being made of its name, so
that neither an interruption nor the number of processes changes the summary.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.utils import logging

import diffusers_concept_maps
from diffusers_concept_maps.capture import attach
from diffusers_concept_maps.encoding import encode
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.evaluation.datasets import Dataset, Sample, open_dataset
from diffusers_concept_maps.evaluation.judge import Judge
from diffusers_concept_maps.evaluation.processes import Process, meeting
from diffusers_concept_maps.evaluation.protocol import PROTOCOLS, Protocol, Settings, concepts_of, score_maps
from diffusers_concept_maps.evaluation.records import (
    SUMMARY,
    Writer,
    is_finished,
    open_run,
    read_records,
    write_json,
)
from diffusers_concept_maps.evaluation.summary import summarize
from diffusers_concept_maps.fitting import logger as fitting_logger
from diffusers_concept_maps.upsample import upsample_map

_ONE_PROCESS = Process()
_DEFAULTS = Settings()


def evaluate(
    pipe: Any,
    dataset: str,
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    settings: Settings = _DEFAULTS,
    dataset_options: Mapping[str, Any] | None = None,
    limit: int | None = None,
    model: str | None = None,
    judge: Judge | None = None,
    process: Process = _ONE_PROCESS,
) -> dict[str, Any] | None:
    """Score a model's maps on a data set, and write `summary.json`.

    Samples that are through stay so, whatever ends the run; started again with the same settings it goes on behind
    them. What failed is tried again then. Nothing of a sample is held but its line in `samples/rank_N.jsonl`.

    Args:
        pipe: a pipeline as `encode` takes it.
        dataset: one of `datasets.dataset_names()`.
        root: the folder it is in.
        out: the folder of the run, made if it is not there; that of an interrupted run resumes it.
        settings: see there.
        dataset_options: what the data set's reader takes, such as `split`, or `max_frames` and `stride`.
        limit: so many samples, from the first; None: all. May differ between runs in one folder.
        model: what to call the model in the results; None: where the pipeline was loaded from.
        judge: has maps of videos rated; None: none.
        process: which of the processes that share the samples this is; see `processes.this_process`.

    Returns:
        The summary (see `summary.summarize`) in process 0, None in the others.

    Raises:
        ConceptMapsError: the data set, the folder or a setting cannot be used, or another process has failed. A
            sample that cannot be read or scored raises nothing: its error is in the results.
    """
    samples = open_dataset(dataset, root, **(dataset_options or {}))
    folder, protocol = Path(out), PROTOCOLS[dataset]
    if judge is not None and not protocol.is_video:
        raise ConceptMapsValueError(f"a judge rates maps of videos, and {dataset} has images; leave the judge out")
    if limit is not None and limit < 1:
        raise ConceptMapsValueError(f"limit is {limit}; expected at least 1, or None for all samples")
    _check(pipe, settings)
    run = describe_run(pipe, samples, settings, dataset_options or {}, model, judge)
    names = samples.names()[:limit]
    work = _Work(pipe, samples, protocol, settings, judge)
    with meeting(process) as meet:
        if process.rank == 0:
            open_run(folder, run)
        meet()
        open_run(folder, run)
        _do(work, process.deal(names), folder, process)
        meet()
    return _finish(folder, run, names) if process.rank == 0 else None


def describe_run(
    pipe: Any,
    samples: Dataset[Any],
    settings: Settings,
    dataset_options: Mapping[str, Any],
    model: str | None,
    judge: Judge | None,
) -> dict[str, Any]:
    """What the results of a run depend on, JSON-compatible; a folder holds results of one such run."""
    names = "\n".join(samples.names())
    return {
        "dataset": samples.name,
        "dataset_options": {name: _option(value) for name, value in dataset_options.items()},
        "samples": len(samples),
        "samples_sha256": hashlib.sha256(names.encode()).hexdigest(),
        "model": model or str(pipe.name_or_path),
        "pipeline": type(pipe).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "settings": settings.to_json(),
        "judge": None if judge is None else judge.name,
        "versions": {
            "diffusers_concept_maps": diffusers_concept_maps.__version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _option(value: Any) -> str:
    """An option of a reader; of a file, such as that of categories, what is in it."""
    if isinstance(value, str | os.PathLike) and Path(value).is_file():
        return f"sha256 {hashlib.sha256(Path(value).read_bytes()).hexdigest()}"
    return str(value)


def _check(pipe: Any, settings: Settings) -> None:
    """Raise what every sample would raise."""
    attach(pipe, settings.background, single_passes=True, **settings.map_options).remove(failed=True)
    mode, guide = settings.upsampling, torch.zeros(1, 3, 4, 4)
    upsample_map(
        torch.zeros(1, 2, 2),
        (4, 4),
        1,
        mode=mode,
        temporal=settings.temporal,
        guide=guide if mode == "guided" else None,
    )


def seed_of(name: str, seed: int) -> int:
    """The seed of a sample's noise, from 0 to 2**32 - 1, made of its name and that of the run."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")


@dataclass(frozen=True)
class _Work:
    """What is done to every sample."""

    pipe: Any
    samples: Dataset[Any]
    protocol: Protocol
    settings: Settings
    judge: Judge | None

    def record(self, name: str) -> dict[str, Any]:
        """The result of one sample, with its error where it has none."""
        try:
            return {"sample": name, **self._scored(self.samples.read(name))}
        except (ConceptMapsError, OSError) as error:
            return {"sample": name, "error": f"{type(error).__name__}: {error}"}

    def _scored(self, sample: Sample) -> dict[str, Any]:
        settings = self.settings
        if len(sample.classes) == 1:
            return {"skipped": "it shows no class but the background"}
        concepts, _ = concepts_of(sample.classes, settings.background)
        seed = seed_of(sample.name, settings.seed)
        maps = encode(
            self.pipe,
            sample.frames,
            concepts,
            noise_level=settings.noise_levels,
            prompt=sample.caption,
            num_samples=settings.num_samples,
            seed=seed,
            size=settings.size,
            num_frames=settings.num_frames,
            **settings.map_options,
        )
        return {
            "classes": list(sample.classes),
            "concepts": list(concepts),
            "caption": sample.caption,
            "seed": seed,
            "source": maps.metadata["source"],
            "methods": score_maps(maps, sample, self.protocol, settings, self.judge),
        }


def _do(work: _Work, names: tuple[str, ...], folder: Path, process: Process) -> None:
    """Score the samples of one process that are not through yet, showing how far the first process is."""
    known = read_records(folder)
    left = [name for name in names if not is_finished(known.get(name, {}))]
    del known
    title = "samples" if process.count == 1 else f"samples of process 1 of {process.count}"
    done, is_shown = len(names) - len(left), process.rank == 0
    with (
        _quiet_about_lengths(),
        Writer(folder, process.rank) as writer,
        logging.tqdm(desc=title, total=len(names), initial=done, disable=not is_shown) as bar,
    ):
        for name in left:
            writer.add(work.record(name))
            bar.update()


@contextmanager
def _quiet_about_lengths() -> Iterator[None]:
    """Without a warning for every clip that is longer than what the model takes; the summary counts them."""

    def drop(_: Any) -> bool:
        return False

    fitting_logger.addFilter(drop)
    try:
        yield
    finally:
        fitting_logger.removeFilter(drop)


def _finish(folder: Path, run: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Write the summary."""
    records = read_records(folder)
    if missing := [name for name in names if name not in records]:
        raise ConceptMapsError(
            f"{len(missing)} of {len(names)} samples have no result in {str(folder)!r}, such as {missing[0]!r}; "
            f"expected all processes to write to one folder; give it where every machine sees it"
        )
    summary = summarize(run, names, records)
    write_json(folder / SUMMARY, summary)
    return summary
