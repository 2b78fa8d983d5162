"""`concept-maps evaluate`: the score of a model and its maps."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def register(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="score a model and its maps",
        description="Print what a suite measures, one line as soon as it is known, and end with status 1 when a gate "
        "is red.",
    )
    parser.add_argument("--suite", required=True, choices=["shapes"], help="shapes: the gates of the embedded model")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a pipeline folder; default: the embedded model")
    parser.add_argument(
        "--guidance", action="store_true", help="compare guidance scales instead, on noise of the development seed"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what the suite measures; the exit status is 1 where a gate is red.

    Raises:
        ConceptMapsError: the folder holds no pipeline.
    """
    from diffusers_concept_maps.shapes import suite
    from diffusers_concept_maps.shapes.model import load_shapes_pipeline

    pipe = load_shapes_pipeline(folder=options.model)
    pipe.set_progress_bar_config(disable=True)
    if options.guidance:
        for scale, rates in suite.compare_guidance(pipe):
            print(f"guidance {scale}: " + "  ".join(f"{name} {rate:.3f}" for name, rate in rates.items()), flush=True)
        return 0
    red = []
    for result in suite.evaluate(pipe):
        print(result, flush=True)
        red += [result.name] if result.passed is False else []
    print(f"{len(red)} gates are red: {'; '.join(red)}" if red else "all gates are green")
    return 1 if red else 0
