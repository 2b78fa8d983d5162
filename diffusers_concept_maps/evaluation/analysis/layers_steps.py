"""The score of maps by layer and noise level."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers_concept_maps.evaluation.analysis._base import SCORES, Analysis, Findings, Settings, Table, each, mean
from diffusers_concept_maps.evaluation.analysis._plots import heat_map
from diffusers_concept_maps.evaluation.analysis._scores import COLUMNS, score_detail, stack, summarize, tell_best
from diffusers_concept_maps.evaluation.analysis._subjects import Subject


def run(pipe: Any, subjects: Iterable[Subject], settings: Settings) -> Findings:
    """Score the maps of every layer at every noise level, heads joined."""
    scored = stack(
        [score_detail(settings.read(pipe, s, detail=("layer", "step")), s, settings) for s in each(subjects)]
    )
    layers, levels = scored.target.shape[1:]
    rows = [
        [layer, settings.noise_levels[level], *summarize(scored, (layer, level))]
        for layer in range(layers)
        for level in range(levels)
    ]
    figure = heat_map(
        mean(scored.target),
        ("layer", [str(layer) for layer in range(layers)]),
        ("noise level (fraction of the training schedule)", [f"{level:g}" for level in settings.noise_levels]),
        f"{settings.method.replace('_', ' ')} by layer and noise level, {len(scored.target)} clips",
        SCORES[settings.score],
    )
    named = ("layer", "noise_level")
    table = Table((*named, *COLUMNS), rows)
    return Findings({"layers-steps": table}, {"layers-steps": figure}, tell_best(rows, named))


ANALYSIS = Analysis(
    "layers-steps",
    "score by layer and noise level, as a heat map",
    run,
    noise_levels=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
)
