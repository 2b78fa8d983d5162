"""Where exported maps come from: a file of maps, a file of kept axes, or maps in memory; read one clip at a time."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from diffusers_concept_maps.detail import AXES
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.maps import ConceptMaps, load

_DETAIL = "diffusers_concept_maps/detail/1"

Place = Mapping[str, int]
"""Where along the kept axes: the number of a layer, step or head by the name of its axis."""


@dataclass(frozen=True)
class Source:
    """Maps that are read one clip, or one frame of one, at a time.

    Attributes:
        concepts: names in map order.
        axes: of every kept axis, in the order of `detail.AXES`, the numbers of its layers, steps or heads.
        videos: size of the batch.
        grid: token frames, height and width.
        method: which maps they are.
        read: from the position along all axes of the tensor to what is there; an axis whose position is not named is
            returned whole.
        metadata: what made them, JSON-compatible.
        geometry: how token frames relate to video frames, see `upsample.spread_frames`.
        clip: frames, height and width of the clip that they are of, where that is known.
    """

    concepts: tuple[str, ...]
    axes: dict[str, tuple[int, ...]]
    videos: int
    grid: tuple[int, int, int]
    method: str
    read: Callable[[tuple[int, ...]], np.ndarray]
    metadata: dict[str, Any] = field(default_factory=dict)
    geometry: dict[str, Any] = field(default_factory=dict)
    clip: tuple[int, int, int] | None = None

    def clip_at(
        self, axes: Mapping[str, tuple[int, ...]], place: Place, video: int, concept: int, frame: int | None = None
    ) -> np.ndarray:
        """A map, averaged over the axes that `place` does not name, one position in memory at a time.

        Args:
            axes: the numbers to average over, by axis.
            place: where to read.
            video: position in the batch.
            concept: position in `concepts`.
            frame: a token frame; None is all of them.

        Returns:
            float32 `[frame, height, width]`, without the first axis where a frame is named. What was not recorded has
            no part in the mean; where nothing was, it is NaN.

        Raises:
            ConceptMapsValueError: a score of what was recorded is infinite or not a number.
        """
        open_axes = tuple(name for name in self.axes if name not in place)
        behind = (video, concept) if frame is None else (video, concept, frame)
        total, count = np.zeros(self.grid[1:] if frame is not None else self.grid), 0
        for rest in places(axes, open_axes):
            full = {**rest, **place}
            index = tuple(numbers.index(full[name]) for name, numbers in self.axes.items())
            scores = self.read((*index, *behind))
            if not np.isnan(scores).all():
                total += scores
                count += 1
        if not np.isfinite(total).all():
            raise ConceptMapsValueError(
                f"the map of {self.concepts[concept]!r} at {dict(place)} has scores that are infinite or no numbers"
            )
        return (total / count if count else np.full_like(total, np.nan)).astype(np.float32)


def places(axes: Mapping[str, tuple[int, ...]], per: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """Every combination of the numbers of some axes, the last axis fastest.

    Args:
        axes: the numbers by axis.
        per: the axes to combine.
    """
    for numbers in itertools.product(*(axes[name] for name in per)):
        yield dict(zip(per, numbers, strict=True))


def open_source(maps: ConceptMaps | str | os.PathLike[str], method: str | None = None, branch: str = "cond") -> Source:
    """Maps to export.

    Args:
        maps: maps in memory, a file that `ConceptMaps.save` has written, or the file of `trace(detail_path=...)`. Of
            the latter only what is being exported is ever in memory.
        method: which of their methods; None is the first.
        branch: which guidance branch of a file of kept axes.

    Raises:
        ConceptMapsValueError: it has no such method or branch.
        ConceptMapsError: the file cannot be read, or holds neither.
    """
    if isinstance(maps, ConceptMaps):
        return _of_maps(maps, method)
    header = _header(maps)
    if header.get("format") == _DETAIL:
        return _of_detail(os.fspath(maps), header, method, branch)
    return _of_maps(load(maps), method)


def _header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a file; empty where `load` knows better what is wrong with it."""
    try:
        with safe_open(os.fspath(path), "np") as file:
            header = json.loads((file.metadata() or {}).get("concept_maps", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConceptMapsError(f"cannot read {os.fspath(path)!r} as concept maps: {error}") from error
    return header if isinstance(header, dict) else {}


def _of_maps(maps: ConceptMaps, method: str | None) -> Source:
    scores = maps.get(method).numpy()
    fit = maps.fit
    return Source(
        concepts=maps.concepts,
        axes={},
        videos=scores.shape[0],
        grid=(scores.shape[2], scores.shape[3], scores.shape[4]),
        method=method or maps.methods[0],
        read=scores.__getitem__,
        metadata=maps.metadata,
        geometry=maps.geometry | ({} if fit is None else {"padding": fit.padding}),
        clip=None if fit is None else (fit.covered, fit.source[1], fit.source[2]),
    )


def _of_detail(path: str, header: dict[str, Any], method: str | None, branch: str) -> Source:
    try:
        layers, kept = header["layers"], [name for name in header["axes"] if name in AXES]
        method = next(iter(layers)) if method is None else method
        name = f"{branch}.{method}"
        with safe_open(path, "np") as file:
            if name not in file.keys():  # noqa: SIM118 (not a mapping)
                found = ", ".join(sorted(file.keys()))
                raise ConceptMapsValueError(f"{path!r} has no maps {name!r} (branch.method); it has {found}")
            shape = file.get_slice(name).get_shape()
        numbers = {"layer": layers[method], "step": header["steps"]}
        axes = {axis: tuple(numbers.get(axis, range(size))) for axis, size in zip(kept, shape, strict=False)}
        concepts = tuple(header["concepts"])
    except (KeyError, TypeError, StopIteration, SafetensorError) as error:
        raise ConceptMapsError(f"cannot read {path!r} as maps of kept axes: damaged metadata ({error!r})") from error

    def read(index: tuple[int, ...]) -> np.ndarray:
        # Opened anew: pages of a memory map count as memory of this process for as long as the map is open.
        with safe_open(path, "np") as file:
            return np.asarray(file.get_slice(name)[index])

    return Source(
        concepts=concepts,
        axes=axes,
        videos=shape[-5],
        grid=(shape[-3], shape[-2], shape[-1]),
        method=method,
        read=read,
        metadata=header | {"branch": branch},
    )
