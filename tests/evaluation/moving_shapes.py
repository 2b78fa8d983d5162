"""Scenes of the embedded model as a data set on disk, in the format of DAVIS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_concept_maps.shapes.scenes import COLORS, Scenes, sample_scenes

BACKGROUND = ("background", "dark", "light")
"""Concepts of the background that the embedded model knows."""


def options(root: Path) -> dict[str, Any]:
    """What the reader is told."""
    return {"categories": str(root / "categories.json")}


def arguments(root: Path, out: Path, *more: str, dataset: str = "davis-2017") -> list[str]:
    """The command line of an evaluation."""
    given = ["--dataset", dataset, "--root", root, "--out", out, "--categories", root / "categories.json"]
    return ["evaluate", *map(str, given), "--background", *BACKGROUND, *more]


def lines(out: Path, rank: int = 0) -> list[dict[str, Any]]:
    """The results of one process."""
    return [json.loads(line) for line in (out / "samples" / f"rank_{rank}.jsonl").read_text().splitlines()]


def write_davis(root: Path, clips: int) -> Path:
    """Write clips of one or two objects of different colors; return the file that names the objects."""
    scenes = _distinct(clips)
    categories = {}
    for clip in range(clips):
        name = f"clip-{clip}"
        frames = ((scenes.video[clip] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        masks = (scenes.masks[clip] > 0.5).numpy()
        for index, frame in enumerate(frames):
            labels = masks[0, index] * 1 + masks[1, index] * 2
            _save(Image.fromarray(frame), root / "JPEGImages" / "480p" / name / f"{index:05d}.jpg", quality=100)
            _save(Image.fromarray(labels.astype(np.uint8)), root / "Annotations" / "480p" / name / f"{index:05d}.png")
        colors = [list(COLORS)[color] for color in scenes.color[clip][: scenes.count[clip]]]
        categories[name] = {str(number): color for number, color in enumerate(colors, 1)}
    for year in ("2016", "2017"):
        lists = root / "ImageSets" / year
        lists.mkdir(parents=True)
        (lists / "val.txt").write_text("".join(f"{name}\n" for name in categories), encoding="utf-8")
    file = root / "categories.json"
    file.write_text(json.dumps(categories), encoding="utf-8")
    return file


def _distinct(clips: int) -> Scenes:
    """Scenes whose objects have different colors, so that a color is a name."""
    drawn = sample_scenes(4 * clips, np.random.default_rng(7))
    different = (drawn.count == 1) | (drawn.color[:, 0] != drawn.color[:, 1])
    return drawn.take(np.flatnonzero(different)[:clips])


def _save(image: Image.Image, path: Path, **options: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def write_voc(root: Path, images: int) -> Scenes:
    """Write last frames as PASCAL VOC does, with the numbers of `COLORS` as values and one ignored pixel each."""
    scenes = _distinct(images)
    for image in range(images):
        frame = ((scenes.video[image, -1] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        values = np.zeros(frame.shape[:2], dtype=np.uint8)
        for slot, color in enumerate(scenes.color[image]):
            values[(scenes.masks[image, slot, -1] > 0.5).numpy()] = color + 1
        values[0, 0] = 255
        _save(Image.fromarray(frame.numpy()), root / "JPEGImages" / f"{image}.jpg", quality=100)
        _save(Image.fromarray(values), root / "SegmentationClass" / f"{image}.png")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("".join(f"{image}\n" for image in range(images)), encoding="utf-8")
    return scenes
