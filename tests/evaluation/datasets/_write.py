"""Files of data sets, written small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

HEIGHT, WIDTH = 12, 20


def write_frame(path: Path, seed: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """Write a JPEG of noise; return what it decodes to, `[3, height, width]`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    decoded = np.array(Image.open(path).convert("RGB"))
    return torch.stack([torch.from_numpy(decoded[..., channel].copy()) for channel in range(3)])


def write_values(path: Path, values: np.ndarray, palette: bool = True) -> None:
    """Write a label image: by palette, as VOC and DAVIS 2017 do, or gray."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8))
    if palette:
        # Colors unlike the indices, so that a reader that takes colors is caught.
        image.putpalette([(7 * index + channel * 50 + 1) % 256 for index in range(256) for channel in range(3)])
    image.save(path)
    assert Image.open(path).mode == ("P" if palette else "L")


def blocks(*values: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Values in columns of the same width, from left to right."""
    columns = np.array(values)[np.arange(width) * len(values) // width]
    return np.broadcast_to(columns, (height, width)).copy()
