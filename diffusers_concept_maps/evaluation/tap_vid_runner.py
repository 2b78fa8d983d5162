"""TAP-Vid evaluation of point tracking by any model: video by video, resumable.

Source: Doersch et al., "TAP-Vid: A Benchmark for Tracking Any Point in a Video", NeurIPS 2022 (arXiv 2211.03726).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging

import diffusers_concept_maps
from diffusers_concept_maps.correspondence.tracking import track
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.evaluation.published import PUBLISHED
from diffusers_concept_maps.evaluation.records import (
    SUMMARY,
    Writer,
    is_finished,
    open_run,
    read_records,
    write_json,
)
from diffusers_concept_maps.evaluation.tap_vid import TrackSample, read_davis, read_kinetics, read_rgb_stacking
from diffusers_concept_maps.evaluation.tracking import QueryMode, sample_queries, score_tracks

READERS: dict[str, tuple[Callable[..., Iterator[TrackSample]], str]] = {
    "davis": (read_davis, "tapvid_davis.pkl"),
    "kinetics": (read_kinetics, ""),
    "rgb-stacking": (read_rgb_stacking, "tapvid_rgb_stacking.pkl"),
}
"""What reads each part of the benchmark, and its file in the folder that is given; Kinetics is a folder of files."""


def evaluate_tap_vid(
    pipe: Any,
    dataset: str,
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    mode: QueryMode = "first",
    limit: int | None = None,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score tracks of the benchmark's videos, at its 256 x 256 pixels, and write `summary.json`.

    Videos that are through stay so, whatever ends the run; started again with the same settings it goes on behind
    them, and tries those that failed again.

    Args:
        pipe: as for `track`.
        dataset: one of `READERS`.
        root: the folder with the files, or the file.
        out: the folder of the run, made if it is not there.
        mode: "first" or "strided", as `evaluation.tracking.sample_queries` has them.
        limit: so many videos, from the first; None: all.
        model: what to call the model in the results; None: where the pipeline was loaded from.
        options: of `track`, JSON-compatible.

    Returns:
        `scores`, means over videos of the scores of `TrackScores.as_dict`, None where a video has none; `videos`, how
        many; `failed`, the error of each that has one; `published`, other scores on the data set, in lines of text.

    Raises:
        ConceptMapsError: the files, the folder or a setting cannot be used, or no video could be scored.
    """
    if dataset not in READERS:
        raise ConceptMapsValueError(f"unknown part {dataset!r} of TAP-Vid; expected one of {', '.join(READERS)}")
    if limit is not None and limit < 1:
        raise ConceptMapsValueError(f"limit is {limit}; expected at least 1, or None for all videos")
    reader, file = READERS[dataset]
    path, folder, options = Path(root), Path(out), dict(options or {})
    run = {
        "dataset": f"tap-vid-{dataset}",
        "mode": mode,
        "model": model or str(pipe.name_or_path),
        "pipeline": type(pipe).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "options": options,
        "versions": {
            "diffusers_concept_maps": diffusers_concept_maps.__version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
        },
    }
    samples = islice(reader(path / file if path.is_dir() and file else path), limit)
    first = list(islice(samples, 1))  # files that cannot be read leave no folder behind
    open_run(folder, run)
    names = _do(pipe, chain(first, samples), folder, mode, options)
    records = read_records(folder)
    summary = _summarize(dataset, [records[name] for name in names])
    write_json(folder / SUMMARY, {**run, **summary})
    return summary


def _do(
    pipe: Any, samples: Iterator[TrackSample], folder: Path, mode: QueryMode, options: Mapping[str, Any]
) -> list[str]:
    """Score the videos that are not through yet; the names of all."""
    known, names = read_records(folder), []
    with Writer(folder, 0) as writer:
        for sample in logging.tqdm(samples, desc="videos"):
            names.append(sample.name)
            if is_finished(known.get(sample.name, {})):
                continue
            try:
                writer.add({"sample": sample.name, **score_sample(pipe, sample, mode, options)})
            except ConceptMapsError as error:
                writer.add({"sample": sample.name, "error": f"{type(error).__name__}: {error}"})
    return names


def score_sample(pipe: Any, sample: TrackSample, mode: QueryMode, options: Mapping[str, Any]) -> dict[str, Any]:
    """Track the benchmark's queries in one video.

    Args:
        pipe: as for `track`.
        sample: of a reader.
        mode: "first" or "strided".
        options: of `track`.

    Returns:
        `queries`, how many, and `scores`, of which those that are not a number are None.

    Raises:
        ConceptMapsError: the video has no query, or as `track`.
    """
    queries = sample_queries(sample.tracks, sample.visibility, mode)
    if not len(queries.points):
        raise ConceptMapsError(f"no point of {sample.name!r} is visible where queries are taken; it has no score")
    size = (sample.frames.shape[2], sample.frames.shape[3])
    border = torch.tensor([size[1] - 0.5, size[0] - 0.5])
    points = queries.points.clone()  # annotated points can lie a little outside
    points[:, 1:] = points[:, 1:].clamp(min=torch.full((2,), -0.5), max=border)
    out = track(pipe, sample.frames, points, **options)
    true = sample.tracks[queries.track], sample.visibility[queries.track]
    frames = queries.points[:, 0].long()
    scores = score_tracks(out.tracks, out.visibility, *true, frames, mode, size=size).as_dict()
    return {
        "queries": len(points),
        "scores": {name: score if score == score else None for name, score in scores.items()},
    }


def _summarize(dataset: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Plain means over videos, as in `mean_scores`: what one of them does not have, the benchmark does not have."""
    scored = [record["scores"] for record in records if is_finished(record)]
    failed = {record["sample"]: record["error"] for record in records if not is_finished(record)}
    if not scored:
        raise ConceptMapsError(f"no video could be scored: {failed}")
    columns = {name: [scores[name] for scores in scored] for name in scored[0]}
    return {
        "scores": {name: None if None in values else sum(values) / len(values) for name, values in columns.items()},
        "videos": len(scored),
        "failed": failed,
        "published": [str(entry) for entry in PUBLISHED if entry.dataset == f"tap_vid_{dataset.replace('-', '_')}"],
    }
