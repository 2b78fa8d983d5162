"""How well a head's features separate the frames, against how well its map localizes.

IMAP (arXiv 2603.02919) takes the heads with the highest Calinski-Harabasz index for those that bind motion; whether
that holds for a model is what this shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from diffusers_concept_maps import ops
from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.evaluation.analysis._base import (
    SCORES,
    Analysis,
    Findings,
    Settings,
    Table,
    depth,
    each,
    mean,
    number,
)
from diffusers_concept_maps.evaluation.analysis._correlation import COLUMNS, correlate, tell
from diffusers_concept_maps.evaluation.analysis._plots import new_figure, scatter
from diffusers_concept_maps.evaluation.analysis._scores import Scored, score_detail, stack
from diffusers_concept_maps.evaluation.analysis._subjects import Subject
from diffusers_concept_maps.heads import HeadSelection
from diffusers_concept_maps.reference import FrameStatistics

POINTS = ("layer", "head", "clips", "calinski_harabasz", "score", "wrong_concept", "shuffled_masks", "chance")


class WatchedHeads(HeadSelection):
    """All heads, whose Calinski-Harabasz indices `[row, head]` are remembered in order of steps and layers."""

    def choose(
        self, image_output: torch.Tensor, frames: int, statistics: FrameStatistics | None = None
    ) -> torch.Tensor:
        """See `HeadSelection.choose`.

        Raises:
            ConceptMapsError: there is one frame only.
        """
        if frames == 1:
            raise ConceptMapsError("the clip has one latent frame, and separability is between frames; use videos")
        index = ops.frame_separability(image_output, frames, "calinski_harabasz", statistics)
        self.__dict__.setdefault("seen", []).append(index.cpu())
        return torch.ones(image_output.shape[:2], device=image_output.device)

    def mean(self, layers: int) -> torch.Tensor:
        """Mean index over the steps `[layer, head]`, float64."""
        seen: torch.Tensor = torch.stack(self.__dict__["seen"])[:, 0].double()
        return mean(seen.unflatten(0, (-1, layers)))


def run(pipe: Any, subjects: Iterable[Subject], settings: Settings) -> Findings:
    """Correlate the Calinski-Harabasz index with the score, over heads and over clips."""
    scores, indices = [], []
    for subject in each(subjects):
        watched = WatchedHeads(top_k=1)
        maps = settings.read(pipe, subject, detail=("layer", "head"), heads=watched)
        scores.append(score_detail(maps, subject, settings))
        indices.append(watched.mean(depth(pipe)))
    scored, index = stack(scores), torch.stack(indices)  # [clip, layer, head]
    points = Table(POINTS, list(_points(scored, index)))
    correlations = Table(("scope", "layer", "head", *COLUMNS), list(_correlations(scored, index)))
    summary = [
        "heads: " + tell(list(correlations.rows[0][3:])),
        "heads of one layer are not independent, and p is for pairs that are: read the rows of the layers, too",
    ]
    return Findings(
        {"separability": correlations, "separability-heads": points},
        {"separability": _picture(scored, index, settings, summary[0])},
        summary,
    )


def _points(scored: Scored, index: torch.Tensor) -> Iterator[list[Any]]:
    for layer, head in torch.cartesian_prod(*map(torch.arange, index.shape[1:])).tolist():
        values = [number(mean(column[:, layer, head])) for column in (index, *scored)]
        yield [layer, head, int(scored.target[:, layer, head].isfinite().sum()), *values]


def _correlations(scored: Scored, index: torch.Tensor) -> Iterator[list[Any]]:
    """Over all heads, over the heads of each layer, and for each head over the clips."""
    ours, theirs = mean(index), mean(scored.target)
    yield ["all heads", None, None, *correlate(ours, theirs)]
    for layer in range(len(ours)):
        yield ["heads of a layer", layer, None, *correlate(ours[layer], theirs[layer])]
    for layer, head in torch.cartesian_prod(*map(torch.arange, ours.shape)).tolist():
        yield ["clips of a head", layer, head, *correlate(index[:, layer, head], scored.target[:, layer, head])]


def _picture(scored: Scored, index: torch.Tensor, settings: Settings, title: str) -> Any:
    figure = new_figure(6.6, 4.2)
    axes = figure.subplots()
    layers = torch.arange(index.shape[1])[:, None].expand(index.shape[1:]).flatten().tolist()
    labels = ("Calinski-Harabasz index of the head's outputs (no unit)", SCORES[settings.score], "layer")
    scatter(axes, mean(index).flatten(), mean(scored.target).flatten(), layers, labels)
    axes.set_xscale("symlog", linthresh=1.0)
    axes.axhline(float(mean(scored.chance, (0, 1, 2))), color="black", linestyle=":", linewidth=1, label="chance")
    axes.legend(fontsize=8)
    axes.set_title(f"{settings.describe()}, means over {len(index)} clips\n{title}", fontsize=8)
    return figure


ANALYSIS = Analysis("separability", "Calinski-Harabasz index of a head against its localization", run)
