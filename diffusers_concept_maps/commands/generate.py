"""`concept-maps generate`: a video or image, and the maps of concepts in it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusers_concept_maps.commands._common import load_pipeline, positive, seed, staging
from diffusers_concept_maps.commands._pictures import (
    REPORT,
    add_report,
    check_extra,
    print_table,
    write_maps,
    write_pictures,
    written,
)
from diffusers_concept_maps.errors import ConceptMapsValueError

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
    add_report(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Generate, write the files and print a table of the maps; the exit status is 0.

    Raises:
        ConceptMapsError: an argument cannot be used, or the `viz` extra is not installed.
    """
    import torch

    from diffusers_concept_maps.capture import trace
    from diffusers_concept_maps.visualize.overlay import as_pictures, enlarge

    if options.model is not None and (options.prompt is None or options.concepts is None):
        raise ConceptMapsValueError(
            "a model of your own needs a prompt and --concepts; only the embedded one has defaults"
        )
    check_extra()
    prompt = DEFAULT_PROMPT if options.prompt is None else options.prompt
    concepts = list(DEFAULT_CONCEPTS) if options.concepts is None else options.concepts
    with staging(options.out) as folder:
        pipe, call = load_pipeline(options.model, options.steps, options.guidance_scale)
        generator = torch.Generator().manual_seed(options.seed)
        with trace(pipe, concepts, methods=options.methods, attention=options.attention) as maps:
            output = pipe(prompt, generator=generator, **call)
        frames = output.frames[0] if hasattr(output, "frames") else output.images[:1]
        pictures = as_pictures(frames)
        shown = enlarge(pictures, _SHOWN_WIDTH)
        write_pictures(folder / "video", shown, options.fps)
        overlays = write_maps(folder, pictures, maps, title=prompt, fps=options.fps, shown=shown)
        if options.report:
            maps.report(folder / REPORT, pictures, fps=options.fps, title=prompt)
    print_table(maps, overlays)
    print("\n" + written(options.out, "video, overlays, contact_sheet.png, maps.safetensors", report=options.report))
    return 0
