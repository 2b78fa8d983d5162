"""The arguments of `concept-maps evaluate --suite correspondence`, and what it does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_concept_maps.commands._common import load_pipeline, positive, printable
from diffusers_concept_maps.errors import ConceptMapsValueError

if TYPE_CHECKING:
    from diffusers_concept_maps.evaluation.correspondence import Summary

CLIPS = 48
"""How many scenes and prompts the embedded model is scored on by default, of each seed."""


def add_correspondence_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `run_correspondence` reads beside `--model`, `--root`, `--limit`, `--layers`, `--out`.

    Args:
        parser: of the command.
    """
    group = parser.add_argument_group(
        "correspondence",
        "Where points go, by every layer and step: of the embedded model, of a model on DiffTrack's data set (--root "
        "DIR, such as cogvideox_t2v_2b/fg), or on a video with tracks.",
    )
    group.add_argument("--video", metavar="FILE", help="a video, noised and seen once at each level")
    group.add_argument("--tracks", metavar="FILE", help="its tracks and visibility, an npz file")
    group.add_argument("--levels", nargs="+", type=float, metavar="FRACTION", help="of noise, for real video")
    group.add_argument("--steps", type=positive, metavar="N", help="of the pipeline, for the data set")
    group.add_argument("--threshold", type=float, metavar="PIXELS", help="of a match; default: half a token")
    group.add_argument(
        "--difftrack-parity", action="store_true", help="read and count as the official code does, defects and all"
    )


def run_correspondence(options: argparse.Namespace) -> int:
    """Print the best layer and step of every score, and write tables and heat maps.

    Raises:
        ConceptMapsError: an argument cannot be used.
    """
    if (options.video is None) != (options.tracks is None):
        raise ConceptMapsValueError("--video and --tracks belong together; give both")
    if options.video is not None and options.root is not None:
        raise ConceptMapsValueError("--video and --root are two things to score; give one")
    out = options.out or Path("evaluation", "correspondence")
    if options.video is not None:
        _finish(_video(options), out / "video")
    elif options.root is not None:
        _finish(_dataset(options), out / "generated")
    else:
        _shapes(options, out)
    print(f"written to {out}: a CSV file and a heat map of every score")
    return 0


def _finish(summary: Summary, folder: Path) -> None:
    for name in summary.names:
        print(printable(summary.describe(name)), flush=True)
    summary.write(folder)


def _tell(line: str) -> None:
    print(printable(line), flush=True)


def _shared(options: argparse.Namespace) -> dict[str, Any]:
    parity = "difftrack" if options.difftrack_parity else None
    return {"layers": options.layers, "threshold": options.threshold, "parity": parity}


def _video(options: argparse.Namespace) -> Summary:
    from diffusers_concept_maps.evaluation.correspondence_runs import LEVELS, read_tracks, score_video

    tracks = read_tracks(options.tracks)
    pipe, call = load_pipeline(options.model, None, None)
    kept = {name: value for name, value in call.items() if name == "max_sequence_length"}
    return score_video(pipe, options.video, tracks, levels=options.levels or LEVELS, call=kept, **_shared(options))


def _dataset(options: argparse.Namespace) -> Summary:
    from diffusers_concept_maps.evaluation.correspondence_runs import score_dataset

    pipe, call = load_pipeline(options.model, options.steps, None)
    return score_dataset(pipe, options.root, call=call, limit=options.limit, tell=_tell, **_shared(options))


def _shapes(options: argparse.Namespace, out: Path) -> None:
    """Both kinds of clips; layer and column are chosen on those of the development seed."""
    if options.model is not None:
        raise ConceptMapsValueError(
            "--model is there without clips to score it on; add --root, or --video and --tracks"
        )
    if options.layers is not None or options.difftrack_parity:
        raise ConceptMapsValueError("--layers and --difftrack-parity are for --root and --video; drop them")
    from diffusers_concept_maps.evaluation.correspondence import CONTROLS
    from diffusers_concept_maps.evaluation.correspondence_runs import LEVELS
    from diffusers_concept_maps.shapes.model import load_shapes_pipeline
    from diffusers_concept_maps.shapes.suite.correspondence import score_generated, score_real
    from diffusers_concept_maps.shapes.suite.frozen import DEVELOPMENT_SEED, EVALUATION_SEED

    pipe = load_shapes_pipeline()
    pipe.set_progress_bar_config(disable=True)
    count, seeds = options.limit or CLIPS, (DEVELOPMENT_SEED, EVALUATION_SEED)
    levels = options.levels or LEVELS
    for kind in ("real", "generated"):
        if kind == "real":
            summaries = [score_real(pipe, count, seed, levels=levels, threshold=options.threshold) for seed in seeds]
        else:
            summaries = [score_generated(pipe, count, seed, threshold=options.threshold) for seed in seeds]
        development, scored = summaries
        print(f"{kind}: {len(scored.clips)} clips, chosen on {len(development.clips)} others")
        for name in scored.names:
            chosen = "accuracy" if name in CONTROLS else name
            print("  " + scored.describe(name, development.best(chosen)), flush=True)
        scored.write(out / kind)
