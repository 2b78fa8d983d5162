"""The command `concept-maps`: one function for the arguments of each sub-command and one that runs it."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diffusers_concept_maps.maps import ConceptMaps

DEFAULT_PROMPT = "a red circle moving right and a blue square moving right on dark background"
DEFAULT_CONCEPTS = ("red", "blue", "background")
DEFAULT_SEED = 0
_SHOWN_WIDTH = 320  # pixels; videos smaller than that are enlarged so that a person can see them


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 1 where a gate is red, or 2 with one line on standard error.
    """
    parser = argparse.ArgumentParser(prog="concept-maps", description="Saliency maps of concepts in generated videos.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for register in (_register_generate, _register_evaluate, _register_info):
        register(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ConceptMapsError, OSError) as error:
        print(f"concept-maps: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return status


def _register_generate(commands: Any) -> None:
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
        "--steps", type=_positive, help="denoising steps; default: the pipeline's, 20 for the embedded model"
    )
    parser.add_argument("--seed", type=_seed, default=DEFAULT_SEED, help="default: %(default)s")
    parser.add_argument("--guidance-scale", type=float, help="default: the pipeline's, 4 for the embedded model")
    parser.add_argument("--fps", type=_positive, default=8, help="of the videos written; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("concept_maps"), metavar="DIR", help="default: %(default)s")
    parser.set_defaults(run=_generate)


def _register_evaluate(commands: Any) -> None:
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
    parser.set_defaults(run=_evaluate)


def _register_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="say what is in a file of maps")
    parser.add_argument("file", type=Path, metavar="FILE", help="a maps.safetensors")
    parser.set_defaults(run=_info)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 1")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number from 0 to 2**63 - 1")
    return int(text)


def _generate(options: argparse.Namespace) -> int:
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
    with _staging(options.out) as folder:
        pipe, call = _load(options)
        generator = torch.Generator().manual_seed(options.seed)
        with trace(pipe, concepts, methods=options.methods, attention=options.attention) as maps:
            output = pipe(prompt, generator=generator, **call)
        frames = output.frames[0] if hasattr(output, "frames") else output.images[:1]
        overlays = _write(folder, frames, maps, prompt, options.fps)
    _print_table(maps, overlays)
    print(f"\nwritten to {options.out}: video, overlays, contact_sheet.png, maps.safetensors")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
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


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder whose files are moved into `folder` once all of them are there; a failure leaves nothing of it."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as name:
            yield Path(name)
            for file in sorted(Path(name).iterdir()):
                file.replace(folder / file.name)
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def _load(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the arguments of its call that do not come from the user alone."""
    import torch
    from diffusers import DiffusionPipeline

    given = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
    call = {name: value for name, value in given.items() if value is not None}
    if options.model is None:
        from diffusers_concept_maps.shapes.model import GUIDANCE_SCALE, STEPS, load_shapes_pipeline

        pipe = load_shapes_pipeline()
        return pipe, {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE} | _text_length(pipe) | call
    on_gpu = torch.cuda.is_available()
    try:
        pipe = DiffusionPipeline.from_pretrained(options.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
    except (OSError, ValueError) as error:
        raise ConceptMapsError(f"cannot load the pipeline {options.model!r}: {error}") from error
    if on_gpu:
        pipe.enable_model_cpu_offload()
    return pipe, _text_length(pipe) | call


def _text_length(pipe: Any) -> dict[str, int]:
    """The text length that a CogVideoX transformer was built for: its sin-cos position table takes no other."""
    transformer = getattr(pipe, "transformer", None)
    length = None if transformer is None else transformer.config.get("max_text_seq_length")
    return {} if length is None else {"max_sequence_length": length}


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


def slug(text: str) -> str:
    """A short file-name part of ASCII letters, digits and dashes; what has none becomes "concept"."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[:40].strip("-") or "concept"


def _print_table(maps: ConceptMaps, overlays: dict[str, str]) -> None:
    """One line per concept and method: the range of its scores, the frame where it peaks, its overlay."""
    width = max(7, *(len(_printable(concept)) for concept in maps.concepts))
    print(f"{'concept':{width}}  {'method':17}  {'min':>8}  {'mean':>8}  {'max':>8}  peak frame  overlay")
    for method in maps.methods:
        for concept, scores in zip(maps.concepts, maps.get(method)[0], strict=True):
            shown = overlays[concept] if method == maps.methods[0] else ""
            print(
                f"{_printable(concept):{width}}  {method:17}  {_range(scores)}  {_peak(scores):>10}  {shown}".rstrip()
            )


def _range(scores: torch.Tensor) -> str:
    return "  ".join(f"{float(value):8.3f}" for value in (scores.min(), scores.mean(), scores.max()))


def _peak(scores: torch.Tensor) -> int:
    """The frame in which a concept's mean score is highest."""
    return int(scores.mean((1, 2)).argmax())


def _printable(text: str) -> str:
    """Text that cannot steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _info(options: argparse.Namespace) -> int:
    from diffusers_concept_maps.maps import load

    maps = load(options.file)
    print(f"concepts  {', '.join(_printable(concept) for concept in maps.concepts)}")
    for method in maps.methods:
        scores = maps.get(method)
        batch, _, frames, height, width = scores.shape
        grid = f"{batch} x {frames} frames of {height} x {width} tokens"
        print(f"{method}  {grid}, {scores.min():.3f} to {scores.max():.3f}")
    for name, value in maps.metadata.items():
        print(f"{name}  {_printable(str(value))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
