"""The size and the frames of what is exported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.upsample import spread_frames, upsample_map
from diffusers_concept_maps.visualize.export.source import Source


@dataclass(frozen=True)
class Canvas:
    """What a clip becomes.

    Attributes:
        size: height and width in pixels.
        token_frames: which token frame each frame shows.
        mode: as for `upsample.upsample_map`.
    """

    size: tuple[int, int]
    token_frames: tuple[int, ...]
    mode: str

    def frames(self, clip: np.ndarray) -> Iterator[np.ndarray]:
        """A clip `[token_frame, height, width]` as one array `[height, width]` after the other."""
        for frame in self.token_frames:
            yield self.scaled(clip[frame])

    def scaled(self, scores: np.ndarray) -> np.ndarray:
        """One token frame in pixels; at the size of the token grid its very values."""
        if scores.shape == self.size:
            return scores
        return upsample_map(torch.from_numpy(scores[None]), self.size, 1, mode=self.mode)[0].numpy()


def make_canvas(
    source: Source, size: str | tuple[int, int], video: tuple[int, int, int] | None, *, smooth: bool
) -> Canvas:
    """Resolve a size.

    Args:
        source: the maps.
        size: "token" is one pixel for each token and one frame for each token frame; "video" and `(height, width)` in
            pixels have the frames of the video, where these are known.
        video: frames, height and width of the video; None is the clip that the maps say they are of.
        smooth: bilinear between tokens instead of blocks.

    Raises:
        ConceptMapsValueError: any other size, or the video's is not known.
    """
    mode = "bilinear" if smooth else "nearest"
    video = video or source.clip
    if size == "token":
        return Canvas(source.grid[1:], tuple(range(source.grid[0])), mode)
    if size == "video" and video is None:
        raise ConceptMapsValueError(
            "size is 'video', and these maps do not say how large theirs was; name its file, or a height and width"
        )
    if isinstance(size, str) and size != "video" or not isinstance(size, str) and min(size) < 1:
        raise ConceptMapsValueError(
            f"size is {size!r}; expected 'token', 'video', or a height and width of at least 1"
        )
    frames = source.grid[0] if video is None else video[0]
    pixels = video[1:] if isinstance(size, str) and video is not None else size
    assert not isinstance(pixels, str)  # "token" and others have been dealt with
    return Canvas((pixels[0], pixels[1]), _token_frames(source, frames), mode)


def _token_frames(source: Source, frames: int) -> tuple[int, ...]:
    """The token frame that covers each video frame; padding is behind the clip that the maps are of."""
    geometry = dict(source.geometry)
    padding = geometry.pop("padding", 0)
    known = source.clip is not None and frames == source.clip[0]
    index = torch.arange(source.grid[0]).view(-1, 1, 1)
    spread = spread_frames(index, frames, padding=padding if known else 0, **geometry)
    return tuple(spread.flatten().tolist())
