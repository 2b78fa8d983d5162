"""What the sub-commands that make maps write and print: overlays, a contact sheet, the maps and a table of them."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_concept_maps.commands._common import printable, slug

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diffusers_concept_maps.maps import ConceptMaps

REPORT = "report.html"
"""The page that `--report` asks for."""


def check_extra() -> None:
    """Raise `ConceptMapsError` where the `viz` extra is missing: missed now, not after minutes of work."""
    from diffusers_concept_maps.visualize import EXTRA, require

    for module in EXTRA:
        require(module)


def write_maps(
    folder: Path,
    frames: Sequence[Image.Image],
    maps: ConceptMaps,
    *,
    title: str,
    fps: int,
    shown: Sequence[Image.Image] | None = None,
) -> dict[str, str]:
    """Write an overlay for each concept, a contact sheet and the maps.

    Args:
        folder: where to.
        frames: what the maps are of; of a clip that `encode` was given, all of them or those that the model has seen.
        maps: of one video or image.
        title: text above the contact sheet, which names the method as well.
        fps: of the overlays.
        shown: what to lay the maps over in place of the frames, such as larger ones.

    Returns:
        The names of the overlays by concept.
    """
    from diffusers_concept_maps.upsample import spread_frames
    from diffusers_concept_maps.visualize.figure import contact_sheet
    from diffusers_concept_maps.visualize.video import write_image

    overlays: dict[str, str] = {}
    for index, concept in enumerate(maps.concepts):
        stem = folder / f"overlay_{index}_{slug(concept)}"
        pictures = maps[concept].overlay(list(frames if shown is None else shown))
        overlays[concept] = write_pictures(stem, pictures, fps).name
    seen = list(frames) if maps.fit is None else list(frames[: maps.fit.covered])
    padding = 0 if maps.fit is None else maps.fit.padding
    per_frame = spread_frames(maps.get()[0], len(seen), padding=padding, **maps.geometry)
    heading = f"{textwrap.shorten(title, 240, placeholder=' ...')}  [{maps.methods[0]}]"
    write_image(folder / "contact_sheet.png", contact_sheet(seen, per_frame, maps.concepts, title=heading))
    maps.save(folder / "maps.safetensors")
    return overlays


def write_pictures(stem: Path, pictures: list[Image.Image], fps: int) -> Path:
    """Write a video, or a picture where there is one frame only.

    Args:
        stem: the file without its suffix.
        pictures: the frames.
        fps: frames per second.

    Returns:
        The file.
    """
    from diffusers_concept_maps.visualize.video import write_image, write_video

    path = stem.with_name(stem.name + (".mp4" if len(pictures) > 1 else ".png"))
    if len(pictures) > 1:
        write_video(path, pictures, fps=fps)
    else:
        write_image(path, pictures[0])
    return path


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the option that asks for a page to look at it all in."""
    parser.add_argument("--report", action="store_true", help=f"write {REPORT} too: everything in one page to look at")


def written(out: Path, files: str, *, report: bool) -> str:
    """The last line that a command prints: what it has written."""
    return f"written to {out}: {files}" + (f", {REPORT}" if report else "")


def print_table(maps: ConceptMaps, overlays: dict[str, str]) -> None:
    """Print one line per concept and method: the range of its scores, the frame where it peaks, its overlay."""
    width = max(7, *(len(printable(concept)) for concept in maps.concepts))
    print(f"{'concept':{width}}  {'method':17}  {'min':>8}  {'mean':>8}  {'max':>8}  peak frame  overlay")
    for method in maps.methods:
        for concept, scores in zip(maps.concepts, maps.get(method)[0], strict=True):
            shown = overlays[concept] if method == maps.methods[0] else ""
            print(
                f"{printable(concept):{width}}  {method:17}  {_range(scores)}  {_peak(scores):>10}  {shown}".rstrip()
            )


def _range(scores: torch.Tensor) -> str:
    return "  ".join(f"{float(value):8.3f}" for value in (scores.min(), scores.mean(), scores.max()))


def _peak(scores: torch.Tensor) -> int:
    """The frame in which a concept's mean score is highest."""
    return int(scores.mean((1, 2)).argmax())
