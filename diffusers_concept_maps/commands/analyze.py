"""`concept-maps analyze`: what a model's layers, heads and noise levels are good for, as pictures and tables."""

from __future__ import annotations

import argparse
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_concept_maps.commands._common import check_folder, load_pipeline, positive, printable, seed, staging
from diffusers_concept_maps.errors import ConceptMapsValueError

if TYPE_CHECKING:
    from diffusers_concept_maps.evaluation.analysis import Subject

_SHAPES = "shapes"


def register(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "analyze",
        help="score by layer, head and noise level, and what goes with it",
        description="Run one analysis on clips whose masks are known; write its tables (CSV) and pictures (PNG).",
    )
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(_names())}")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--dataset", default=_SHAPES, metavar="NAME", help="shapes (default: embedded scenes) or a data set on disk"
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder of the data set; not for shapes")
    parser.add_argument("--model", metavar="MODEL", help="a pipeline folder or hub name; default: the embedded model")
    parser.add_argument("--limit", type=positive, metavar="N", help="clips to take; default: all, 60 of shapes")
    parser.add_argument("--score", default="average_precision", help="what a map is scored by (default: %(default)s)")
    parser.add_argument("--word", default="color", help="shapes: what names the target: color, shape or motion")
    parser.add_argument(
        "--others", nargs="+", default=["background"], metavar="CONCEPT", help="data sets on disk: what else there is"
    )
    parser.add_argument("--method", default="concept_attention", help="map method (default: %(default)s)")
    parser.add_argument("--normalize", help="none, softmax or zscore; default: the method's")
    parser.add_argument("--noise-level", type=float, nargs="+", metavar="LEVEL", help="fractions in (0, 1]")
    parser.add_argument("--seed", type=seed, default=0, help="of noise and scenes (default: %(default)s)")
    parser.add_argument("--size", type=positive, nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels to scale clips to")
    parser.add_argument("--frames", type=positive, help="most frames to take of a clip")
    parser.add_argument("--matrix", default="head", help="eigenvalues: of each head's matrix, or of their mean")
    parser.add_argument("--tokens", default="image", help="eigenvalues: image, or joint with the text")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the analysis; the exit status is 0.

    Raises:
        ConceptMapsError: an unknown analysis, data set, score or method, or a file that cannot be read or written.
    """
    from diffusers_concept_maps.evaluation.analysis import Settings, find_analysis
    from diffusers_concept_maps.visualize import require

    analysis = find_analysis(options.name)
    require("matplotlib")
    check_folder(options.out)
    levels = options.noise_level or analysis.noise_levels or ((0.7,) if options.dataset == _SHAPES else (0.5,))
    settings = {
        "score": options.score,
        "method": options.method,
        "normalize": options.normalize,
        "noise_levels": tuple(levels),
        "seed": options.seed,
        "size": None if options.size is None else tuple(options.size),
        "num_frames": options.frames,
        "matrix": options.matrix,
        "tokens": options.tokens,
    }
    Settings(**settings)  # a wrong one is named before the model is loaded
    subjects = _subjects(options)
    pipe, call = load_pipeline(options.model, None, None)
    length = {name: value for name, value in call.items() if name == "max_sequence_length"}
    findings = analysis.run(pipe, subjects, Settings(**settings, call=length))
    with staging(options.out) as folder:
        findings.write(folder)
    for line in findings.summary:
        print(printable(line))
    print(f"written to {options.out}")
    return 0


def _names() -> list[str]:
    """The analyses by their files, which takes no import."""
    folder = Path(__file__).parents[1] / "evaluation" / "analysis"
    names = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return sorted(name.replace("_", "-") for name in names if not name.startswith("_"))


def _subjects(options: argparse.Namespace) -> Iterable[Subject]:
    from diffusers_concept_maps.evaluation.analysis import dataset_subjects, shapes_subjects
    from diffusers_concept_maps.evaluation.datasets import open_dataset

    if options.dataset == _SHAPES:
        if options.root is not None:
            raise ConceptMapsValueError("--root is given, but the scenes of shapes are drawn, not read; leave it out")
        return shapes_subjects(options.limit or 60, word=options.word, seed=options.seed)
    if options.root is None:
        raise ConceptMapsValueError(f"the data set {options.dataset!r} needs the folder it is in; pass --root DIR")
    dataset = open_dataset(options.dataset, options.root)
    return dataset_subjects(dataset, options.limit, others=options.others)
