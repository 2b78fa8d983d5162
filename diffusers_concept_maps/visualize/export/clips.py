"""Clips of every concept, and the sharpening of their maps from step to step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_concept_maps.detail import AXES
from diffusers_concept_maps.files import slug
from diffusers_concept_maps.visualize.export._base import Picture
from diffusers_concept_maps.visualize.export.canvas import Canvas
from diffusers_concept_maps.visualize.export.looks import CHANNELS, LOOKS, Scale, scaled
from diffusers_concept_maps.visualize.export.manifest import Manifest
from diffusers_concept_maps.visualize.export.settings import ExportSettings
from diffusers_concept_maps.visualize.export.source import Place, Source, places


@dataclass(frozen=True)
class Clips:
    """An export, resolved.

    Attributes:
        source: where the maps come from.
        settings: what is asked for.
        axes: the numbers along every kept axis.
        concepts: positions of the concepts.
        canvas: size and frames.
        frame: the token frame that a sharpening shows.
    """

    source: Source
    settings: ExportSettings
    axes: dict[str, tuple[int, ...]]
    concepts: list[int]
    canvas: Canvas
    frame: int

    def scores(self, concept: int, place: Place, frame: int | None = None) -> np.ndarray:
        """See `Source.clip_at`."""
        return self.source.clip_at(self.axes, place, self.settings.video_index, concept, frame)

    def scale_of(self, maps: Iterable[np.ndarray]) -> Scale:
        """Lowest and highest score of maps, read one after the other; what was not recorded has no part in it."""
        low, high = math.inf, -math.inf
        for scores in maps:
            if not np.isnan(scores).all():
                low, high = min(low, float(scores.min())), max(high, float(scores.max()))
        return (low, high) if low <= high else (0.0, 0.0)

    def stem(self, concept: int) -> str:
        """Name of a concept's files, distinct where two concepts have the same letters."""
        return f"{concept:02d}_{slug(self.source.concepts[concept])}"


def write_clips(clips: Clips, folder: Path, manifest: Manifest) -> None:
    """A file for each concept, layer, step and head that is asked for: `00_red/layer-02_step-019.mkv`."""
    per = clips.settings.clip_axes
    for concept in clips.concepts:
        below = folder / clips.stem(concept)
        below.mkdir(exist_ok=True)
        common = None
        if clips.settings.scale == "clip":
            common = clips.scale_of(clips.scores(concept, place) for place in places(clips.axes, per))
        for place in places(clips.axes, per):
            scores = clips.scores(concept, place)
            entry = _entry(clips, "clip", concept) | {axis: place.get(axis) for axis in AXES}
            path = below / (_name(place) + clips.settings.format.suffix)
            if np.isnan(scores).all():
                manifest.add(entry | {"path": None})
                continue
            scale = clips.scale_of([scores]) if common is None else common
            _write(clips, path, clips.canvas.frames(scores), scale, manifest, entry, folder)


def write_sharpening(clips: Clips, folder: Path, manifest: Manifest) -> None:
    """A file for each concept whose frames are the steps, averaged over layers and heads: `sharpening/00_red.mkv`."""
    below = folder / "sharpening"
    below.mkdir()
    for concept in clips.concepts:
        scale = clips.scale_of(clips.scores(concept, {"step": step}, clips.frame) for step in clips.axes["step"])
        shown = [step for step in clips.axes["step"] if _recorded(clips, concept, step)]
        entry = _entry(clips, "sharpening", concept) | {"steps": shown, "token_frame": clips.frame}
        if not shown:
            manifest.add(entry | {"path": None})
            continue
        frames = (clips.canvas.scaled(clips.scores(concept, {"step": step}, clips.frame)) for step in shown)
        path = below / (clips.stem(concept) + clips.settings.format.suffix)
        _write(clips, path, frames, scale, manifest, entry, folder)


def _recorded(clips: Clips, concept: int, step: int) -> bool:
    return not np.isnan(clips.scores(concept, {"step": step}, clips.frame)).all()


def _entry(clips: Clips, kind: str, concept: int) -> dict[str, Any]:
    return {"kind": kind, "concept": clips.source.concepts[concept]}


def _name(place: Place) -> str:
    """Name of a file without its suffix; what is averaged over is not in it."""
    digits = {"layer": 2, "step": 3, "head": 2}
    return "_".join(f"{axis}-{number:0{digits[axis]}d}" for axis, number in place.items()) or "mean"


def _write(
    clips: Clips,
    path: Path,
    frames: Iterator[np.ndarray],
    scale: Scale,
    manifest: Manifest,
    entry: dict[str, Any],
    folder: Path,
) -> None:
    """One file or sequence, and its entry; `scale` is not used where every frame has its own."""
    settings, file_format = clips.settings, clips.settings.format
    raw = file_format.levels is None and settings.look == "gray"
    scales, count = [], 0
    picture = Picture(clips.canvas.size, CHANNELS[settings.look], settings.fps)
    with file_format.open(path, picture) as write:
        for scores in frames:
            own = clips.scale_of([scores]) if settings.scale == "frame" else scale
            scales.append(own)
            write(scores[..., None] if raw else LOOKS[settings.look](scaled(scores, own)))
            count += 1
    used: Any = scales if settings.scale == "frame" else scale
    manifest.add(entry | {"path": path.relative_to(folder).as_posix(), "frames": count, "scale": used})
