"""What every score does first and last: check, scale and bring tensors to one grid; average what is defined."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from diffusers_concept_maps.errors import ConceptMapsValueError

IGNORED = -1


def as_scores(scores: torch.Tensor, axes: str) -> torch.Tensor:
    """The scores as float64, finite and with the named axes; raises otherwise."""
    count = len(axes.split(", "))
    if scores.ndim != count or not scores.numel():
        raise ConceptMapsValueError(
            f"scores of shape {list(scores.shape)}; expected [{axes}] without an empty axis; reshape them"
        )
    if scores.is_complex():
        raise ConceptMapsValueError(f"scores of {scores.dtype}; expected real numbers; pass their magnitude")
    values = scores.detach().double()
    if not bool(values.isfinite().all()):
        raise ConceptMapsValueError(
            f"scores with {int((~values.isfinite()).sum())} values that are not finite; expected none; find out where "
            f"the map overflowed"
        )
    return values


def as_labels(labels: torch.Tensor, classes: int, name: str = "labels", lowest: int = IGNORED) -> torch.Tensor:
    """The labels as int64 `[frame, height, width]` with values of `lowest` to `classes - 1`; raises otherwise."""
    if labels.ndim != 3 or not labels.numel():
        raise ConceptMapsValueError(
            f"{name} of shape {list(labels.shape)}; expected [frame, height, width] without an empty axis; an image "
            f"has one frame"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ConceptMapsValueError(f"{name} of {labels.dtype}; expected integers or bool; convert them")
    values = labels.detach().long()
    low, high = int(values.min()), int(values.max())
    if low < lowest or high >= classes:
        raise ConceptMapsValueError(
            f"{name} from {low} to {high}; expected {lowest} to {classes - 1} for {classes} classes; in the ground "
            f"truth, {IGNORED} is what is not scored"
        )
    return values


def check_same(first: torch.Tensor, second: torch.Tensor, names: str, remedy: str) -> None:
    """Raise where two tensors differ in shape."""
    if first.shape != second.shape:
        raise ConceptMapsValueError(
            f"{names} of shapes {list(first.shape)} and {list(second.shape)}; expected equal shapes; {remedy}"
        )


def check_choice(value: str | None, allowed: Sequence[str | None], name: str) -> None:
    """Raise where an option has a value that it does not have."""
    if value not in allowed:
        options = ", ".join(map(repr, allowed))
        raise ConceptMapsValueError(f"{name} {value!r} is unknown; expected one of {options}")


def min_max(values: torch.Tensor, *, per_frame: bool = False) -> torch.Tensor:
    """Values scaled to 0..1, over everything or over the last two axes; constant ones become one half."""
    axes = (-2, -1) if per_frame else tuple(range(values.ndim))
    low, high = values.amin(axes, keepdim=True), values.amax(axes, keepdim=True)
    # Halved before they are subtracted: the range of float64 values can be more than float64 holds.
    scaled = (values / 2 - low / 2) / (high / 2 - low / 2)
    return torch.where(high > low, scaled, 0.5)


def defined(value: float | torch.Tensor) -> float | None:
    """A number for JSON, which has no NaN."""
    number = float(value)
    return None if math.isnan(number) else number


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of what is defined; None where nothing is. The sum is rounded once, so the order of values is no matter."""
    numbers = [value for value in values if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers else None


def check_records(records: Sequence[Mapping[str, Any]], settings: Sequence[str]) -> None:
    """Raise where there is nothing to summarize, or not all of it was scored with the same settings."""
    if not records:
        raise ConceptMapsValueError("no samples to summarize; expected at least one; score one first")
    for name in settings:
        found = sorted({str(record[name]) for record in records})
        if len(found) > 1:
            raise ConceptMapsValueError(
                f"samples scored with {name} {' and '.join(found)}; expected one {name}; summarize them apart"
            )
