"""`concept-maps export`: maps as sequences of pictures and videos for other programs."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_concept_maps.commands._common import load_pipeline, positive, seed
from diffusers_concept_maps.commands._pictures import check_extra, write_pictures
from diffusers_concept_maps.commands.generate import DEFAULT_PROMPT, DEFAULT_SEED
from diffusers_concept_maps.errors import ConceptMapsValueError

if TYPE_CHECKING:
    from diffusers_concept_maps.visualize.export import ExportSettings

_GENERATING = ("prompt", "model", "words", "tokens", "steps", "guidance_scale", "keep_maps")
_READING = ("branch", "video")


def register(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "export",
        help="write maps as sequences of pictures and videos",
        description="Write the maps of a file, or of a video that is made for it, as material for other programs: for "
        "each word of the prompt and each concept, by layer, step and head if asked, with a manifest of all files.",
    )
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="maps, or the file of a detail_path; without it: generate"
    )
    _add_generation(parser.add_argument_group("without FILE"))
    _add_choice(parser.add_argument_group("which maps"))
    _add_format(parser.add_argument_group("how"))
    parser.add_argument("--out", type=Path, default=Path("export"), metavar="DIR", help="new; default: %(default)s")
    parser.set_defaults(run=run)


def _add_generation(group: Any) -> None:
    group.add_argument("--prompt", help=f"default: {DEFAULT_PROMPT!r}, for the embedded model")
    group.add_argument("--model", metavar="PATH_OR_HUB_ID", help="a diffusers pipeline; default: the embedded model")
    group.add_argument(
        "--words", action="store_true", help="every word of the prompt; default unless --tokens or --concepts"
    )
    group.add_argument("--tokens", action="store_true", help="every token of the prompt, sub-words and marks too")
    group.add_argument(
        "--steps", type=positive, help="denoising steps; default: the pipeline's, 20 for the embedded model"
    )
    group.add_argument("--seed", type=seed, default=DEFAULT_SEED, help="default: %(default)s")
    group.add_argument("--guidance-scale", type=float, help="default: the pipeline's, 4 for the embedded model")
    group.add_argument(
        "--keep-maps", action="store_true", help="leave the maps themselves beside what is made of them"
    )


def _add_choice(group: Any) -> None:
    group.add_argument("--concepts", nargs="+", metavar="CONCEPT", help="to make maps of; of FILE, which ones")
    group.add_argument("--method", help="default: the first of FILE; cross_attention without it")
    group.add_argument("--branch", help="of guidance, in a file of kept axes; default: cond")
    group.add_argument("--index", type=int, default=0, metavar="N", help="which video of the batch; default: 0")
    group.add_argument(
        "--make", nargs="+", default=["clips"], metavar="WHAT", help="clips, grid, sharpening; default: clips"
    )
    group.add_argument(
        "--per", nargs="+", default=[], metavar="AXIS", help="clips by layer, step, head; default: mean"
    )
    group.add_argument("--columns", default="step", metavar="AXIS", help="of the grid; default: %(default)s")
    group.add_argument("--most-columns", type=positive, default=12, metavar="N", help="default: %(default)s")
    group.add_argument("--frame", type=int, metavar="N", help="token frame of the sharpening; default: the middle one")
    for axis in ("layers", "steps", "heads"):
        group.add_argument(f"--only-{axis}", nargs="+", type=int, metavar="N", help=f"default: all {axis} there are")


def _add_format(group: Any) -> None:
    group.add_argument("--format", default="png", help="png, exr, ffv1, prores, h264; default: %(default)s")
    group.add_argument("--look", default="gray", help="gray, color, overlay, matte; default: %(default)s")
    group.add_argument(
        "--scale", default="clip", help="from lowest to highest of each clip (all of a concept), file or frame"
    )
    group.add_argument(
        "--size", type=_size, default="token", help="token, video or HEIGHTxWIDTH; default: %(default)s"
    )
    group.add_argument(
        "--video", type=Path, metavar="FILE", help="whose size and frames 'video' means, where FILE is silent"
    )
    group.add_argument("--blocks", action="store_true", help="a sharp block for each token instead of smooth ones")
    group.add_argument("--fps", type=positive, default=8, help="default: %(default)s")


def _size(text: str) -> str | tuple[int, int]:
    """A size in words or in pixels.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    pixels = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if pixels is None and text not in ("token", "video"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected token, video or HEIGHTxWIDTH such as 480x832")
    return text if pixels is None else (int(pixels[1]), int(pixels[2]))


def run(options: argparse.Namespace) -> int:
    """Write the files and say where they are; the exit status is 0.

    Raises:
        ConceptMapsError: an argument cannot be used, or an extra is not installed.
    """
    from diffusers_concept_maps.files import whole_folder
    from diffusers_concept_maps.visualize.export import export

    if options.file is None:
        _refuse(options, _READING, "is for a FILE; leave it out where a video is generated")
    else:
        _refuse(options, _GENERATING, "is for a video that is generated; leave it out with FILE")
    check_extra()
    settings = _settings(options)
    settings.format.check()
    if options.file is None:
        with whole_folder(options.out) as folder:
            _generate(options, settings, folder)
    else:
        export(options.file, options.out, settings, method=options.method, branch=options.branch or "cond")
    print(f"written to {options.out}; manifest.json says what each file is")
    return 0


def _refuse(options: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name)]
    if given:
        raise ConceptMapsValueError(f"{', '.join(given)} {reason}")


def _settings(options: argparse.Namespace) -> ExportSettings:
    from diffusers_concept_maps.media import read_frames
    from diffusers_concept_maps.visualize.export import ExportSettings

    video = None
    if options.video is not None:
        frames, _, height, width = read_frames(options.video).frames.shape
        video = (frames, height, width)
    return ExportSettings(
        products=options.make,
        per=options.per,
        columns=options.columns,
        most_columns=options.most_columns,
        frame=options.frame,
        layers=options.only_layers,
        steps=options.only_steps,
        heads=options.only_heads,
        concepts=options.concepts,
        video_index=options.index,
        file_format=options.format,
        look=options.look,
        scale=options.scale,
        size=options.size,
        video=video,
        smooth=not options.blocks,
        fps=options.fps,
    )


def _generate(options: argparse.Namespace, settings: ExportSettings, folder: Path) -> None:
    """The video, and an export of concepts, words and tokens of its prompt, each from a run of its own."""
    if options.model is not None and options.prompt is None:
        raise ConceptMapsValueError("a model of your own needs a --prompt; only the embedded one has a default")
    pipe, call = load_pipeline(options.model, options.steps, options.guidance_scale)
    call["prompt"] = DEFAULT_PROMPT if options.prompt is None else options.prompt
    targets: dict[str, dict[str, Any]] = {}
    if options.concepts is not None:
        targets["concepts"] = {"concepts": options.concepts}
    if options.tokens:
        targets["tokens"] = {"target": "prompt", "prompt_tokens": _tokens(pipe, call)}
    if options.words or not targets:
        targets["words"] = {"target": "prompt"}
    for kind, target in targets.items():
        own = settings if kind == "concepts" else replace(settings, concepts=None)
        _run(options, own, folder / kind, pipe, call, target)


def _tokens(pipe: Any, call: dict[str, Any]) -> dict[str, list[int]]:
    """Every token of the prompt by a name of its number and its characters.

    Raises:
        ConceptMapsValueError: the pipeline does not tell how many tokens it takes.
    """
    from diffusers_concept_maps.backbones import find_backbone, find_transformers, uncompiled

    backbone = find_backbone(uncompiled(find_transformers(pipe)[0]))
    usual = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    length = call.get("max_sequence_length", None if usual is None else usual.default)
    if not isinstance(length, int):
        raise ConceptMapsValueError(f"{type(pipe).__name__} does not tell how many tokens it takes; use --words")
    prompt = backbone.clean(call["prompt"])
    spans = enumerate(backbone.token_spans(pipe, prompt, length))
    return {f"{number} {prompt[start:stop]}": [number] for number, (start, stop) in spans if stop > start}


def _run(
    options: argparse.Namespace,
    settings: ExportSettings,
    folder: Path,
    pipe: Any,
    call: dict[str, Any],
    target: dict[str, Any],
) -> None:
    """One generation and its export; the seed makes the frames of several ones the same."""
    import torch

    from diffusers_concept_maps.capture import trace
    from diffusers_concept_maps.visualize.export import export
    from diffusers_concept_maps.visualize.overlay import as_pictures

    method, detail = options.method or "cross_attention", settings.needed_axes
    file = folder.with_suffix(".safetensors")
    capture: dict[str, Any] = {"detail": detail, "detail_path": file if detail else None, **target}
    generator = torch.Generator().manual_seed(options.seed)
    with trace(pipe, methods=[method], **capture, **_everything(pipe, settings)) as maps:
        output = pipe(**call, generator=generator)
    pictures = as_pictures(output.frames[0] if hasattr(output, "frames") else output.images[:1])
    write_pictures(folder.with_name("video"), pictures, settings.fps)
    video = (len(pictures), pictures[0].height, pictures[0].width)
    export(file if detail else maps, folder, replace(settings, video=video), summary=maps)
    if not options.keep_maps:
        file.unlink(missing_ok=True)
    elif not detail:
        maps.save(file)


def _everything(pipe: Any, settings: ExportSettings) -> dict[str, Any]:
    """Layers, steps and heads to record: those asked for, and along an axis that is told apart all of them.

    A preset names those that make the best mean. Of steps it leaves none out.
    """
    from diffusers_concept_maps.backbones import find_backbone, find_transformers, uncompiled

    transformer = uncompiled(find_transformers(pipe)[0])
    backbone = find_backbone(transformer)
    whole = {"layer": len(backbone.sites(transformer)), "head": backbone.heads(transformer)}
    chosen: dict[str, Any] = {"layers": settings.layers, "steps": settings.steps, "heads": settings.heads}
    for axis, count in whole.items():
        if axis in settings.needed_axes and chosen[f"{axis}s"] is None:
            chosen[f"{axis}s"] = range(count)
    return chosen
