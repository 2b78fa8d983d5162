"""`concept-maps evaluate`: the score of a model and its maps, on a suite or a data set."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_concept_maps.commands._correspondence import add_correspondence_arguments, run_correspondence
from diffusers_concept_maps.commands._dataset import add_dataset_arguments, run_dataset
from diffusers_concept_maps.commands._tap_vid import add_tap_vid_arguments, run_tap_vid
from diffusers_concept_maps.errors import ConceptMapsValueError

if TYPE_CHECKING:
    from diffusers_concept_maps.shapes.suite.result import Result


def register(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="score a model and its maps",
        description="Print what a suite measures, one line as soon as it is known, and end with status 1 when a gate "
        "is red. Or score maps on a data set, which can be interrupted and gone on with, and shared by the processes "
        "of `accelerate launch`; the status is 1 when samples failed.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--suite",
        choices=sorted(SUITES),
        help="of the embedded model; shapes: does it draw what it is told, and do its maps say where; guidance: what "
        "cross-attention guidance changes in its clips; tracking: does it follow points; correspondence: which layer "
        "and step know where points go, in this model or another",
    )
    what.add_argument(
        "--dataset", metavar="NAME", help="such as imagenet-segmentation, pascal-voc, mevis, vspw or davis-2017"
    )
    what.add_argument(
        "--tap-vid", choices=["davis", "kinetics", "rgb-stacking"], help="score points followed through these videos"
    )
    parser.add_argument("--model", metavar="PATH_OR_HUB_ID", help="a diffusers pipeline; default: the embedded model")
    parser.add_argument(
        "--guidance",
        action="store_true",
        help="of these suites: compare scales of guidance instead, on noise of the development seed",
    )
    add_dataset_arguments(parser)
    add_tap_vid_arguments(parser)
    add_correspondence_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what the suite or the data set gives; the exit status is 1 where a gate is red or a sample failed.

    Raises:
        ConceptMapsError: an argument cannot be used.
    """
    _check_read(options)
    if options.suite is not None:
        return SUITES[options.suite](options)
    if options.guidance:
        what = "--dataset" if options.tap_vid is None else "--tap-vid"
        raise ConceptMapsValueError(f"--guidance is there with {what}; expected it with --suite shapes")
    return run_dataset(options) if options.tap_vid is None else run_tap_vid(options)


def _check_read(options: argparse.Namespace) -> None:
    """Raise where an argument is given that what is to be scored does not read."""
    what = options.suite or ("dataset" if options.tap_vid is None else "tap-vid")
    unread = []
    for kind, add_arguments in _ARGUMENTS.items():
        alone = argparse.ArgumentParser()
        add_arguments(alone)
        for name, default in vars(alone.parse_args([])).items():
            if kind != what and name not in _SHARED.get(what, ()) and getattr(options, name) != default:
                unread.append(f"--{name.replace('_', '-')}")
    if unread:
        chosen = f"--{what}" if options.suite is None else f"--suite {what}"
        raise ConceptMapsValueError(f"{', '.join(unread)} would not be read with {chosen}; leave it out")


def _shapes(options: argparse.Namespace) -> int:
    """The gates of the embedded model, or of another with its parts."""
    from diffusers_concept_maps.shapes import suite

    pipe = _load(options)
    return _compare(suite.compare_guidance(pipe)) if options.guidance else _print_results(suite.evaluate(pipe))


def _guidance(options: argparse.Namespace) -> int:
    """What cross-attention guidance changes in the clips of the embedded model."""
    from diffusers_concept_maps.shapes.suite import guidance

    pipe = _load(options)
    return _compare(guidance.compare(pipe)) if options.guidance else _print_results(guidance.evaluate(pipe))


def _tracking(options: argparse.Namespace) -> int:
    """Points followed by the embedded model, or another with its parts."""
    from diffusers_concept_maps.shapes.suite.tracking import tracking_results

    if options.guidance:
        raise ConceptMapsValueError("--guidance is there with --suite tracking; expected it with another suite")
    return _print_results(tracking_results(_load(options)))


def _load(options: argparse.Namespace) -> Any:
    """The embedded model, or the one of a folder."""
    from diffusers_concept_maps.shapes.model import load_shapes_pipeline

    pipe = load_shapes_pipeline(folder=None if options.model is None else Path(options.model))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _compare(settings: Iterable[tuple[Any, dict[str, float]]]) -> int:
    """Print the rates of every setting as soon as they are known."""
    for setting, rates in settings:
        print(f"{setting}: " + "  ".join(f"{name} {rate:.3f}" for name, rate in rates.items()), flush=True)
    return 0


def _print_results(results: Iterable[Result]) -> int:
    """Print every result as soon as it is known; the exit status is 1 where a gate is red."""
    gates: dict[str, bool] = {}
    for result in results:
        print(result, flush=True)
        gates |= {} if result.passed is None else {result.name: result.passed}
    red = [name for name, passed in gates.items() if not passed]
    if gates:
        print(f"{len(red)} gates are red: {'; '.join(red)}" if red else "all gates are green")
    return 1 if red else 0


_ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "dataset": add_dataset_arguments,
    "tap-vid": add_tap_vid_arguments,
    "correspondence": add_correspondence_arguments,
}
"""What has arguments of its own."""

_SHARED = {
    "tap-vid": ("root", "limit", "out", "layers", "noise_level", "size", "seed", "parity", "keep_on_gpu"),
    "correspondence": ("root", "limit", "out", "layers"),
}
"""What else is read of the arguments of data sets."""

SUITES: dict[str, Callable[[argparse.Namespace], int]] = {
    "correspondence": run_correspondence,
    "guidance": _guidance,
    "shapes": _shapes,
    "tracking": _tracking,
}
"""What `--suite` names: from the arguments to the exit status."""
