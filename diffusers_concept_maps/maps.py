"""ConceptMaps: what a capture returns. Maps on the token grid, in pixels, saved and loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffusers_concept_maps.concept_map import ConceptMap
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.files import whole_file
from diffusers_concept_maps.fitting import Fit
from diffusers_concept_maps.media import read_frames
from diffusers_concept_maps.upsample import upsample_map

_FORMAT = "diffusers_concept_maps/1"
_GEOMETRY = ("frames_per_latent", "latents_per_token")


class MapSource(Protocol):
    """Where `ConceptMaps` reads from: a capture, or a file."""

    @property
    def concepts(self) -> tuple[str, ...]:
        """Names in map order."""

    @property
    def metadata(self) -> dict[str, Any]:
        """What made the maps, JSON-compatible."""

    def read(self, method: str) -> torch.Tensor:
        """Map `[batch, concept, frame, height, width]`."""

    def coverage(self, method: str) -> torch.Tensor:
        """Bool `[step, layer]`."""

    def detail(self, method: str) -> torch.Tensor:
        """Map with the kept axes first."""


class ConceptMaps:
    """Saliency maps of a set of concepts, one tensor per method.

    Inside `trace` the object is filled while the pipeline runs; `get` may be called at any time after the first
    recorded step. Maps live on the model's token grid: `frame` counts latent frames, `height` and `width` patches.

    Attributes:
        concepts: the concepts in map order.
        methods: the methods in the order asked for; the first one is the default of `maps[concept]`.

    Example:
        >>> maps.get("imap").shape          # [batch, concept, frame, height, width]
        >>> maps["running"].overlay(frames)
    """

    def __init__(self, source: MapSource, methods: Sequence[str]) -> None:
        """Assign only."""
        self.methods = tuple(methods)
        self._source = source

    @property
    def concepts(self) -> tuple[str, ...]:
        """The concepts in map order; words of a prompt are known once it has been encoded."""
        return self._source.concepts

    @property
    def metadata(self) -> dict[str, Any]:
        """What made the maps (model class, layers, heads, normalization, ...), JSON-compatible.

        Complete once the pipeline has run: only then it is known how many words a prompt has.
        """
        return self._source.metadata

    @property
    def coverage(self) -> dict[str, torch.Tensor]:
        """Which denoising steps and layers each method's maps are made of: bool tensors `[step, layer]`.

        Steps that a cache skipped, or that were not asked for, are False.
        """
        return {method: self._source.coverage(method) for method in self.methods}

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
        return self._source.read(self._check(method))

    def detail(self, method: str | None = None) -> torch.Tensor:
        """Maps with the axes that the capture was asked to keep.

        Args:
            method: one of `methods`; None is the first.

        Returns:
            float32 CPU tensor `[layer, step, head, batch, concept, frame, height, width]` without the axes that were
            not kept; layers and steps are those recorded, in order. What a cache skipped is NaN. The second softmax of
            `parity="imap"` is not in them.

        Raises:
            ConceptMapsValueError: the method was not captured.
            ConceptMapsError: no axes were kept, or the capture has not ended.
        """
        return self._source.detail(self._check(method))

    def segment(self, method: str | None = None) -> torch.Tensor:
        """The concept of highest score at every token.

        Args:
            method: one of `methods`; None is the first.

        Returns:
            int64 tensor `[batch, frame, height, width]` of indices into `concepts`; the lowest index on ties.

        Raises:
            ConceptMapsValueError: there is a single concept, or the method was not captured.
        """
        maps = self.get(method)
        if maps.shape[1] < 2:
            raise ConceptMapsValueError(
                f"segmentation chooses between concepts and there is only {self.concepts[0]!r}; add another, such as "
                f"'background'"
            )
        return maps.argmax(1)

    def _check(self, method: str | None) -> str:
        name = self.methods[0] if method is None else method
        if name not in self.methods:
            raise ConceptMapsValueError(
                f"method {name!r} was not captured; captured were {', '.join(self.methods)}. "
                f"Name it in `methods=` of the capture."
            )
        return name

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
        tensor = self.get(method)[:, self.concepts.index(concept)]
        return ConceptMap(concept, tensor, **self.geometry, fit=self.fit)

    def upsample(
        self,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        method: str | None = None,
        *,
        mode: str = "bilinear",
        temporal: str = "nearest",
        guide: Any = None,
    ) -> torch.Tensor:
        """Maps in pixels.

        Maps of `encode` know the clip they are of: on its number of frames (those the model has seen), what was padded
        is left out.

        Args:
            size: `(height, width)` in pixels; None is that of the guide, or of the clip that `encode` was given.
            frames: number of video frames; None likewise.
            method: one of `methods`; None is the first.
            mode: in space, "bilinear", "nearest", or "guided": with the edges of `guide` (needs the `guided` extra).
            temporal: "nearest" or "linear"; see `spread_frames`.
            guide: the frames of this size and number, as for `media.read_frames`, for "guided" only.

        Returns:
            float32 CPU tensor `[batch, concept, frames, height, width]`.

        Raises:
            ConceptMapsValueError: neither a size or number of frames nor where to take it from, or as `upsample_map`.
            ConceptMapsError: as `get` and `upsample_map`.
        """
        maps = self.get(method)
        if guide is not None:
            if maps.shape[0] > 1:
                raise ConceptMapsValueError(
                    f"one guide for maps of {maps.shape[0]} videos; upsample each with upsample.upsample_map instead"
                )
            guide = read_frames(guide).frames
        fit = self.fit
        known = (fit.covered, *fit.source[1:]) if fit is not None else None
        if guide is not None:
            known = guide.shape[0], guide.shape[2], guide.shape[3]
        if size is None or frames is None:
            if known is None:
                raise ConceptMapsValueError(
                    f"size is {size} and frames {frames}, and these maps are of no clip to take them from; expected "
                    f"size=(height, width) in pixels and a number of frames"
                )
            size, frames = size or known[1:], known[0] if frames is None else frames
        padding = fit.padding if fit is not None and frames == fit.covered else 0
        options: dict[str, Any] = {"mode": mode, "temporal": temporal, "padding": padding, **self.geometry}
        return upsample_map(maps, size, frames, guide=guide, **options)

    @property
    def fit(self) -> Fit | None:
        """How the clip that `encode` was given was fitted to the model; None for maps of what was generated."""
        return Fit.from_json(self.metadata["source"]) if "source" in self.metadata else None

    @property
    def geometry(self) -> dict[str, Any]:
        """What is known of how token frames relate to video frames; see `spread_frames`."""
        return {name: self.metadata[name] for name in _GEOMETRY if name in self.metadata}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all maps to a safetensors file with one JSON metadata entry; the file appears whole or not at all.

        Args:
            path: file to write; an existing one is replaced.

        Raises:
            ConceptMapsError: nothing has been recorded yet, or the folder is not there.
        """
        tensors = {method: self.get(method).contiguous() for method in self.methods}
        tensors |= {f"coverage.{method}": table for method, table in self.coverage.items()}
        header = {"concepts": self.concepts, "methods": self.methods, "metadata": self.metadata, "format": _FORMAT}
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata={"concept_maps": json.dumps(header)})

    def report(self, path: str | os.PathLike[str], frames: Any = None, **options: Any) -> None:
        """Write a page of HTML to look at the maps in; `visualize.report.write_report` says more.

        Args:
            path: file to write, such as `report.html`.
            frames: what the maps are of, as for `media.read_frames`; None shows the maps alone.
            options: those of `write_report`: `tracks`, `index`, `fps`, `title` and `detail`.

        Raises:
            ConceptMapsError: as `write_report`.
        """
        from diffusers_concept_maps.visualize.report import write_report

        write_report(path, self, frames, **options)

    def __repr__(self) -> str:
        return f"ConceptMaps(concepts={list(self.concepts)}, methods={list(self.methods)})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the maps of the first method, small; see `visualize.notebook`."""
        from diffusers_concept_maps.visualize.notebook import error_html, maps_html

        try:
            return maps_html(f"ConceptMaps, {self.methods[0]}", self.concepts, self.get())
        except ConceptMapsError as error:
            return error_html(repr(self), error)


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
    try:
        header = json.loads(entry)
        if header["format"] != _FORMAT:
            raise ConceptMapsError(
                f"{os.fspath(path)!r} has format {header['format']!r}; this version reads {_FORMAT!r}"
            )
        missing = [name for m in header["methods"] for name in (m, f"coverage.{m}") if name not in tensors]
        if missing:
            raise ConceptMapsError(
                f"{os.fspath(path)!r} lacks the tensors {', '.join(missing)} that its header names; save the maps anew"
            )
        stored = StoredMaps(tuple(header["concepts"]), tensors, dict(header["metadata"]))
        return ConceptMaps(stored, header["methods"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConceptMapsError(
            f"cannot read {os.fspath(path)!r} as concept maps: damaged metadata ({error!r})"
        ) from error


@dataclass(frozen=True)
class StoredMaps:
    """Finished maps, such as those out of a file: a `MapSource` for `ConceptMaps`.

    Attributes:
        concepts: names in map order.
        tensors: per method a map `[batch, concept, frame, height, width]`, and under "coverage.<method>" a bool table
            `[step, layer]`.
        metadata: what made them, JSON-compatible.
    """

    concepts: tuple[str, ...]
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    def read(self, method: str) -> torch.Tensor:
        """See `MapSource`."""
        return self.tensors[method]

    def coverage(self, method: str) -> torch.Tensor:
        """See `MapSource`."""
        return self.tensors[f"coverage.{method}"]

    def detail(self, method: str) -> torch.Tensor:
        """Refused: kept axes have a file of their own."""
        raise ConceptMapsError("maps of kept axes are in the file of detail_path; read that one with safetensors")
