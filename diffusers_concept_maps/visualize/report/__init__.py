"""One HTML file to look at maps and tracks in: frames, maps and program are in it, and it refers to nothing else.

`_data` gathers what is shown, `_detail` the maps by layer, step and head, `_frames` the pictures, and `_page` puts
them into the page whose parts lie beside them: `page.html`, `page.css` and the scripts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.files import whole_file
from diffusers_concept_maps.visualize.report._data import gather
from diffusers_concept_maps.visualize.report._page import page

if TYPE_CHECKING:
    from diffusers_concept_maps.correspondence.output import TrackOutput
    from diffusers_concept_maps.maps import ConceptMaps

__all__ = ["write_report"]


def write_report(
    path: str | os.PathLike[str],
    maps: ConceptMaps | None = None,
    frames: Any = None,
    *,
    tracks: TrackOutput | None = None,
    index: int = 0,
    fps: float = 8,
    title: str = "",
    detail: str | os.PathLike[str] | None = None,
) -> None:
    """Write a page that shows maps, tracks or both; any browser opens it, also without a network.

    Frames are stored as WebP, so that 49 of them of 480 x 720 pixels and the maps of 8 concepts stay below 5 MB;
    scores in 16 bits between the lowest and the highest of each concept, those by layer, step and head in 8 bits and
    on a coarser grid where there are many.

    Args:
        path: file to write, such as `report.html`; an existing one is replaced, and it appears whole or not at all.
        maps: what to show; None for tracks alone.
        frames: what the maps are of, as for `media.read_frames`: a path, PIL images, an array
            `[frame, height, width, 3]` or a tensor `[frame, 3, height, width]` in 0..1; None shows the maps alone,
            one frame for each token frame. Of a clip that `encode` was given, those that the model has not seen are
            left out.
        tracks: points to draw over the frames, with the trails that they leave.
        index: which video of the batch.
        fps: frames per second when played.
        title: heading of the page.
        detail: the safetensors file that a capture streamed the kept axes to (`detail_path`), for maps that were
            loaded from a file; maps fresh from a capture have them at hand.

    Raises:
        ConceptMapsValueError: neither maps nor tracks, tracks without the frames they are of, a rate or an index that
            cannot be, or scores that are infinite or not a number.
        ConceptMapsError: a file cannot be read, nothing has been recorded, or the folder is not there.
    """
    if maps is None and tracks is None:
        raise ConceptMapsValueError("neither maps nor tracks; expected at least one of them to show")
    if tracks is not None and frames is None:
        raise ConceptMapsValueError("tracks without frames; expected the frames of the video that they are of")
    if not 0 < fps <= 240:
        raise ConceptMapsValueError(f"fps is {fps}; expected frames per second, more than 0 and at most 240")
    text = page(gather(maps, frames, tracks=tracks, index=index, fps=fps, title=title, detail=detail))
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
