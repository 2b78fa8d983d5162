"""The score of maps by head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers_concept_maps.evaluation.analysis._base import SCORES, Analysis, Findings, Settings, Table, each, mean
from diffusers_concept_maps.evaluation.analysis._plots import heat_map
from diffusers_concept_maps.evaluation.analysis._scores import COLUMNS, score_detail, stack, summarize, tell_best
from diffusers_concept_maps.evaluation.analysis._subjects import Subject


def run(pipe: Any, subjects: Iterable[Subject], settings: Settings) -> Findings:
    """Score the maps that every head of every layer makes by itself."""
    scored = stack(
        [score_detail(settings.read(pipe, s, detail=("layer", "head")), s, settings) for s in each(subjects)]
    )
    layers, heads = scored.target.shape[1:]
    rows = [[layer, head, *summarize(scored, (layer, head))] for layer in range(layers) for head in range(heads)]
    figure = heat_map(
        mean(scored.target),
        ("layer", [str(layer) for layer in range(layers)]),
        ("head", [str(head) for head in range(heads)]),
        f"{settings.describe()}, {len(scored.target)} clips",
        SCORES[settings.score],
    )
    named = ("layer", "head")
    return Findings({"heads": Table((*named, *COLUMNS), rows)}, {"heads": figure}, tell_best(rows, named))


ANALYSIS = Analysis("heads", "score by layer and head, as a heat map", run)
