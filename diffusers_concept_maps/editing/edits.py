"""What an edit of the attention is, and where it is on the token grid of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from diffusers_concept_maps.backbones import Grid
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.upsample import gather_frames

_OPERATIONS = ("scale", "replace", "transform")


@dataclass(frozen=True, eq=False)
class AttentionEdit:
    """What becomes of the attention of image tokens to words of the prompt: one of `scale`, `replace` and `transform`.

    The share of a word is the probability that a token of the video gives to all tokens of the word together, in one
    head of one layer. An edit gives it another share; the word's tokens keep their proportions, and so does whatever
    else the token looks at, so that its probabilities still sum to 1.

    Attributes:
        words: a word or phrase of the prompt, or several, whose share is taken as one.
        scale: factor of the word's probabilities before they are made to sum to 1 again; 0 hides the word, 1 is the
            identity. It is `log(scale)` on the logits.
        replace: the share itself, float `[height, width]` or `[frame, height, width]` in 0..1, of any size.
        transform: from the shares `[head, frame, height, width]` of one video on the token grid to others of the same
            shape, called at every chosen layer and step; what it returns is clipped to 0..1.
        mask: where, bool or float in 0..1, `[height, width]` or `[frame, height, width]` with as many frames as tokens
            or the video have, of any size; a float mixes the factor with 1, and shares with those that there are.
            A token is in a bool mask where at least half of it is. None is everywhere.
        time: fraction of the clip `(start, stop)`, by the middles of the token frames.

    Raises:
        ConceptMapsValueError: an argument is wrong.
    """

    words: str | Sequence[str]
    scale: float | None = None
    replace: torch.Tensor | None = None
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None
    mask: torch.Tensor | None = None
    time: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Check the arguments, as far as they can be without a model."""
        if not isinstance(self.words, str | Sequence):
            raise ConceptMapsValueError(f"words is {self.words!r}; expected a word of the prompt, or a list of words")
        given = [name for name in _OPERATIONS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConceptMapsValueError(
                f"an edit of {self.words!r} has {' and '.join(given) or 'nothing to do'}; expected exactly one of "
                f"{', '.join(_OPERATIONS)}. Use one edit for each"
            )
        scale = self.scale
        if scale is not None and (
            isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < math.inf
        ):
            raise ConceptMapsValueError(f"scale is {scale!r}; expected a number of at least 0, such as 2.0")
        if self.transform is not None and not callable(self.transform):
            raise ConceptMapsValueError(f"transform is {self.transform!r}; expected a function of a tensor")
        _check_map("replace", self.replace, bools=False)
        _check_map("mask", self.mask, bools=True)
        if not _is_range(self.time):
            raise ConceptMapsValueError(f"time is {self.time}; expected fractions 0 <= start < stop <= 1 of the clip")

    @property
    def names(self) -> tuple[str, ...]:
        """The words, without those named twice."""
        return tuple(dict.fromkeys([self.words] if isinstance(self.words, str) else self.words))

    @property
    def identity(self) -> bool:
        """Whether it changes nothing, whatever the model."""
        return self.scale == 1 or (self.mask is not None and not bool(self.mask.any()))


def _is_range(time: object) -> bool:
    if not isinstance(time, Sequence) or len(time) != 2 or not all(isinstance(end, int | float) for end in time):
        return False
    return bool(0 <= time[0] < time[1] <= 1)


def _check_map(name: str, tensor: object, *, bools: bool) -> None:
    if tensor is None:
        return
    expected = f"{'bool or ' if bools else ''}float in 0..1, [height, width] or [frame, height, width]"
    if not isinstance(tensor, torch.Tensor):
        raise ConceptMapsValueError(f"{name} is a {type(tensor).__name__}; expected a tensor, {expected}")
    kind = tensor.dtype.is_floating_point or (bools and tensor.dtype == torch.bool)
    if not kind or tensor.ndim not in (2, 3) or not tensor.numel():
        raise ConceptMapsValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {expected}")
    if not bool(((tensor >= 0) & (tensor <= 1)).all()):
        raise ConceptMapsValueError(f"{name} has values outside of 0..1; expected {expected}")


@dataclass(frozen=True)
class Region:
    """Edits on one token grid.

    Attributes:
        places: image tokens that are looked at `[Q]`.
        inside: which of these are changed by any of them, as indices `[chosen]`.
        weights: of every edit at the places, float32 `[Q]` in 0..1.
        shares: of every edit that replaces, float32 `[Q]`.
    """

    places: torch.Tensor
    inside: torch.Tensor
    weights: list[torch.Tensor]
    shares: list[torch.Tensor | None]


def find_region(
    edits: Sequence[AttentionEdit], grid: Grid, device: torch.device, geometry: Mapping[str, int]
) -> Region:
    """Where edits are on a grid; read on the host, once for all passes over it.

    Raises:
        ConceptMapsValueError: an edit is nowhere on it, or its map has other frames.
    """
    weights = [_weight(edit, grid, geometry) for edit in edits]
    for edit, weight in zip(edits, weights, strict=True):
        if not bool(weight.any()):
            raise ConceptMapsValueError(
                f"the edit of {edit.words!r} reaches none of the {grid.frames} x {grid.height} x {grid.width} tokens; "
                f"expected a mask that covers half of one at least (a float mask covers parts), and a time that has "
                f"the middle of a token frame in it"
            )
    shares = [None if e.replace is None else _on_grid("replace", e.replace, grid, geometry) for e in edits]
    changed = torch.stack(weights).amax(0) > 0
    # A transform is a function of the whole map, wherever it is applied.
    looked = torch.ones_like(changed) if any(edit.transform is not None for edit in edits) else changed
    cells = looked.flatten().nonzero().flatten()
    image = torch.arange(grid.tokens.stop).view(1, 1, -1, 1)
    return Region(
        places=grid.select(image).flatten()[cells].to(device),
        inside=changed.flatten()[cells].nonzero().flatten().to(device),
        weights=[weight.flatten()[cells].to(device) for weight in weights],
        shares=[None if share is None else share.flatten()[cells].to(device) for share in shares],
    )


def _weight(edit: AttentionEdit, grid: Grid, geometry: Mapping[str, int]) -> torch.Tensor:
    """How much of an edit every token gets, float32 `[frame, height, width]` in 0..1."""
    middle = (torch.arange(grid.frames) + 0.5) / grid.frames
    during = (middle >= edit.time[0]) & (middle < edit.time[1])
    if edit.mask is None:
        weight = torch.ones(grid.frames, grid.height, grid.width)
    else:
        weight = _on_grid("mask", edit.mask, grid, geometry)
        if edit.mask.dtype == torch.bool:
            weight = (weight >= 0.5).float()
    return weight * during[:, None, None]


def _on_grid(name: str, tensor: torch.Tensor, grid: Grid, geometry: Mapping[str, int]) -> torch.Tensor:
    """A map of any size as float32 `[frame, height, width]` of the grid, by means over what every token covers.

    Raises:
        ConceptMapsValueError: it has other frames than the grid or the video.
    """
    frames = tensor.detach().cpu().float()
    frames = frames[None] if frames.ndim == 2 else frames
    if frames.shape[0] == 1:
        frames = frames.expand(grid.frames, -1, -1)
    if frames.shape[0] < grid.frames:
        raise ConceptMapsValueError(
            f"{name} has {frames.shape[0]} frames; expected 1, the {grid.frames} of the token grid, or the video's"
        )
    if frames.shape[0] > grid.frames:
        frames = gather_frames(frames, grid.frames, **geometry)
    if frames.shape[1:] == (grid.height, grid.width):
        return frames
    return functional.interpolate(frames[:, None], size=(grid.height, grid.width), mode="area")[:, 0]
