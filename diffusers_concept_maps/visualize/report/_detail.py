"""Maps by layer, step and head for the small pictures of the page."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from diffusers_concept_maps import ops
from diffusers_concept_maps.detail import AXES
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.visualize.report._numbers import coarser, packed

if TYPE_CHECKING:
    from diffusers_concept_maps.maps import ConceptMaps

BYTES = 300_000
"""Scores of one axis at most, one byte each; of more maps a coarser grid is stored."""


@dataclass(frozen=True)
class KeptMaps:
    """The maps of one method with all three axes, of which those that were not kept have one entry.

    Attributes:
        maps: `[layer, step, head, concept, frame, height, width]`.
        axes: which were kept, out of `detail.AXES`.
        names: the number of each kept layer, step and head.
    """

    maps: torch.Tensor
    axes: tuple[str, ...]
    names: dict[str, list[int]]


def at_hand(maps: ConceptMaps, method: str, index: int) -> KeptMaps | None:
    """What a capture has kept; None if it kept nothing, has not ended, or the maps were loaded from a file."""
    try:
        detail = maps.detail(method)
    except ConceptMapsError:
        return None
    axes = tuple(maps.metadata["detail"])
    recorded = maps.coverage[method].any(1).nonzero().flatten().tolist()
    return _kept(detail, axes, {"layer": maps.metadata["methods"][method]["layers"], "step": recorded}, index)


def from_file(path: str | os.PathLike[str], maps: ConceptMaps, index: int) -> dict[str, KeptMaps]:
    """What a capture has streamed to a file, by method.

    Raises:
        ConceptMapsError: the file is missing, damaged or not one of ours.
        ConceptMapsValueError: it is of other concepts, methods or videos.
    """
    name, branch = os.fspath(path), maps.metadata.get("branch", "cond")
    found = {}
    try:
        with safe_open(name, "pt") as file:
            header = json.loads((file.metadata() or {})["concept_maps"])
            axes = tuple(axis for axis in header["axes"] if axis in AXES)
            if tuple(header["concepts"]) != maps.concepts:
                raise ConceptMapsValueError(
                    f"{name!r} is of the concepts {', '.join(map(repr, header['concepts']))}; expected those of the "
                    f"maps, {', '.join(map(repr, maps.concepts))}"
                )
            for method in maps.methods:
                numbers = {"layer": header["layers"][method], "step": header["steps"]}
                found[method] = _kept(file.get_tensor(f"{branch}.{method}"), axes, numbers, index)
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ConceptMapsError(
            f"cannot read {name!r} as maps of kept axes ({error}); expected the file of detail_path of this capture"
        ) from error
    return found


def _kept(detail: torch.Tensor, axes: tuple[str, ...], numbers: dict[str, list[int]], index: int) -> KeptMaps:
    rows = detail.shape[len(axes)]
    if index >= rows:
        raise ConceptMapsValueError(f"index is {index}; expected a video of the batch, 0 to {rows - 1}")
    full = detail.select(len(axes), index)
    for position, axis in enumerate(AXES):
        full = full if axis in axes else full.unsqueeze(position)
    sizes = dict(zip(AXES, full.shape, strict=False))
    # A step that a cache skipped is on the axis, but in no coverage: then the steps are counted.
    names = {axis: numbers.get(axis, []) for axis in AXES}
    names = {a: list(names[a]) if len(names[a]) == sizes[a] else list(range(sizes[a])) for a in axes}
    return KeptMaps(full, axes, names)


def panels(kept: KeptMaps, share: int) -> dict[str, Any]:
    """Small maps by axis, each the mean over the other axes; by head for each layer.

    Heads have a score: the Calinski-Harabasz index of the frames in the head's own maps, the concepts being the
    features, averaged over the steps. IMAP (arXiv 2603.02919) takes it of attention outputs, which maps do not hold.

    Args:
        kept: the maps.
        share: among how many methods the bytes are shared.
    """
    layers, steps, heads, concepts, *grid = kept.maps.shape
    counts = {"layer": layers, "step": steps, "head": layers * heads}
    grids = {
        axis: coarser((grid[0], grid[1], grid[2]), BYTES // (share * counts[axis] * concepts)) for axis in kept.axes
    }
    means = {axis: _Mean((counts[axis], concepts, *grids[axis])) for axis in kept.axes}
    scores = _Mean((layers, heads))
    for layer, step, maps in _slices(kept.maps):
        pooled = {axis: _pooled(maps, grids[axis]) for axis in kept.axes}
        for axis, row in (("layer", layer), ("step", step)):
            if axis in means:
                means[axis].add(row, pooled[axis].nanmean(0))
        if "head" in means:
            means["head"].add(slice(layer * heads, (layer + 1) * heads), pooled["head"])
            scores.add(layer, _separability(maps))
    result = {axis: _packed(mean.result()) | {"names": kept.names[axis]} for axis, mean in means.items()}
    if "head" in result:
        rows = kept.names.get("layer", [None])
        result["head"] |= {"rows": rows, "scores": [_finite(row) for row in scores.result()]}
    return result


def _slices(maps: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """One layer and step after the other, since all of a long capture may be mapped from a file."""
    for layer in range(maps.shape[0]):
        for step in range(maps.shape[1]):
            yield layer, step, maps[layer, step].float()


class _Mean:
    """A mean over what was recorded: NaN is left out."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._sum = torch.zeros(shape, dtype=torch.float64)
        self._count = torch.zeros(shape, dtype=torch.float64)

    def add(self, place: int | slice, values: torch.Tensor) -> None:
        self._sum[place] += values.nan_to_num(0.0)
        self._count[place] += ~values.isnan()

    def result(self) -> torch.Tensor:
        return self._sum / self._count


def _pooled(maps: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool3d(maps, grid)


def _separability(maps: torch.Tensor) -> torch.Tensor:
    """Of every head `[head]`, from `[head, concept, frame, height, width]`; NaN of a single frame."""
    frames = maps.shape[2]
    if frames < 2 or maps[0, 0].numel() <= frames:
        return torch.full(maps.shape[:1], torch.nan)
    features = maps.flatten(2).transpose(1, 2)[None]
    return ops.frame_separability(features.contiguous(), frames)[0]


def _packed(maps: torch.Tensor) -> dict[str, Any]:
    known = torch.where(maps.isnan(), torch.inf, maps).amin((0, 2, 3, 4))
    low = torch.where(known.isinf(), 0.0, known)
    high = torch.maximum(torch.where(maps.isnan(), -torch.inf, maps).amax((0, 2, 3, 4)), low)
    return packed(maps, low, high, bits=8)


def _finite(scores: torch.Tensor) -> list[float | None]:
    return [float(score) if score.isfinite() else None for score in scores]
