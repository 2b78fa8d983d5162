"""Matches by several layers, against the mean of every weight in float64."""

from __future__ import annotations

import pytest
import torch
from clips import assert_naive, fused, random_layer, scattered

from diffusers_concept_maps import ConceptMapsValueError
from diffusers_concept_maps.correspondence.fusing import MatchAccumulator
from diffusers_concept_maps.correspondence.matching import MatchOptions
from diffusers_concept_maps.correspondence.readout import TokenGrid
from diffusers_concept_maps.ops_matching import DIRECTIONS

SMALL = TokenGrid(frames=3, height=4, width=5, stride=(8.0, 6.0))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layers_are_fused_by_their_mean(direction: str) -> None:
    layers, points = [random_layer(SMALL, seed=seed) for seed in (3, 4, 5)], scattered(SMALL, 4, seed=3)
    options = MatchOptions(direction)
    matches = fused(MatchAccumulator(points, SMALL, options, frames=[1, 2]), layers, weight=0.25)
    assert_naive(matches, layers, torch.full((3,), 1 / 3), points, SMALL, options, 8**-0.5, [1, 2])


def test_layers_are_fused_by_weight() -> None:
    first, second, points = random_layer(SMALL, seed=3), random_layer(SMALL, seed=4), scattered(SMALL, 4)
    weighed, repeated = (MatchAccumulator(points, SMALL) for _ in range(2))
    weighed.add(*first, weight=3.0)
    weighed.add(*second)
    for layer in (first, first, second, first):
        repeated.add(*layer)
    torch.testing.assert_close(weighed.matches().positions, repeated.matches().positions)
    torch.testing.assert_close(weighed.matches().confidence, repeated.matches().confidence)


def test_refusals_of_fusing() -> None:
    accumulator = MatchAccumulator(scattered(SMALL, 2), SMALL)
    for read in (accumulator.matches, accumulator.way_back):
        with pytest.raises(ConceptMapsValueError, match=r"^no layer was added; call add\(\) with the query and key"):
            read()
    with pytest.raises(ConceptMapsValueError, match="^weight is 0; expected a positive number$"):
        accumulator.add(*random_layer(SMALL), weight=0)
    accumulator.add(*random_layer(SMALL))
    with pytest.raises(ConceptMapsValueError, match="^the sum of earlier layers has shape .*; expected"):
        accumulator.add(*random_layer(SMALL, rows=1))
    with pytest.raises(ConceptMapsValueError, match=r"^no layer was added; call add\(\) with the query and key"):
        accumulator.way_back().matches()
