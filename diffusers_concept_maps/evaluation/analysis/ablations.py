"""ConceptAttention's ablations (arXiv 2502.04320, tables 4 and 5): what concept tokens read, and what is compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.evaluation.analysis._base import Analysis, Findings, Settings, Table, each
from diffusers_concept_maps.evaluation.analysis._plots import BLUE, GRAY, GREEN, ORANGE, new_figure
from diffusers_concept_maps.evaluation.analysis._subjects import Subject
from diffusers_concept_maps.evaluation.segmentation import score_sample
from diffusers_concept_maps.methods import SPACES
from diffusers_concept_maps.shapes.suite.scores import bootstrap_interval
from diffusers_concept_maps.stream import READS

COLUMNS = ("ablation", "setting", "concept", "score", "n", "mean", "low", "high")
_METRICS = ("pixel_accuracy", "mean_iou", "average_precision", "foreground_average_precision")
_COLORS = dict(zip(_METRICS, (BLUE, ORANGE, GREEN, GRAY), strict=True))
_TOLD = {"image": "cross only", "concepts": "self only", "both": "both", "none": "neither"}
_Values = dict[tuple[str, str, str, str], list[float]]


def run(pipe: Any, subjects: Iterable[Subject], settings: Settings) -> Findings:
    """Segment every clip with every choice; means over clips, with 95% bootstrap intervals.

    Raises:
        ConceptMapsValueError: another method than "concept_attention", which alone has these choices.
    """
    if settings.method != "concept_attention":
        raise ConceptMapsValueError(
            f"method is {settings.method!r}; expected 'concept_attention', whose ablations these are"
        )
    values: _Values = {}
    for subject in each(subjects):
        for (reads, space), record in _read(pipe, subject, settings):
            for concept, scores in record.items():
                for metric, value in scores.items():
                    if space == "output":
                        values.setdefault(("reads", reads, concept, metric), []).append(value)
                    if reads == "both":
                        values.setdefault(("space", space, concept, metric), []).append(value)
    order = sorted(values, key=lambda name: (name[0], (*READS, *SPACES).index(name[1])))
    rows = [[*name, len(values[name]), *_summary(values[name])] for name in order]
    summary = [
        f"{ablation} {setting}: {metric} {middle:.3f} [{low:.3f}, {high:.3f}]"
        for ablation, setting, concept, metric, _, middle, low, high in rows
        if concept == "target" and metric in ("mean_iou", "average_precision")
    ]
    summary += ["the concept 'wrong' is the map of another concept, scored against the target's mask"]
    table = Table(COLUMNS, rows)
    return Findings({"ablations": table}, {"ablations": _picture(rows, settings)}, summary, pages=("ablations",))


def _read(
    pipe: Any, subject: Subject, settings: Settings
) -> Iterator[tuple[tuple[str, str], dict[str, dict[str, float]]]]:
    """What concept tokens read and the space, with the scores of target and wrong concept; each pair once."""
    choices = dict.fromkeys([*((reads, "output") for reads in READS), *(("both", space) for space in SPACES)])
    for reads, space in choices:
        maps = settings.read(pipe, subject, reads=reads, space=space)
        fit = maps.fit
        assert fit is not None  # `encode` has made them
        labels = subject.labels[: fit.covered]
        heat = maps.upsample(mode="nearest")[0]
        rest = [0] * (len(heat) - 1)
        record = {}
        for name, own in (("target", [1, *rest]), ("wrong", [0, 1, *rest[1:]])):
            record[name] = _metrics(score_sample(heat, labels, own))
        yield (reads, space), record


def _metrics(record: dict[str, Any]) -> dict[str, float]:
    """The scores of one sample as the paper has them, and the average precision of the target alone."""
    pairs = zip(record["intersection"], record["union"], strict=True)
    overlaps = [both / either for both, either in pairs if either]
    found = {
        "pixel_accuracy": record["correct"] / record["pixels"],
        "mean_iou": sum(overlaps) / len(overlaps),
        "average_precision": record["average_precision"],
        "foreground_average_precision": record["foreground_average_precision"],
    }
    return {name: value for name, value in found.items() if value is not None}


def _summary(values: Sequence[float]) -> tuple[float, float, float]:
    array = np.asarray(values)
    return (float(array.mean()), *bootstrap_interval(array))


def _picture(rows: Sequence[Sequence[Any]], settings: Settings) -> Any:
    figure = new_figure(10, 4.2)
    panels = figure.subplots(1, 2, sharey=True, width_ratios=[4, 3])
    titles = {"reads": "what concept tokens read (output space)", "space": "space that is compared (reading both)"}
    for axes, (ablation, title) in zip(panels, titles.items(), strict=True):
        own = [row for row in rows if row[0] == ablation]
        settings_of = list(dict.fromkeys(row[1] for row in own))
        for place, metric in enumerate(_METRICS):
            for concept, style in (("target", {"color": _COLORS[metric]}), ("wrong", {})):
                found = [row for row in own if row[2] == concept and row[3] == metric]
                at = np.array([settings_of.index(row[1]) for row in found]) + 0.2 * (place - 1.5)
                middle, low, high = (np.array([row[column] for row in found]) for column in (5, 6, 7))
                if concept == "target":
                    axes.bar(at, middle, 0.18, label=metric.replace("_", " ").replace("iou", "IoU"), **style)
                    axes.errorbar(at, middle, [middle - low, high - middle], fmt="none", color="black", capsize=2)
                else:
                    label = "wrong concept" if place == 0 else None
                    axes.scatter(at, middle, marker="_", s=90, color="black", zorder=3, label=label)
        axes.set_xticks(range(len(settings_of)), [_TOLD.get(name, name.replace("_", "-")) for name in settings_of])
        axes.set_title(title, fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set(ylabel="score (fraction), 95% interval over clips", ylim=(0, 1))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    levels = ", ".join(f"{level:g}" for level in settings.noise_levels)
    figure.suptitle(f"ConceptAttention's ablations, {rows[0][4]} clips, noise level {levels}", fontsize=10)
    return figure


ANALYSIS = Analysis("ablations", "what concept tokens read and what is compared, as in ConceptAttention's tables", run)
