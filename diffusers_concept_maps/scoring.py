"""From the tensors of a layer to its maps: heads, score, softmax, and on to the running means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from diffusers_concept_maps.heads import HeadSelection, head_mask
from diffusers_concept_maps.methods import LayerTaps
from diffusers_concept_maps.plan import CapturePlan
from diffusers_concept_maps.prompt import TextRows
from diffusers_concept_maps.results import Results


class LayerPlace(NamedTuple):
    """Where the maps of a layer belong: step, layer, and the rows of every guidance branch."""

    step: int
    layer: int
    branches: Mapping[str, slice]


def score_layer(
    plan: CapturePlan, results: Results, place: LayerPlace, taps: LayerTaps, words: TextRows | None
) -> None:
    """Add the maps of a layer to the results.

    Args:
        plan: which methods read the layer, and how.
        results: what the maps are added to.
        place: where they belong.
        taps: the layer.
        words: how text rows become words of the prompt; None where concept tokens are the targets.
    """
    masks: dict[object, torch.Tensor] = {}
    methods = plan.reading(place.layer)
    taps.selects_heads = any(isinstance(method.heads, HeadSelection) for method in methods.values())
    with torch.autocast(taps.image_query.device.type, enabled=False):
        for name, method in methods.items():
            if method.heads not in masks:
                masks[method.heads] = head_mask(method.heads, taps)
            scores = _scores(plan, name, taps, masks[method.heads], words)
            for branch, rows in place.branches.items():
                results.add(branch, name, place.step, place.layer, scores[rows])
            if "head" in plan.detail:
                _score_heads(plan, results, place, name, taps, words)


def _score_heads(
    plan: CapturePlan, results: Results, place: LayerPlace, name: str, taps: LayerTaps, words: TextRows | None
) -> None:
    """The map of every head by itself, whether the method would choose it or not."""
    for head in range(taps.image_query.shape[1]):
        only = taps.head(head)
        scores = _scores(plan, name, only, torch.ones_like(only.image_query[:, :, 0, 0]).float(), words)
        for branch, rows in place.branches.items():
            results.add_head(branch, name, place.step, place.layer, head, scores[rows])


def _scores(
    plan: CapturePlan, name: str, taps: LayerTaps, heads: torch.Tensor, words: TextRows | None
) -> torch.Tensor:
    """Score, softmax and read-out of the concepts `[R, C, N]`."""
    method, softmax = plan.methods[name], plan.has_softmax(name)
    scores = method.method.score(taps, heads, method.rules)
    if softmax and plan.parity is not None:
        weights = 0.0 if taps.multiplicity is None else taps.multiplicity.log()[:, None]
        scores = (scores + weights).softmax(1)
    scores = scores[:, : len(plan.names)] if words is None else words.merge(scores)
    return scores.softmax(1) if softmax and plan.parity is None else scores
