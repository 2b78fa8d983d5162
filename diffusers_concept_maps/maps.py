"""ConceptMaps: what a capture returns. Maps on the token grid, in pixels, saved and loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError

if TYPE_CHECKING:
    from PIL import Image

_FORMAT = "diffusers_concept_maps/1"


class ConceptMaps:
    """Saliency maps of a set of concepts, one tensor per method.

    Inside `trace` the object is filled while the pipeline runs; `get` may be called at any time after the first
    recorded step. Maps live on the model's token grid: `frame` counts latent frames, `height` and `width` patches.

    Attributes:
        concepts: the concepts in map order.
        methods: the methods in the order asked for; the first one is the default of `maps[concept]`.
        metadata: what made the maps (model class, layers, heads, normalization, ...), JSON-compatible.

    Example:
        >>> maps.get("imap").shape          # [batch, concept, frame, height, width]
        >>> maps["running"].overlay(frames)
    """

    def __init__(
        self,
        concepts: Sequence[str],
        methods: Sequence[str],
        read: Callable[[str], torch.Tensor],
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Assign only; `read(method)` gives the finished map `[batch, concept, frame, height, width]`."""
        self.concepts = tuple(concepts)
        self.methods = tuple(methods)
        self.metadata = dict(metadata or {})
        self._read = read

    def get(self, method: str | None = None) -> torch.Tensor:
        """Maps of one method.

        Args:
            method: one of `methods`; None is the first.

        Returns:
            float32 CPU tensor `[batch, concept, frame, height, width]`; images have `frame == 1`. The scale is the
            one of the normalization that was asked for.

        Raises:
            ConceptMapsValueError: the method was not captured.
            ConceptMapsError: nothing has been recorded yet.
        """
        name = self.methods[0] if method is None else method
        if name not in self.methods:
            raise ConceptMapsValueError(
                f"method {name!r} was not captured; captured were {', '.join(self.methods)}. "
                f"Name it in `methods=` of the capture."
            )
        return self._read(name)

    def __getitem__(self, concept: str) -> ConceptMap:
        """One concept of the default (first) method."""
        return self.concept(concept)

    def concept(self, concept: str, method: str | None = None) -> ConceptMap:
        """One concept of one method.

        Args:
            concept: one of `concepts`.
            method: one of `methods`; None is the first.

        Raises:
            ConceptMapsValueError: concept or method was not captured.
        """
        if concept not in self.concepts:
            raise ConceptMapsValueError(
                f"concept {concept!r} was not captured; captured were {', '.join(map(repr, self.concepts))}."
            )
        return ConceptMap(concept, self.get(method)[:, self.concepts.index(concept)])

    def upsample(self, size: tuple[int, int], frames: int, method: str | None = None) -> torch.Tensor:
        """Maps in pixels.

        Args:
            size: `(height, width)` in pixels.
            frames: number of video frames.
            method: one of `methods`; None is the first.

        Returns:
            float32 CPU tensor `[batch, concept, frames, height, width]`: bilinear in space; in time every video frame
            takes the latent frame that covers it (see `upsample_map`).
        """
        return upsample_map(self.get(method), size, frames)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all maps to a safetensors file with one JSON metadata entry; the file appears whole or not at all.

        Args:
            path: file to write; an existing one is replaced.

        Raises:
            ConceptMapsError: nothing has been recorded yet.
        """
        target = Path(path)
        tensors = {method: self.get(method).contiguous() for method in self.methods}
        header = {"concepts": self.concepts, "methods": self.methods, "metadata": self.metadata, "format": _FORMAT}
        partial = target.with_name(f".{target.name}.partial")
        try:
            save_file(tensors, partial, metadata={"concept_maps": json.dumps(header)})
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def __repr__(self) -> str:
        return f"ConceptMaps(concepts={list(self.concepts)}, methods={list(self.methods)})"


@dataclass(frozen=True)
class ConceptMap:
    """The map of one concept.

    Attributes:
        concept: its text.
        tensor: float32 CPU tensor `[batch, frame, height, width]` on the token grid.
    """

    concept: str
    tensor: torch.Tensor

    def overlay(self, frames: Any, *, index: int = 0, opacity: float = 0.6) -> list[Image.Image]:
        """Frames with the map laid over them, in one scale for the whole clip.

        Args:
            frames: the frames of one video or image: PIL images, an array `[frame, height, width, 3]` or a tensor
                `[frame, 3, height, width]` in 0..1.
            index: which map of the batch.
            opacity: of the map where it is strongest, 0 to 1.

        Returns:
            One PIL image per frame.
        """
        from diffusers_concept_maps.visualize.overlay import overlay

        return overlay(frames, self.tensor[index], opacity=opacity)

    def to_video(
        self, path: str | os.PathLike[str], frames: Any, *, index: int = 0, opacity: float = 0.6, fps: int = 8
    ) -> None:
        """Write `overlay(frames)` as a video file; needs the `viz` extra.

        Args:
            path: file to write, such as `dog.mp4`; it appears whole or not at all.
            frames: as for `overlay`.
            index: which map of the batch.
            opacity: of the map where it is strongest, 0 to 1.
            fps: frames per second.
        """
        from diffusers_concept_maps.visualize.video import write_video

        write_video(path, self.overlay(frames, index=index, opacity=opacity), fps=fps)


def upsample_map(maps: torch.Tensor, size: tuple[int, int], frames: int) -> torch.Tensor:
    """Bring maps from the token grid to pixels: bilinear in space, the covering latent frame in time.

    A causal video VAE encodes the first frame alone and every later latent frame covers `r` video frames: if
    `frames - 1` is a multiple `r` of `latent_frames - 1`, video frame `j` takes latent frame `ceil(j / r)`.
    Otherwise the video frames are spread evenly over the latent ones.

    Args:
        maps: `[..., latent_frames, height, width]`.
        size: `(height, width)` in pixels.
        frames: number of video frames.

    Returns:
        Tensor `[..., frames, *size]` of the same dtype.

    Raises:
        ConceptMapsValueError: a size below 1.
    """
    if min(*size, frames) < 1:
        raise ConceptMapsValueError(f"size {size} with {frames} frames; expected at least one pixel and one frame")
    latent = maps.shape[-3]
    index = torch.arange(frames)
    if latent > 1 and frames > 1 and (frames - 1) % (latent - 1) == 0:
        ratio = (frames - 1) // (latent - 1)
        index = (index + ratio - 1) // ratio
    else:
        index = index * latent // frames
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    scaled = torch.nn.functional.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return scaled.view(*maps.shape[:-2], *size)[..., index.to(maps.device), :, :]


def load(path: str | os.PathLike[str]) -> ConceptMaps:
    """Read maps written by `ConceptMaps.save`.

    Args:
        path: a safetensors file.

    Raises:
        ConceptMapsError: the file is missing, damaged or not one of ours.
    """
    try:
        with safe_open(os.fspath(path), "pt") as file:
            entry = (file.metadata() or {}).get("concept_maps")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise ConceptMapsError(f"cannot read {os.fspath(path)!r} as concept maps: {error}") from error
    if entry is None:
        raise ConceptMapsError(
            f"{os.fspath(path)!r} is a safetensors file without concept maps; expected one written by ConceptMaps.save"
        )
    header = json.loads(entry)
    if header.get("format") != _FORMAT:
        raise ConceptMapsError(
            f"{os.fspath(path)!r} has format {header.get('format')!r}; this version reads {_FORMAT!r}"
        )
    return ConceptMaps(header["concepts"], header["methods"], tensors.__getitem__, header["metadata"])
