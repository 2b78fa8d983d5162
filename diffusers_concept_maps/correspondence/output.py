"""What tracking points returns: tracks, saved and loaded, drawn into frames and videos."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.utils import BaseOutput

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.files import whole_file

if TYPE_CHECKING:
    from PIL import Image

_FORMAT = "diffusers_concept_maps.tracks/1"
_TYPES = {"tracks": torch.float32, "visibility": torch.bool, "confidence": torch.float32, "points": torch.float32}


@dataclass
class TrackOutput(BaseOutput):
    """Tracks of points through a video.

    Coordinates are those of pixel centers of the input video: (0, 0) is the middle of the first pixel.

    Attributes:
        tracks: float32 CPU tensor `[point, frame, 2]`, (x, y) in pixels.
        visibility: bool `[point, frame]`.
        confidence: float32 `[point, frame]`, in 0..1; higher is surer.
        points: float32 `[point, 3]`, the queries: frame, x and y.
        metadata: how they were tracked, JSON-compatible.
    """

    tracks: torch.Tensor
    visibility: torch.Tensor
    confidence: torch.Tensor
    points: torch.Tensor
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to an npz file, which NumPy alone can read; it appears whole or not at all.

        Args:
            path: file to write, such as `tracks.npz`, exactly by this name; an existing one is replaced.

        Raises:
            ConceptMapsValueError: the tensors do not fit together, or the metadata are no JSON.
            ConceptMapsError: the folder is not there.
        """
        tensors = {name: getattr(self, name) for name in _TYPES}
        _check(tensors)
        try:
            metadata = json.dumps(self.metadata, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConceptMapsValueError(
                f"the metadata {self.metadata} are no JSON ({error}); expected numbers, strings, lists and dicts"
            ) from error
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        arrays |= {"metadata": np.array(metadata), "format": np.array(_FORMAT)}
        # Given a name, NumPy would add its suffix to one that has another.
        with whole_file(path) as partial, open(partial, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrackOutput:
        """Read tracks written by `save`.

        Args:
            path: an npz file.

        Raises:
            ConceptMapsError: the file is missing, damaged or not one of ours.
        """
        name = os.fspath(path)
        try:
            with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
                arrays = {member: _member(archive, member) for member in (*_TYPES, "metadata", "format")}
        except KeyError as error:
            raise ConceptMapsError(f"{name!r} holds no tracks ({error.args[0]}); expected a file of save") from error
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise ConceptMapsError(f"cannot read {name!r} as tracks: {error}") from error
        if str(arrays["format"]) != _FORMAT:
            raise ConceptMapsError(f"{name!r} has format {str(arrays['format'])!r}; this version reads {_FORMAT!r}")
        try:
            tensors = {member: torch.from_numpy(arrays[member]) for member in _TYPES}
            _check(tensors)
            return cls(**tensors, metadata=dict(json.loads(str(arrays["metadata"]))))
        except (TypeError, ValueError) as error:
            raise ConceptMapsError(f"cannot read {name!r} as tracks: {error}") from error

    def overlay(self, frames: Any, *, trail: int = 12, radius: float | None = None) -> list[Image.Image]:
        """Frames with the points and their trails drawn into them.

        Args:
            frames: the frames of the video: PIL images, an array `[frame, height, width, 3]` or a tensor
                `[frame, 3, height, width]` in 0..1.
            trail: frames until a trail has faded; 0 draws none.
            radius: of a point, in pixels; None for one that suits the size of the frames.

        Returns:
            One PIL image per frame.

        Raises:
            ConceptMapsError: as `visualize.trails.draw_tracks`.
        """
        from diffusers_concept_maps.visualize.trails import draw_tracks

        return draw_tracks(frames, self.tracks, self.visibility, trail=trail, radius=radius)

    def to_video(
        self,
        path: str | os.PathLike[str],
        frames: Any,
        *,
        trail: int = 12,
        radius: float | None = None,
        fps: int = 8,
    ) -> None:
        """Write `overlay(frames)` as a video file; needs the `viz` extra.

        Args:
            path: file to write, such as `tracks.mp4`; it appears whole or not at all.
            frames: as for `overlay`.
            trail: as for `overlay`.
            radius: as for `overlay`.
            fps: frames per second.

        Raises:
            ConceptMapsError: as `overlay` and `visualize.video.write_video`.
        """
        from diffusers_concept_maps.visualize.video import write_video

        write_video(path, self.overlay(frames, trail=trail, radius=radius), fps=fps)

    def report(self, path: str | os.PathLike[str], frames: Any, **options: Any) -> None:
        """Write a page of HTML to follow the points in; `visualize.report.write_report` says more.

        Args:
            path: file to write, such as `report.html`.
            frames: the frames of the video, as for `media.read_frames`.
            options: those of `write_report`: `maps` to lay over the frames, `index`, `fps`, `title` and `detail`.

        Raises:
            ConceptMapsError: as `write_report`.
        """
        from diffusers_concept_maps.visualize.report import write_report

        write_report(path, frames=frames, tracks=self, **options)


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _check(tensors: dict[str, torch.Tensor]) -> None:
    points, frames = (*tensors["tracks"].shape, 0, 0)[:2]
    shapes = {
        "tracks": (points, frames, 2),
        "visibility": (points, frames),
        "confidence": (points, frames),
        "points": (points, 3),
    }
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != _TYPES[name]:
            raise ConceptMapsValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected {_TYPES[name]} of shape {shape}"
            )
