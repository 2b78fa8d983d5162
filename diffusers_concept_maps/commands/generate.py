"""`concept-maps generate`: a video or image, and the maps of concepts in it."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_concept_maps.commands._common import load_pipeline, positive, printable, seed, slug, staging
from diffusers_concept_maps.errors import ConceptMapsValueError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diffusers_concept_maps.maps import ConceptMaps

DEFAULT_PROMPT = "a red circle moving right and a blue square moving right on dark background"
DEFAULT_CONCEPTS = ("red", "blue", "background")
DEFAULT_SEED = 0
_SHOWN_WIDTH = 320  # pixels; videos smaller than that are enlarged so that a person can see them


def register(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "generate",
        help="make a video or image and the maps of concepts in it",
        description="Generate with a diffusers pipeline and write the video, one overlay for each concept, a contact "
        "sheet and the maps. Without arguments the embedded model makes a clip of two shapes.",
    )
    parser.add_argument("prompt", nargs="?", help=f"default: {DEFAULT_PROMPT!r}, for the embedded model")
    parser.add_argument("--concepts", nargs="+", metavar="CONCEPT", help="words or phrases, in the prompt or not")
    parser.add_argument("--model", metavar="PATH_OR_HUB_ID", help="a diffusers pipeline; default: the embedded model")
    parser.add_argument("--methods", nargs="+", default=["concept_attention"], metavar="METHOD")
    parser.add_argument(
        "--attention", default="exact", metavar="MODE", help="'exact' or 'one_pass'; default: %(default)s"
    )
    parser.add_argument(
        "--steps", type=positive, help="denoising steps; default: the pipeline's, 20 for the embedded model"
    )
    parser.add_argument("--seed", type=seed, default=DEFAULT_SEED, help="default: %(default)s")
    parser.add_argument("--guidance-scale", type=float, help="default: the pipeline's, 4 for the embedded model")
    parser.add_argument("--fps", type=positive, default=8, help="of the videos written; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("concept_maps"), metavar="DIR", help="default: %(default)s")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Generate, write the files and print a table of the maps; the exit status is 0.

    Raises:
        ConceptMapsError: an argument cannot be used, or the `viz` extra is not installed.
    """
    import torch

    from diffusers_concept_maps.capture import trace
    from diffusers_concept_maps.visualize import EXTRA, require

    if options.model is not None and (options.prompt is None or options.concepts is None):
        raise ConceptMapsValueError(
            "a model of your own needs a prompt and --concepts; only the embedded one has defaults"
        )
    for module in EXTRA:  # missed now, not after minutes of generation
        require(module)
    prompt = DEFAULT_PROMPT if options.prompt is None else options.prompt
    concepts = list(DEFAULT_CONCEPTS) if options.concepts is None else options.concepts
    with staging(options.out) as folder:
        pipe, call = load_pipeline(options.model, options.steps, options.guidance_scale)
        generator = torch.Generator().manual_seed(options.seed)
        with trace(pipe, concepts, methods=options.methods, attention=options.attention) as maps:
            output = pipe(prompt, generator=generator, **call)
        frames = output.frames[0] if hasattr(output, "frames") else output.images[:1]
        overlays = _write(folder, frames, maps, prompt, options.fps)
    _print_table(maps, overlays)
    print(f"\nwritten to {options.out}: video, overlays, contact_sheet.png, maps.safetensors")
    return 0


def _write(folder: Path, frames: Any, maps: ConceptMaps, prompt: str, fps: int) -> dict[str, str]:
    """Write every file; the names of the overlays by concept."""
    from diffusers_concept_maps.upsample import spread_frames
    from diffusers_concept_maps.visualize.figure import contact_sheet
    from diffusers_concept_maps.visualize.overlay import as_pictures, enlarge
    from diffusers_concept_maps.visualize.video import write_image

    pictures = enlarge(as_pictures(frames), _SHOWN_WIDTH)
    overlays: dict[str, str] = {}
    _write_pictures(folder / "video", pictures, fps)
    for index, concept in enumerate(maps.concepts):
        stem = folder / f"overlay_{index}_{slug(concept)}"
        overlays[concept] = _write_pictures(stem, maps[concept].overlay(pictures), fps).name
    title = f"{textwrap.shorten(prompt, 240, placeholder=' ...')}  [{maps.methods[0]}]"
    per_frame = spread_frames(maps.get()[0], len(pictures), **maps.geometry)
    write_image(folder / "contact_sheet.png", contact_sheet(frames, per_frame, maps.concepts, title=title))
    maps.save(folder / "maps.safetensors")
    return overlays


def _write_pictures(stem: Path, pictures: list[Image.Image], fps: int) -> Path:
    """A video, or a picture where there is one frame only."""
    from diffusers_concept_maps.visualize.video import write_image, write_video

    path = stem.with_name(stem.name + (".mp4" if len(pictures) > 1 else ".png"))
    if len(pictures) > 1:
        write_video(path, pictures, fps=fps)
    else:
        write_image(path, pictures[0])
    return path


def _print_table(maps: ConceptMaps, overlays: dict[str, str]) -> None:
    """One line per concept and method: the range of its scores, the frame where it peaks, its overlay."""
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
