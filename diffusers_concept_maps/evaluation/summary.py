"""The summary of an evaluation: scores of the data set by method, and what was published on it, told apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusers_concept_maps.evaluation import judge, localization, segmentation, video
from diffusers_concept_maps.evaluation.protocol import BACKGROUND_CONCEPTS, PROTOCOLS, Protocol, by_class_name
from diffusers_concept_maps.evaluation.published import PUBLISHED, Published
from diffusers_concept_maps.evaluation.records import is_finished
from diffusers_concept_maps.fitting import Fit

_SHOWN = {
    "segmentation": (
        "dataset_pixel_accuracy",
        "per_image_pixel_accuracy",
        "dataset_mean_iou",
        "per_image_mean_iou",
        "per_image_average_precision",
    ),
    "video": ("per_object_j_mean", "per_object_f_mean", "per_object_temporal_consistency", "per_clip_mean_iou"),
    "localization": (
        "per_clip_spatial_average_precision",
        "per_clip_temporal_concordance",
        "per_clip_sparseness",
        "per_clip_shape_iou_best_threshold",
    ),
    "judge": (*judge.CRITERIA, "mean"),
}
"""Scores of the table; the others are in the file."""

_SHOWN_FAILURES = 20
_COMPARABLE = "comparable where model, layers and noise are the same"


def summarize(
    run: Mapping[str, Any], names: Sequence[str], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Scores of a data set; the same whatever the order in which, and the processes by which, samples were scored.

    Args:
        run: settings of the run, with its `dataset`.
        names: the samples to summarize.
        records: of each of them, by name.

    Returns:
        JSON-able: `run`; `samples`, `scored`; `cut`, how many of these are clips longer than the model takes, so that
        their first frames alone are scored; `failed` and `skipped`, by name the reason; `classes`; `methods`, by
        name the summaries of `segmentation` and, of videos, `video`, `localization` and `judge`; `published`.
    """
    protocol = PROTOCOLS[run["dataset"]]
    chosen = [records[name] for name in names]
    scored = [record for record in chosen if "methods" in record]
    found = sorted({name for record in scored for name in record["classes"][1:]})
    classes = ["background", *found] if protocol.rule == "argmax" else ["background", "target"]
    methods = scored[0]["methods"] if scored else {}
    return {
        "run": dict(run),
        "samples": len(chosen),
        "scored": len(scored),
        "cut": sum(Fit.from_json(record["source"]).covered < record["source"]["source"][0] for record in scored),
        "failed": {record["sample"]: record["error"] for record in chosen if not is_finished(record)},
        "skipped": {record["sample"]: record["skipped"] for record in chosen if "skipped" in record},
        "classes": classes,
        "methods": {method: _of_method(scored, method, protocol, classes) for method in methods},
        "published": [_published(entry, run, len(scored)) for entry in _entries(run["dataset"])],
    }


def _of_method(
    records: Sequence[Mapping[str, Any]], method: str, protocol: Protocol, classes: Sequence[str]
) -> dict[str, Any]:
    """Summaries of one method, by kind of score."""

    def counted(kind: str) -> list[dict[str, Any]]:
        parts = [(record["methods"][method][kind], record["classes"]) for record in records]
        if protocol.rule == "threshold":
            return [part for part, _ in parts]
        return [by_class_name(part, own, classes) for part, own in parts]

    def of_objects(kind: str) -> list[dict[str, Any]]:
        return [part for record in records for part in record["methods"][method].get(kind, {}).values()]

    summaries = {"segmentation": segmentation.summarize(counted("segmentation"))}
    if protocol.is_video:
        summaries["video"] = video.summarize(counted("video"))
        summaries["localization"] = localization.summarize(of_objects("localization"))
    if ratings := of_objects("judge"):
        summaries["judge"] = judge.summarize(ratings)
    for summary in summaries.values():
        if "dataset_iou" in summary:
            summary["dataset_iou"] = dict(zip(classes, summary["dataset_iou"], strict=True))
    return summaries


def _entries(dataset: str) -> list[Published]:
    return [entry for entry in PUBLISHED if entry.dataset == dataset.replace("-", "_")]


def _published(entry: Published, run: Mapping[str, Any], scored: int) -> dict[str, Any]:
    """A published row, with what keeps it from being compared with this run."""
    return {
        "method": entry.method,
        "backbone": entry.backbone,
        "scores": entry.scores,
        "source": entry.source,
        "trust": entry.trust,
        "not_comparable": _obstacles(entry, run, scored),
    }


def _obstacles(entry: Published, run: Mapping[str, Any], scored: int) -> list[str]:
    """Why a published row is no measure of this run; empty where only the model may differ."""
    obstacles = []
    if entry.dataset == "imagenet_segmentation" and tuple(run["settings"]["background"]) != BACKGROUND_CONCEPTS:
        obstacles.append(f"it had the concepts of the background {', '.join(BACKGROUND_CONCEPTS)}")
    if entry.dataset == "imagenet_segmentation" and run["settings"]["parity"] is None:
        obstacles.append("it was counted as with --parity concept_attention, which this run was not")
    if entry.dataset == "mevis":
        obstacles.append(
            "its scores are a judge's, and this run had none"
            if run["judge"] is None
            else f"its judge was another one than {run['judge']}, and it has clips of its own choice"
        )
    if scored < run["samples"]:
        obstacles.append(f"it is of all samples, and this run of {scored} of {run['samples']}")
    return obstacles


def table(summary: Mapping[str, Any]) -> Iterator[str]:
    """Lines of text: a row for each method and kind of score, then the published rows.

    Args:
        summary: result of `summarize`.
    """
    counts = f"{summary['scored']} of {summary['samples']} samples"
    yield f"{summary['run']['dataset']}: {counts} scored with {summary['run']['model']}"
    if summary["cut"]:
        clips = "1 clip is" if summary["cut"] == 1 else f"{summary['cut']} clips are"
        yield f"{clips} longer than what the model takes: the first frames alone are scored"
    for kind, shown in _SHOWN.items():
        rows = {method: scores[kind] for method, scores in summary["methods"].items() if kind in scores}
        columns = [name for name in shown if any(row[name] is not None for row in rows.values())]
        if columns:
            yield ""
            yield from _grid(kind, columns, rows)
    if summary["published"]:
        yield ""
        yield "published:"
        yield from map(_line, summary["published"])
    for reason in ("failed", "skipped"):
        yield from _reasons(reason, summary[reason])


def _grid(kind: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    width = max(len(kind), *map(len, rows))
    yield "  ".join([kind.ljust(width), *columns])
    for method, row in rows.items():
        cells = [("-" if row[name] is None else f"{row[name]:.3f}").rjust(len(name)) for name in columns]
        yield "  ".join([method.ljust(width), *cells])


def _line(entry: Mapping[str, Any]) -> str:
    scores = "  ".join(f"{name} {score:.3f}" for name, score in entry["scores"].items())
    comparable = f"not comparable: {'; '.join(entry['not_comparable'])}" if entry["not_comparable"] else _COMPARABLE
    source = f"{entry['trust']}: {entry['source']}"
    return f"  {entry['method']} ({entry['backbone']})  {scores}  [{source}; {comparable}]"


def _reasons(reason: str, samples: Mapping[str, str]) -> Iterator[str]:
    if not samples:
        return
    yield ""
    yield f"{len(samples)} sample{'s' if len(samples) > 1 else ''} {reason}:"
    for name, text in list(samples.items())[:_SHOWN_FAILURES]:
        yield f"  {name}: {' '.join(text.split())}"
    if len(samples) > _SHOWN_FAILURES:
        yield f"  and {len(samples) - _SHOWN_FAILURES} more"
