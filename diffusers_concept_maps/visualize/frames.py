"""Frames to draw on, and the way back to what they came as: pictures, an array or a tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from diffusers_concept_maps.media import read_frames


@dataclass(frozen=True, eq=False)
class Canvas:
    """The frames of one video or image.

    Attributes:
        pixels: per frame `[height, width, 3]`, or 4 with alpha: uint8, or float64 in 0..1 if they came as floats.
        restore: makes of such arrays, one per frame, what the frames came as.
    """

    pixels: Sequence[np.ndarray]
    restore: Callable[[Sequence[np.ndarray]], Any]

    @property
    def size(self) -> tuple[int, int]:
        """`(height, width)` in pixels."""
        height, width = self.pixels[0].shape[:2]
        return height, width

    def first(self, count: int) -> Canvas:
        """The first frames."""
        return replace(self, pixels=self.pixels[:count])


def open_frames(frames: Any) -> Canvas:
    """Frames of one video or image, every one kept, with their alpha.

    What `restore` returns is of the kind that was given: a list of pictures for a sequence of them or a path, one
    picture for one, an array or a tensor of the same dtype, axes and device. Pictures become RGB, or RGBA if they have
    transparency.

    Args:
        frames: as for `media.read_frames`, where an array may be `[..., height, width, 4]` and a tensor
            `[..., 4, height, width]` as well: the fourth is alpha. Or a canvas, which is returned.

    Raises:
        ConceptMapsValueError: anything else, values outside 0..1, no frame, or frames of different sizes.
        ConceptMapsError: a file cannot be read.
    """
    if isinstance(frames, Canvas):
        return frames
    if isinstance(frames, np.ndarray):
        return _from_array(frames)
    if isinstance(frames, torch.Tensor):
        return _from_tensor(frames)
    if isinstance(frames, (str, os.PathLike)):
        return Canvas([np.asarray(picture) for picture in as_pictures(frames)], _pictures)
    single = isinstance(frames, Image.Image)
    shown = as_pictures(frames)
    given = [frames] if single else frames
    pixels = [
        np.asarray(ImageOps.exif_transpose(picture).convert("RGBA") if picture.has_transparency_data else opaque)
        for picture, opaque in zip(given, shown, strict=True)
    ]
    return Canvas(pixels, _picture if single else _pictures)


def open_pictures(frames: Any) -> Canvas:
    """As `open_frames`, in 8 bits and with a list of pictures as what comes back, whatever was given."""
    canvas = open_frames(frames)
    return Canvas([to_bytes(pixels) for pixels in canvas.pixels], _pictures)


def as_pictures(frames: Any) -> list[Image.Image]:
    """Frames of one video or image as RGB pictures, every one kept; what is transparent is laid on white.

    Args:
        frames: as for `open_frames`.

    Raises:
        ConceptMapsValueError: as there.
        ConceptMapsError: a file cannot be read.
    """
    if isinstance(frames, (np.ndarray, torch.Tensor)) and _has_alpha(frames):
        canvas = open_frames(frames)
        frames = [Image.fromarray(to_bytes(pixels)) for pixels in canvas.pixels]
    colors = (frame.mul(255).round().byte() for frame in read_frames(frames).frames)
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in colors]


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Floats in 0..1 as uint8; uint8 as they are."""
    return pixels if pixels.dtype == np.uint8 else (pixels * 255).round().clip(0, 255).astype(np.uint8)


def _has_alpha(source: np.ndarray | torch.Tensor) -> bool:
    return source.ndim in (3, 4) and source.shape[-1 if isinstance(source, np.ndarray) else -3] == 4


def _check(source: np.ndarray | torch.Tensor) -> None:
    """Refuse what are no frames; alpha has the range of a color."""
    if not _has_alpha(source):
        read_frames(source)
        return
    for channels in ([0, 1, 2], [3, 3, 3]):
        read_frames(source[..., channels] if isinstance(source, np.ndarray) else source[..., channels, :, :])


def _from_array(array: np.ndarray) -> Canvas:
    _check(array)
    frames = array if array.ndim == 4 else array[None]

    def restore(drawn: Sequence[np.ndarray]) -> np.ndarray:
        stacked = np.stack(drawn).astype(array.dtype, copy=False)
        return stacked if array.ndim == 4 else stacked[0]

    return Canvas(list(frames if array.dtype == np.uint8 else frames.astype(np.float64)), restore)


def _from_tensor(tensor: torch.Tensor) -> Canvas:
    _check(tensor)
    numbers = tensor if tensor.dtype == torch.uint8 else tensor.double()
    frames = numbers.detach().cpu().movedim(-3, -1).numpy()

    def restore(drawn: Sequence[np.ndarray]) -> torch.Tensor:
        stacked = torch.from_numpy(np.stack(drawn)).movedim(-1, -3).contiguous()
        return (stacked if tensor.ndim == 4 else stacked[0]).to(tensor.device, tensor.dtype)

    return Canvas(list(frames if tensor.ndim == 4 else frames[None]), restore)


def _pictures(drawn: Sequence[np.ndarray]) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in drawn]


def _picture(drawn: Sequence[np.ndarray]) -> Image.Image:
    return Image.fromarray(drawn[0])
