"""Layers, steps and heads as users name them."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from diffusers_concept_maps.errors import ConceptMapsValueError


def check_indices(what: str, indices: Iterable[int], count: int | None) -> frozenset[int]:
    """Checked 0-based indices.

    Args:
        what: they are of, such as "layer".
        indices: as they were given.
        count: how many there are; None where only the run will tell.

    Raises:
        ConceptMapsValueError: none, no integer, or one out of range.
    """
    if not isinstance(indices, Iterable):
        raise ConceptMapsValueError(f"{what}s is {indices!r}; expected a list such as [{indices!r}]")
    given = list(indices)
    if not given:
        raise ConceptMapsValueError(f"no {what}s; pass at least one {what} index, or None for the default")
    limit = "0 or more" if count is None else f"0 to {count - 1}"
    for index in given:
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise ConceptMapsValueError(f"{what} {index!r} is no index; expected an integer of {limit}")
        if operator.index(index) < 0 or (count is not None and operator.index(index) >= count):
            raise ConceptMapsValueError(f"{what} {index!r} is out of range; expected an integer of {limit}")
    return frozenset(operator.index(index) for index in given)
