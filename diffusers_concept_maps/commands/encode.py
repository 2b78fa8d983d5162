"""`concept-maps encode`: the maps of concepts in a video or image that one has."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusers_concept_maps.commands._common import load_pipeline, positive, printable, seed, staging
from diffusers_concept_maps.commands._pictures import REPORT, add_report, check_extra, print_table, write_maps, written

_FPS = 8  # of what does not say how fast it is, such as a folder of pictures


def register(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "encode",
        help="make the maps of concepts in a video or image that you have",
        description="Encode a file with the VAE of a diffusers pipeline, add noise, send it through the transformer "
        "once for each noise level, and write one overlay for each concept, a contact sheet and the maps.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a video, a picture or a folder of pictures")
    parser.add_argument("--concepts", nargs="+", required=True, metavar="CONCEPT", help="words or phrases")
    parser.add_argument("--model", metavar="PATH_OR_HUB_ID", help="a diffusers pipeline; default: the embedded model")
    parser.add_argument("--prompt", default="", help="what to tell the model of the file, such as a caption")
    parser.add_argument("--methods", nargs="+", default=["concept_attention"], metavar="METHOD")
    parser.add_argument("--layers", nargs="+", type=int, metavar="LAYER", help="default: the checkpoint's, or all")
    parser.add_argument(
        "--noise-level",
        nargs="+",
        type=float,
        default=[0.5],
        metavar="LEVEL",
        help="fractions of the training schedule in (0, 1], whose maps are averaged; default: 0.5",
    )
    parser.add_argument("--num-samples", type=positive, default=1, help="draws of noise; default: %(default)s")
    parser.add_argument("--seed", type=seed, default=0, help="of the first draw; default: %(default)s")
    parser.add_argument(
        "--size", nargs=2, type=positive, metavar=("HEIGHT", "WIDTH"), help="pixels to scale to; default: near its own"
    )
    parser.add_argument("--num-frames", type=positive, help="most frames to take; default: what the model makes")
    parser.add_argument("--fps", type=positive, help=f"of the overlays; default: the file's, or {_FPS}")
    parser.add_argument("--out", type=Path, default=Path("concept_maps"), metavar="DIR", help="default: %(default)s")
    add_report(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Encode, write the files and print a table of the maps; the exit status is 0.

    Raises:
        ConceptMapsError: an argument cannot be used, or the `viz` extra is not installed.
    """
    from diffusers_concept_maps.encoding import encode
    from diffusers_concept_maps.media import read_frames
    from diffusers_concept_maps.visualize.overlay import as_pictures

    check_extra()
    read_frames(options.file, max_frames=1)  # what cannot be read is said before the model is loaded
    with staging(options.out) as folder:
        pipe, _ = load_pipeline(options.model, None, None)
        maps = encode(
            pipe,
            options.file,
            options.concepts,
            noise_level=options.noise_level,
            prompt=options.prompt,
            num_samples=options.num_samples,
            seed=options.seed,
            size=None if options.size is None else tuple(options.size),
            num_frames=options.num_frames,
            methods=options.methods,
            layers=options.layers,
        )
        assert maps.fit is not None  # `encode` has noted it
        clip = read_frames(options.file, max_frames=maps.fit.covered)
        title = f"{options.file.name}: {options.prompt}" if options.prompt else options.file.name
        fps = options.fps or max(1, round(clip.fps or _FPS))
        overlays = write_maps(folder, as_pictures(clip.frames), maps, title=title, fps=fps)
        if options.report:
            maps.report(folder / REPORT, clip.frames, fps=fps, title=title)
    print(f"{printable(str(options.file))}: {maps.fit.describe()}\n")
    print_table(maps, overlays)
    print("\n" + written(options.out, "overlays, contact_sheet.png, maps.safetensors", report=options.report))
    return 0
