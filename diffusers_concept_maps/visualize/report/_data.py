"""What the page shows, as data that JSON can hold."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.upsample import spread_frames
from diffusers_concept_maps.visualize.overlay import as_pictures, scale_of
from diffusers_concept_maps.visualize.report._detail import at_hand, from_file, panels
from diffusers_concept_maps.visualize.report._frames import encoded
from diffusers_concept_maps.visualize.report._numbers import packed, text_of
from diffusers_concept_maps.visualize.trails import point_colors

if TYPE_CHECKING:
    from PIL import Image

    from diffusers_concept_maps.correspondence.output import TrackOutput
    from diffusers_concept_maps.maps import ConceptMaps

_BYTES = 4_800_000  # of a page with a clip of this many pixels or fewer; of a larger one in proportion
_PIXELS = 49 * 480 * 720
_LEAST = 0.4  # of it is for the frames, however much there is beside them
_WIDTH = 480  # pixels, at least, of maps that are shown without frames


def gather(
    maps: ConceptMaps | None,
    frames: Any,
    *,
    tracks: TrackOutput | None,
    index: int,
    fps: float,
    title: str,
    detail: str | os.PathLike[str] | None,
) -> dict[str, Any]:
    """Everything the page shows; the arguments are those of `write_report`."""
    pictures = None if frames is None else _seen(as_pictures(frames), maps)
    data: dict[str, Any] = {"title": title, "fps": fps, "concepts": [], "methods": [], "tokens": [], "metadata": {}}
    data["tracks"] = None if tracks is None else _tracks(tracks, pictures or [])
    if maps is not None:
        data |= _maps(maps, index, detail)
        data["tokens"] = _tokens(maps, None if pictures is None else len(pictures))
    if pictures is None:
        _, height, width = data["methods"][0]["scores"]["grid"]
        factor = -(-_WIDTH // width)
        return data | {"frames": [], "size": [height * factor, width * factor]}
    width, height = pictures[0].size
    total = _BYTES * max(1.0, len(pictures) * height * width / _PIXELS)
    return data | {"frames": encoded(pictures, int(max(total - _text(data), _LEAST * total))), "size": [height, width]}


def _seen(pictures: list[Image.Image], maps: ConceptMaps | None) -> list[Image.Image]:
    """The frames that the model has seen."""
    fit = None if maps is None else maps.fit
    return pictures[: fit.covered] if fit is not None and len(pictures) == fit.source[0] else pictures


def _maps(maps: ConceptMaps, index: int, detail: str | os.PathLike[str] | None) -> dict[str, Any]:
    streamed = {} if detail is None else from_file(detail, maps, index)
    methods = []
    for method in maps.methods:
        scores = maps.get(method)
        if not 0 <= index < scores.shape[0]:
            raise ConceptMapsValueError(f"index is {index}; expected a video of the batch, 0 to {scores.shape[0] - 1}")
        low, high = torch.tensor([scale_of(concept) for concept in scores[index]], dtype=torch.float64).T
        kept = streamed.get(method) or at_hand(maps, method, index)
        methods.append(
            {
                "name": method,
                "scores": packed(scores[index][None], low, high, bits=16),
                "panels": {} if kept is None else panels(kept, len(maps.methods)),
            }
        )
    return {"concepts": list(maps.concepts), "methods": methods, "metadata": maps.metadata}


def _tokens(maps: ConceptMaps, frames: int | None) -> list[int]:
    """Of every frame shown, the token frame whose map it has."""
    count = maps.get().shape[2]
    if frames is None:
        return list(range(count))
    padding = maps.fit.padding if maps.fit is not None and frames == maps.fit.covered else 0
    numbers = spread_frames(torch.arange(count).view(-1, 1, 1), frames, padding=padding, **maps.geometry)
    return [int(number) for number in numbers.flatten()]


def _tracks(tracks: TrackOutput, pictures: list[Image.Image]) -> dict[str, Any]:
    if tracks.tracks.shape[1] != len(pictures):
        raise ConceptMapsValueError(
            f"tracks through {tracks.tracks.shape[1]} frames over {len(pictures)}; expected the frames they are of"
        )
    return {
        "points": tracks.tracks.shape[0],
        "colors": point_colors(tracks.tracks.shape[0]),
        "places": text_of(tracks.tracks.numpy().astype("<f4")),
        "visible": text_of(tracks.visibility.numpy().astype(np.uint8)),
    }


def _text(data: dict[str, Any]) -> int:
    """Characters of the scores, which are nearly all of what is not frames."""
    methods = data["methods"]
    entries = [entry for method in methods for entry in (method["scores"], *method["panels"].values())]
    tracks = data["tracks"] or {"places": "", "visible": ""}
    return sum(len(entry["data"]) for entry in entries) + len(tracks["places"]) + len(tracks["visible"])
