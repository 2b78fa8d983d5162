"""`concept-maps render`: a page to look at maps in that were saved before."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusers_concept_maps.commands._common import positive

_FPS = 8  # of what does not say how fast it is


def register(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "render",
        help="make a page to look at saved maps in",
        description="Write one HTML file with the frames and the maps of a file: a concept to pick, a clip to play, "
        "curves over time. It refers to nothing outside, so that it can be kept and sent as it is.",
    )
    parser.add_argument("maps", type=Path, metavar="MAPS_FILE", help="written by `generate`, `encode` or save")
    parser.add_argument("--video", type=Path, metavar="FILE", help="what the maps are of; default: the maps alone")
    parser.add_argument("--detail", type=Path, metavar="FILE", help="what detail_path named: layers, steps, heads")
    parser.add_argument("--index", type=int, default=0, help="which video of the batch; default: %(default)s")
    parser.add_argument("--fps", type=positive, help=f"when played; default: the video's, or {_FPS}")
    parser.add_argument("--title", help="heading of the page; default: the name of the video or of the maps")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="HTML", help="default: %(default)s")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read the files and write the page; the exit status is 0.

    Raises:
        ConceptMapsError: a file cannot be read or does not fit, or the page cannot be written.
    """
    from diffusers_concept_maps.maps import load
    from diffusers_concept_maps.media import read_frames

    maps = load(options.maps)
    clip = None if options.video is None else read_frames(options.video)
    rate = (None if clip is None else clip.fps) or _FPS
    maps.report(
        options.out,
        None if clip is None else clip.frames,
        index=options.index,
        fps=options.fps or min(rate, 240),
        title=(options.video or options.maps).name if options.title is None else options.title,
        detail=options.detail,
    )
    print(f"written to {options.out}")
    return 0
