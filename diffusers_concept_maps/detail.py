"""Maps that keep the layer, step or head axis, in memory or streamed to a safetensors file."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from diffusers.utils import logging
from safetensors.torch import load_file

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError

logger = logging.get_logger(__name__)

AXES = ("layer", "step", "head")
IN_MEMORY = 2 * 1024**3
"""Bytes of detail maps that are kept in memory at most; more needs a file."""


def check_axes(axes: Sequence[str]) -> tuple[str, ...]:
    """The axes in the order of `AXES`.

    Raises:
        ConceptMapsValueError: an unknown axis, or one named twice.
    """
    if isinstance(axes, str) or set(axes) - set(AXES) or len(set(axes)) < len(axes):
        raise ConceptMapsValueError(f"detail is {axes!r}; expected a list of different axes out of {', '.join(AXES)}")
    return tuple(axis for axis in AXES if axis in axes)


def check_path(path: Path) -> None:
    """Raise `ConceptMapsValueError` unless a file can be written there."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConceptMapsValueError(f"detail_path is {str(path)!r}; expected a file in a folder that exists")


class DetailMaps:
    """Sums and counts of maps along the kept axes `[layer, step, head, row, concept, frame, height, width]`.

    Axes that are not kept are left out and averaged over. What was never recorded, such as a step that a cache
    skipped, is NaN. In a file the sums are memory-mapped, so that memory stays bounded; the file appears whole at
    the end, or not at all.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], kept: int, path: Path | None, header: str) -> None:
        """Set up zeros.

        Args:
            shapes: per name of a tensor; its first `kept` axes are the kept ones.
            kept: number of kept axes.
            path: safetensors file to write; None keeps the maps in memory.
            header: JSON for the file's one metadata entry.

        Raises:
            ConceptMapsError: too large for memory, or for the disk.
        """
        size = sum(4 * int(np.prod(shape)) for shape in shapes.values())
        self.path = path
        self._partial = path.with_name(f".{path.name}.partial") if path else None
        _check_room(size, path)
        if self._partial:
            logger.warning(f"The maps of every kept axis take {size / 1e6:.1f} MB in {path}.")
            try:
                self._sums = _create(self._partial, shapes, header)
            except BaseException:
                self.discard()
                raise
        else:
            self._sums = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        self._counts = {name: np.zeros(shape[:kept], np.int64) for name, shape in shapes.items()}

    def add(self, name: str, index: tuple[int, ...], scores: torch.Tensor) -> None:
        """Add one map.

        Args:
            name: of the tensor.
            index: position along the kept axes.
            scores: float32 `[row, concept, frame, height, width]`.
        """
        self._sums[name][index] += scores.cpu().numpy()
        self._counts[name][index] += 1

    def finish(self) -> dict[str, torch.Tensor]:
        """Means per name; with a path the file is written whole now."""
        for name, sums in self._sums.items():
            count = self._counts[name].astype(np.float32)
            with np.errstate(invalid="ignore"):
                for index in np.ndindex(count.shape):
                    sums[index] /= count[index] if count[index] else np.float32("nan")
        if self.path and self._partial:
            for sums in self._sums.values():
                sums.flush()  # type: ignore[attr-defined]  # memory-mapped
            os.replace(self._partial, self.path)
            return load_file(self.path)  # mapped anew: what a caller writes into its tensors must not reach the file
        return {name: torch.from_numpy(sums) for name, sums in self._sums.items()}

    def discard(self) -> None:
        """Leave nothing behind of a file that was not finished."""
        if self._partial:
            self._partial.unlink(missing_ok=True)


def _check_room(size: int, path: Path | None) -> None:
    if path is None and size > IN_MEMORY:
        raise ConceptMapsError(
            f"maps of every kept axis would take {size / 1e9:.1f} GB of memory; pass detail_path='maps.safetensors' "
            f"to stream them to a file, or keep fewer axes, layers or steps"
        )
    if path is not None:
        free = shutil.disk_usage(path.absolute().parent).free
        if size > free:
            raise ConceptMapsError(
                f"maps of every kept axis take {size / 1e9:.1f} GB, {path.absolute().parent} has {free / 1e9:.1f} "
                f"GB left; keep fewer axes, layers or steps"
            )


def _create(path: Path, shapes: Mapping[str, tuple[int, ...]], header: str) -> dict[str, np.ndarray]:
    """A safetensors file of float32 zeros and a writable memory map of each of its tensors."""
    entries: dict[str, object] = {"__metadata__": {"concept_maps": header}}
    offset, begins = 0, {}
    for name, shape in shapes.items():
        begins[name], end = offset, offset + 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # safetensors wants the data aligned
    start = 8 + len(text)
    with path.open("wb") as file:
        _reserve(file, start + offset)
        file.write(struct.pack("<Q", len(text)) + text)
    return {
        name: np.memmap(path, np.float32, "r+", offset=start + begins[name], shape=shape)
        for name, shape in shapes.items()
    }


def _reserve(file: BinaryIO, size: int) -> None:
    """Take the room of a file now, where the system can: through a memory map a full disk would end the process."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    except OSError as error:
        raise ConceptMapsError(
            f"cannot reserve {size / 1e9:.1f} GB for the maps of every kept axis in {str(Path(file.name).parent)!r}: "
            f"{error.strerror}; keep fewer axes, layers or steps, or use another folder"
        ) from error
