"""The arguments of `concept-maps evaluate --tap-vid`, and what it does."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from diffusers_concept_maps.commands._common import load_pipeline, printable
from diffusers_concept_maps.errors import ConceptMapsValueError


def add_tap_vid_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `run_tap_vid` reads beside those of data sets."""
    group = parser.add_argument_group(
        "TAP-Vid",
        "Beside these: --root, --limit, --out, --layers, --noise-level, --size, --seed and --parity difftrack. The "
        "defaults are those of dcm.track.",
    )
    group.add_argument("--mode", choices=["first", "strided"], default="first", help="default: %(default)s")
    group.add_argument("--readout", metavar="NAME", default="refined", help="default: %(default)s")


def run_tap_vid(options: argparse.Namespace) -> int:
    """Evaluate, and print the scores; the exit status is 1 where videos failed.

    Raises:
        ConceptMapsError: an argument cannot be used.
    """
    from diffusers_concept_maps.evaluation.tap_vid_runner import evaluate_tap_vid

    if options.root is None:
        raise ConceptMapsValueError(f"--tap-vid {options.tap_vid} is there without --root, the folder it is in")
    pipe, _ = load_pipeline(options.model, None, None, offload=not options.keep_on_gpu)
    out = options.out or Path("evaluation", f"tap-vid-{options.tap_vid}")
    summary = evaluate_tap_vid(
        pipe,
        options.tap_vid,
        options.root,
        out,
        mode=options.mode,
        limit=options.limit,
        model=str(options.model or "the embedded model"),
        options=_track_options(options),
    )
    for name, score in summary["scores"].items():
        print(f"{name:20} {'-' if score is None else f'{score:.3f}'}")
    print(f"mean of {summary['videos']} videos, {options.mode}")
    for line in summary["published"]:
        print(printable(f"published: {line}"))
    print(f"\nwritten to {out}: summary.json, run.json, samples")
    for name, error in summary["failed"].items():
        print(printable(f"{name} failed: {error}"), file=sys.stderr)
    return 1 if summary["failed"] else 0


def _track_options(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of the options of `track`."""
    levels = options.noise_level
    if levels is not None and len(levels) > 1:
        raise ConceptMapsValueError(f"--noise-level is {levels}; expected one for --tap-vid")
    given = {
        "layers": options.layers,
        "noise_level": None if levels is None else levels[0],
        "size": None if options.size is None else tuple(options.size),
        "seed": options.seed,
        "readout": options.readout,
        "parity": options.parity,
    }
    return {name: value for name, value in given.items() if value is not None}
