"""ConceptMap: the map of one concept, and the ways to look at it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.fitting import Fit
from diffusers_concept_maps.upsample import spread_frames


@dataclass(frozen=True)
class ConceptMap:
    """The map of one concept.

    Attributes:
        concept: its text.
        tensor: float32 CPU tensor `[batch, frame, height, width]` on the token grid.
        frames_per_latent: as for `spread_frames`.
        latents_per_token: as for `spread_frames`.
        fit: as `ConceptMaps.fit`.
    """

    concept: str
    tensor: torch.Tensor
    frames_per_latent: int | None = None
    latents_per_token: int = 1
    fit: Fit | None = None

    def overlay(
        self,
        frames: Any,
        *,
        index: int = 0,
        opacity: float = 0.6,
        colormap: str = "inferno",
        legend: bool = False,
        rgba: bool = False,
    ) -> Any:
        """Frames with the map laid over them, in one scale for the whole clip; needs the `viz` extra.

        Of the whole clip that `encode` was given, the frames that the model has not seen are left out.

        Args:
            frames: the frames of one video or image: a path, PIL images, an array `[frame, height, width, 3]` or a
                tensor `[frame, 3, height, width]` in 0..1 or of uint8; with a fourth channel, and in transparent
                pictures, alpha is kept.
            index: which map of the batch.
            opacity: of the map where it is strongest, 0 to 1.
            colormap: "inferno", "viridis", "cividis", "magma" or "plasma".
            legend: draw a color bar with the lowest and the highest score into the lower right corner.
            rgba: the map alone, as a layer to lay over the frames: transparent where the score is low.

        Returns:
            What the frames came as, of the same size, dtype and device: a list of PIL images for a sequence of them or
            a path, one image for one, an array, or a tensor.

        Raises:
            ConceptMapsValueError: the batch has no such map.
            ConceptMapsError: as `visualize.overlay.overlay`.
        """
        from diffusers_concept_maps.visualize.frames import open_frames
        from diffusers_concept_maps.visualize.overlay import overlay

        if not 0 <= index < len(self.tensor):
            raise ConceptMapsValueError(f"index is {index}; expected a map of the batch, 0 to {len(self.tensor) - 1}")
        canvas, padding = open_frames(frames), 0
        if self.fit is not None and len(canvas.pixels) in (self.fit.covered, self.fit.source[0]):
            canvas, padding = canvas.first(self.fit.covered), self.fit.padding
        one_per_frame = spread_frames(
            self.tensor[index],
            len(canvas.pixels),
            padding=padding,
            frames_per_latent=self.frames_per_latent,
            latents_per_token=self.latents_per_token,
        )
        return overlay(canvas, one_per_frame, opacity=opacity, colormap=colormap, legend=legend, rgba=rgba)

    def to_video(
        self,
        path: str | os.PathLike[str],
        frames: Any,
        *,
        index: int = 0,
        opacity: float = 0.6,
        fps: float = 8,
        colormap: str = "inferno",
        legend: bool = False,
        rgba: bool = False,
        lossless: bool = False,
    ) -> None:
        """Write `overlay(frames)` as a video or an animation, every frame of it; needs the `viz` extra.

        Args:
            path: file to write, such as `dog.mp4`, `.webm`, `.webp` or `.gif`; it appears whole or not at all.
            frames: as for `overlay`.
            index: which map of the batch.
            opacity: of the map where it is strongest, 0 to 1.
            fps: frames per second.
            colormap: as for `overlay`.
            legend: as for `overlay`.
            rgba: as for `overlay`; a WebM and a WebP keep the transparency, an MP4 has white instead.
            lossless: keep every pixel, in a WebP alone.

        Raises:
            ConceptMapsError: as `overlay` and `visualize.video.write_video`.
        """
        from diffusers_concept_maps.visualize.frames import open_pictures
        from diffusers_concept_maps.visualize.video import write_video

        shown = self.overlay(
            open_pictures(frames), index=index, opacity=opacity, colormap=colormap, legend=legend, rgba=rgba
        )
        write_video(path, shown, fps=fps, lossless=lossless)

    def _repr_html_(self) -> str:
        """What a notebook shows: the map, small; see `visualize.notebook`."""
        from diffusers_concept_maps.visualize.notebook import error_html, maps_html

        try:
            return maps_html("ConceptMap", [self.concept], self.tensor[:, None])
        except ConceptMapsError as error:
            return error_html(f"ConceptMap({self.concept!r})", error)
