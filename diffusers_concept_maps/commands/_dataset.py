"""The arguments of `concept-maps evaluate --dataset`, and what it does."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from diffusers_concept_maps.commands._common import check_folder, load_pipeline, positive, printable, seed
from diffusers_concept_maps.commands._judge import add_judge_arguments, judge_of
from diffusers_concept_maps.errors import ConceptMapsValueError

_READER_OPTIONS = ("split", "short_names", "categories", "max_frames", "stride")


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `run_dataset` reads, but for the name of the data set and the model."""
    data = parser.add_argument_group("data set", "What its files look like is in docs/evaluation.md.")
    data.add_argument("--root", type=Path, metavar="DIR", help="the folder it is in")
    data.add_argument("--split", metavar="NAME", help="default: what is validated on")
    data.add_argument("--max-frames", type=positive, metavar="N", help="most frames to take of a video")
    data.add_argument("--stride", type=positive, metavar="N", help="take every N-th frame of a video")
    data.add_argument("--categories", metavar="FILE", help="what the objects of DAVIS are, as JSON")
    data.add_argument(
        "--short-names", action="store_true", default=None, help="single words for the classes of PASCAL VOC"
    )
    data.add_argument("--limit", type=positive, metavar="N", help="the first N samples alone")
    data.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="results; those of an interrupted run are gone on with; default: evaluation/NAME",
    )
    maps = parser.add_argument_group("maps", "The defaults are those of dcm.encode.")
    maps.add_argument("--methods", nargs="+", default=["concept_attention"], metavar="METHOD")
    maps.add_argument("--layers", nargs="+", type=int, metavar="N")
    maps.add_argument("--noise-level", nargs="+", type=float, metavar="FRACTION", help="default: 0.5")
    maps.add_argument("--num-samples", type=positive, default=1, metavar="N", help="draws of noise for each level")
    maps.add_argument("--seed", type=seed, default=0, help="of all samples' seeds; default: %(default)s")
    maps.add_argument("--size", nargs=2, type=positive, metavar=("HEIGHT", "WIDTH"), help="in pixels")
    maps.add_argument("--num-frames", type=positive, metavar="N")
    maps.add_argument("--normalize", metavar="RULE", help="'none', 'softmax' or 'zscore'")
    maps.add_argument("--map-parity", metavar="NAME", help="maps as an official implementation makes them")
    maps.add_argument("--keep-on-gpu", action="store_true", help="faster; default: parts are moved there as needed")
    scores = parser.add_argument_group("scores")
    scores.add_argument("--background", nargs="+", metavar="CONCEPT", help="concepts that compete with the classes")
    scores.add_argument("--upsampling", default="bilinear", metavar="MODE", help="'bilinear', 'nearest' or 'guided'")
    scores.add_argument("--temporal", default="nearest", metavar="MODE", help="'nearest' or 'linear'")
    scores.add_argument("--parity", metavar="NAME", help="'concept_attention': compare and count as its scripts do")
    scores.add_argument("--blur", action="store_true", help="with --parity: smooth maps first")
    add_judge_arguments(parser)


def run_dataset(options: argparse.Namespace) -> int:
    """Evaluate, and print the summary; the exit status is 1 where samples failed.

    Raises:
        ConceptMapsError: an argument cannot be used.
    """
    from diffusers_concept_maps.evaluation.processes import this_process
    from diffusers_concept_maps.evaluation.runner import evaluate
    from diffusers_concept_maps.evaluation.summary import table

    if options.root is None:
        raise ConceptMapsValueError(f"--dataset {options.dataset} is there without --root, the folder it is in")
    out = options.out or Path("evaluation", options.dataset)
    check_folder(out)
    settings, judge, process = _settings(options), judge_of(options), this_process()
    pipe, _ = load_pipeline(options.model, None, None, gpu=process.local_rank, offload=not options.keep_on_gpu)
    given = {name: getattr(options, name) for name in _READER_OPTIONS}
    summary = evaluate(
        pipe,
        options.dataset,
        options.root,
        out,
        settings=settings,
        dataset_options={name: value for name, value in given.items() if value is not None},
        limit=options.limit,
        model=str(options.model or "the embedded model"),
        judge=judge,
        process=process,
    )
    if summary is None:  # another process has it
        return 0
    for line in table(summary):
        print(printable(line))
    print(f"\nwritten to {out}: summary.json, run.json, samples")
    if summary["failed"]:
        print("the same command tries what failed again", file=sys.stderr)
    return 1 if summary["failed"] else 0


def _settings(options: argparse.Namespace) -> Any:
    from diffusers_concept_maps.evaluation.protocol import BACKGROUND_CONCEPTS, Settings

    return Settings(
        methods=tuple(options.methods),
        layers=None if options.layers is None else tuple(options.layers),
        normalize=options.normalize,
        map_parity=options.map_parity,
        noise_levels=tuple(options.noise_level or [0.5]),
        num_samples=options.num_samples,
        seed=options.seed,
        background=BACKGROUND_CONCEPTS if options.background is None else tuple(options.background),
        size=None if options.size is None else (options.size[0], options.size[1]),
        num_frames=options.num_frames,
        upsampling=options.upsampling,
        temporal=options.temporal,
        parity=options.parity,
        blur=options.blur,
    )
