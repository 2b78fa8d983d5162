"""`concept-maps info`: what is in a file of maps."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusers_concept_maps.commands._common import printable


def register(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("info", help="say what is in a file of maps")
    parser.add_argument("file", type=Path, metavar="FILE", help="a maps.safetensors")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print concepts, methods and metadata; the exit status is 0.

    Raises:
        ConceptMapsError: the file holds no concept maps.
    """
    from diffusers_concept_maps.maps import load

    maps = load(options.file)
    print(f"concepts  {', '.join(printable(concept) for concept in maps.concepts)}")
    for method in maps.methods:
        scores = maps.get(method)
        batch, _, frames, height, width = scores.shape
        grid = f"{batch} x {frames} frames of {height} x {width} tokens"
        print(f"{method}  {grid}, {scores.min():.3f} to {scores.max():.3f}")
    for name, value in maps.metadata.items():
        print(f"{name}  {printable(str(value))}")
    return 0
