"""`export`: one folder of files and a manifest out of one set of maps."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.files import whole_folder
from diffusers_concept_maps.maps import ConceptMaps
from diffusers_concept_maps.visualize.export.canvas import make_canvas
from diffusers_concept_maps.visualize.export.clips import Clips, write_clips, write_sharpening
from diffusers_concept_maps.visualize.export.grid import write_grid
from diffusers_concept_maps.visualize.export.looks import CHANNELS
from diffusers_concept_maps.visualize.export.manifest import open_manifest
from diffusers_concept_maps.visualize.export.settings import ExportSettings
from diffusers_concept_maps.visualize.export.source import Source, open_source


def export(
    maps: ConceptMaps | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    settings: ExportSettings | None = None,
    *,
    method: str | None = None,
    branch: str = "cond",
    summary: ConceptMaps | None = None,
) -> None:
    """Write maps as sequences of pictures or as videos, for other programs to work with.

    Of a file of kept axes one position along them is in memory at a time, so that memory does not depend on their
    number. What was never recorded, such as a step that a cache skipped, has no file; the manifest names it.

    Args:
        maps: as for `source.open_source`.
        folder: a new or empty one; it appears whole or not at all.
        settings: None is a 16-bit PNG sequence of each concept.
        method: which of the methods of the maps; None is the first.
        branch: which guidance branch of a file of kept axes.
        summary: the maps of the same run, which know more about it than a file of kept axes does.

    Raises:
        ConceptMapsValueError: the settings do not fit the maps.
        ConceptMapsError: the maps cannot be read, a package is missing, the folder is not empty, or an encoder failed.
    """
    settings = settings or ExportSettings()
    settings.format.check()
    with whole_folder(folder) as partial:
        source = open_source(maps, method, branch)
        if summary is not None:
            source = replace(source, metadata=summary.metadata, geometry=summary.geometry)
        clips = Clips(
            source=source,
            settings=settings,
            axes=settings.chosen_axes(source),
            concepts=settings.chosen_concepts(source),
            canvas=make_canvas(source, settings.size, settings.video, smooth=settings.smooth),
            frame=_frame(source, settings),
        )
        with open_manifest(partial, _header(clips, maps)) as manifest:
            if "clips" in settings.products:
                write_clips(clips, partial, manifest)
            if "sharpening" in settings.products:
                write_sharpening(clips, partial, manifest)
            if "grid" in settings.products:
                write_grid(clips, partial, manifest)


def _frame(source: Source, settings: ExportSettings) -> int:
    frame = source.grid[0] // 2 if settings.frame is None else settings.frame
    if not 0 <= frame < source.grid[0]:
        raise ConceptMapsValueError(f"frame is {frame}; these maps have {source.grid[0]} token frames, from 0 on")
    return frame


def _header(clips: Clips, maps: ConceptMaps | str | os.PathLike[str]) -> dict[str, Any]:
    source, settings = clips.source, clips.settings
    raw = settings.format.levels is None and settings.look == "gray"
    values = "alpha" if CHANNELS[settings.look] == 4 else "gray"
    restore = "a pixel is the score" if raw else f"score = low + {values} * (high - low), {values} in 0..1, of `scale`"
    return {
        "source": {
            "file": None if isinstance(maps, ConceptMaps) else Path(maps).name,
            "method": source.method,
            "video_index": settings.video_index,
            "grid": source.grid,
            "metadata": source.metadata,
        },
        "concepts": [source.concepts[index] for index in clips.concepts],
        "axes": clips.axes,
        "file_format": settings.file_format,
        "look": settings.look,
        "scale": settings.scale,
        "score": None if settings.look == "color" else restore,
        "fps": settings.fps,
        "size": clips.canvas.size,
        "made_even": settings.format.even,
        "token_frames": clips.canvas.token_frames,
    }
