"""From a clip of any size and length to what a model takes, and what is needed to come back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging

from diffusers_concept_maps.errors import ConceptMapsValueError

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Fit:
    """How a clip was fitted to a model: first frames used, scaled, last frame repeated.

    Attributes:
        source: (frames, height, width) of the clip as it came.
        model: (frames, height, width) that the model was given.
        padding: how many of the model's frames, at the end, repeat the clip's last one.

    Raises:
        ConceptMapsValueError: the numbers do not belong together.
    """

    source: tuple[int, int, int]
    model: tuple[int, int, int]
    padding: int

    def __post_init__(self) -> None:
        """Check the numbers."""
        if min(*self.source, *self.model) < 1 or self.padding < 0 or not 1 <= self.covered <= self.source[0]:
            raise ConceptMapsValueError(
                f"source {self.source}, model {self.model} and padding {self.padding} do not belong together; "
                f"expected (frames, height, width) of at least 1 each, and model frames without padding that the "
                f"source has"
            )

    @property
    def covered(self) -> int:
        """Number of the clip's frames, from the first, that the model has seen."""
        return self.model[0] - self.padding

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads, JSON-compatible."""
        return {"source": list(self.source), "model": list(self.model), "padding": self.padding}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Fit:
        """Read what `to_json` has written.

        Args:
            entry: with the keys "source", "model" and "padding".

        Raises:
            ConceptMapsValueError: something is missing or is no whole number.
        """
        try:
            source, model, padding = tuple(entry["source"]), tuple(entry["model"]), entry["padding"]
        except (KeyError, TypeError) as error:
            raise ConceptMapsValueError(f"{entry!r} does not say how a clip was fitted: {error!r}") from error
        if (len(source), len(model)) != (3, 3) or not all(type(n) is int for n in (*source, *model, padding)):
            raise ConceptMapsValueError(
                f"{entry!r} does not say how a clip was fitted; expected source and model of three whole numbers "
                f"each, and a whole number of padding"
            )
        return cls(source, model, padding)

    def describe(self) -> str:
        """What was done, in one line."""
        frames, height, width = self.source
        parts = [f"{_count(frames)} of {height} x {width} pixels (height x width)"]
        if self.covered < frames:
            parts.append(f"cut to the first {self.covered}")
        if self.model[1:] != self.source[1:]:
            parts.append(f"scaled to {self.model[1]} x {self.model[2]}")
        if self.padding:
            parts.append(f"padded to {_count(self.model[0])} by repeating the last")
        return ", ".join(parts if len(parts) > 1 else [*parts, "as the model takes them"])


def _count(frames: int) -> str:
    return f"{frames} frame{'s' if frames != 1 else ''}"


def fit_clip(
    frames: torch.Tensor,
    *,
    area: int | None = None,
    multiple: int | tuple[int, int] = 1,
    frame_step: int = 1,
    frame_offset: int = 1,
    max_frames: int | None = None,
    size: tuple[int, int] | None = None,
    total: int | None = None,
) -> tuple[torch.Tensor, Fit]:
    """Scale, cut and pad a clip to what a model takes.

    Without `size` the aspect ratio is kept as closely as `multiple` allows, and nothing is enlarged but to reach a
    multiple. Scaling is bilinear and antialiased. A clip that is too long loses its end, with one warning.

    Args:
        frames: `[frame, 3, height, width]` in 0..1, such as `Clip.frames`.
        area: height times width in pixels that the result may have at most; None keeps the size, but for `multiple`.
        multiple: what height and width are multiples of, together or `(height, width)`.
        frame_step: together with `frame_offset`: a model takes `frame_offset + k * frame_step` frames, `k` being 0 or
            more; a causal video VAE that makes 4 frames of a latent one has 4 and 1.
        frame_offset: see `frame_step`; 0 if the number is a multiple.
        max_frames: how many frames a model takes at most; None is any number.
        size: `(height, width)` in pixels to scale to whatever the aspect ratio, enlarging too; in place of `area`.
        total: number of frames of the clip where `frames` are only its first, such as `Clip.total`; no fewer than
            `max_frames` are to be handed over then.

    Returns:
        The frames `[model_frame, 3, model_height, model_width]`, and how they were fitted.

    Raises:
        ConceptMapsValueError: frames of another shape, or numbers that no clip can meet.
    """
    rows, columns = (multiple, multiple) if isinstance(multiple, int) else multiple
    if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape or not frames.is_floating_point():
        raise ConceptMapsValueError(
            f"frames are {str(frames.dtype).removeprefix('torch.')} of shape {tuple(frames.shape)}; expected floats "
            f"[frame, 3, height, width], as `read_frames` returns them"
        )
    if min(rows, columns, frame_step) < 1 or frame_offset < 0:
        raise ConceptMapsValueError(
            f"multiple is {multiple}, frame_step {frame_step} and frame_offset {frame_offset}; expected at least 1, 1 "
            f"and 0"
        )
    source = (frames.shape[0] if total is None else total, frames.shape[2], frames.shape[3])
    target = _checked(size, rows, columns) if size else _size_near(source[1], source[2], area, rows, columns)
    length = _length(source[0], frame_step, frame_offset, max_frames)
    used = frames[:length]
    if used.shape[-2:] != target:
        # Rounding can leave 0..1 by a trifle.
        used = torch.nn.functional.interpolate(used, target, mode="bilinear", antialias=True).clamp(0, 1)
    padding = length - used.shape[0]
    used = torch.cat([used, used[-1:].expand(padding, -1, -1, -1)]) if padding else used
    return used, Fit(source, (length, *target), padding)


def _checked(size: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ConceptMapsValueError(f"size is {size!r}; expected (height, width) in pixels")
    if min(size) < 1 or size[0] % rows or size[1] % columns:
        near = [max(1, round(n / step)) * step for n, step in zip(size, (rows, columns), strict=True)]
        raise ConceptMapsValueError(
            f"size {size} (height, width) is not what the model takes; expected multiples of {rows} and {columns}, "
            f"such as ({near[0]}, {near[1]})"
        )
    return size


def _size_near(height: int, width: int, area: int | None, rows: int, columns: int) -> tuple[int, int]:
    """Multiples near the given size, scaled down to the area: of the four around it, the least distorted."""
    if area is not None and area < rows * columns:
        raise ConceptMapsValueError(
            f"area is {area} pixels; expected at least {rows * columns}, for multiples of {rows} and {columns}"
        )
    scale = 1.0 if area is None else min(1.0, math.sqrt(area / (height * width)))
    ideal = height * scale / rows, width * scale / columns
    limit = math.inf if area is None else area // (rows * columns)

    def distance(candidate: tuple[int, int]) -> tuple[float, int]:
        taller, wider = (math.log(n / wish) for n, wish in zip(candidate, ideal, strict=True))
        return abs(taller - wider) + abs(taller + wider) / 2, candidate[0] * candidate[1]

    around = [(max(1, int(n)), max(1, math.ceil(n))) for n in ideal]
    near = {pair for y in around[0] for x in around[1] for pair in _within(y, x, limit)}
    y, x = min(sorted(near), key=distance)
    return y * rows, x * columns


def _within(rows: int, columns: int, limit: float) -> list[tuple[int, int]]:
    """The pair, or where its product exceeds the limit the two that shorten one side; none if both sides exceed it."""
    if rows * columns <= limit:
        return [(rows, columns)]
    pairs = (rows, int(limit // rows)), (int(limit // columns), columns)
    return [pair for pair in pairs if min(pair) > 0]


def _length(frames: int, step: int, offset: int, max_frames: int | None) -> int:
    """The length a model takes that is nearest from above, or the largest it takes if there is none."""

    def at_least(count: int) -> int:
        return offset + max(0, -(-(count - offset) // step)) * step

    if max_frames is None:
        return at_least(frames)
    longest = offset + (max_frames - offset) // step * step
    if longest < at_least(1):
        raise ConceptMapsValueError(
            f"max_frames is {max_frames}; expected at least {at_least(1)}, the shortest clip that the model takes"
        )
    if frames > longest:
        logger.warning(
            f"The clip has {frames} frames and the model takes {longest} at most: frames 0 to {longest - 1} are used. "
            f"To see others, hand over that part of the clip or every n-th frame, or allow more."
        )
        return longest
    return at_least(frames)
