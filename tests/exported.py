"""What tests of exports share: files of kept axes with known scores, and readers of what was written."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

CONCEPTS = ("dog", "sky")
GRID = (3, 5, 7)
"""Odd, so that a video of it needs padding where its format wants even sizes."""


def scores(*kept: int, videos: int = 1, concepts: int = 2, grid: tuple[int, int, int] = GRID) -> np.ndarray:
    """Random float32 scores `[*kept, video, concept, frame, height, width]` of no special range."""
    shape = (*kept, videos, concepts, *grid)
    return (np.random.default_rng(0).normal(size=shape) * 3 - 1).astype(np.float32)


def detail_file(path: Path, values: np.ndarray, **axes: list[int]) -> Path:
    """A file of kept axes; `axes` names them, in order, with the numbers along them."""
    header = {
        "format": "diffusers_concept_maps/detail/1",
        "axes": [*axes, "row", "concept", "frame", "height", "width"],
        "concepts": CONCEPTS[: values.shape[-4]],
        "steps": axes.get("step", []),
        "layers": {"imap": axes.get("layer", [0])},
    }
    save_file({"cond.imap": values}, path, metadata={"concept_maps": json.dumps(header)})
    return path


def manifest(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return loaded


def entries(folder: Path, **wanted: Any) -> list[dict[str, Any]]:
    """The entries of the manifest that say so."""
    return [entry for entry in manifest(folder)["files"] if all(entry.get(key) == wanted[key] for key in wanted)]


def decoded(path: Path, pixels: str, channels: int) -> np.ndarray:
    """The frames of a video or picture `[frame, height, width, channel]` by ffmpeg, whole numbers of 16 bits."""
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    command = (ffmpeg, "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", pixels, "-")
    data = subprocess.run(command, capture_output=True, check=True).stdout
    width, height = facts(path)["source_size"]
    return np.frombuffer(data, "<u2").reshape(-1, height, width, channels)


def facts(path: Path) -> dict[str, Any]:
    """Size, codec, pixel format and frames per second of a video or picture."""
    reader = imageio_ffmpeg.read_frames(str(path))
    found: dict[str, Any] = next(reader)
    reader.close()
    return found | {"codec": found["codec"].strip(",")}


def gray_png(folder: Path) -> np.ndarray:
    """A sequence of gray PNG files by Pillow, `[frame, height, width]`."""
    frames = []
    for file in sorted(folder.iterdir()):
        with Image.open(file) as picture:
            assert picture.mode == "I;16"
            frames.append(np.asarray(picture))
    return np.stack(frames)


def restored(pixels: np.ndarray, scale: list[float]) -> np.ndarray:
    """Scores from pixels of 16 bits, as the manifest says."""
    low, high = scale
    return low + pixels.astype(np.float64) / 65535 * (high - low)
