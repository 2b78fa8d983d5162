"""`concept-maps track`: points followed through a video."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_concept_maps.commands._common import load_pipeline, positive, seed, staging
from diffusers_concept_maps.commands._pictures import REPORT, add_report, written
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError

if TYPE_CHECKING:
    import torch

    from diffusers_concept_maps.correspondence.output import TrackOutput

_LINES = 25  # of the table


def register(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "track",
        help="follow points through a video",
        description="Follow points through a video by the attention of a video model that was never trained to. "
        "Writes the tracks (tracks.npz) and the video with the points and their trails (tracks.mp4).",
    )
    parser.add_argument("video", metavar="VIDEO", help="a video, an animation, a picture or a folder of pictures")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--points",
        nargs="+",
        metavar="POINT",
        help="frame,x,y in pixels, from 0; or one file of such lines (.csv) or of an array [point, 3] (.npy)",
    )
    which.add_argument("--grid", type=positive, metavar="N", help="N x N points, evenly over --frame")
    parser.add_argument("--frame", type=int, default=0, help="of --grid; default: %(default)s")
    parser.add_argument("--model", metavar="PATH_OR_HUB_ID", help="a diffusers pipeline; default: the embedded model")
    parser.add_argument("--max-frames", type=positive, metavar="N", help="the first N frames alone")
    parser.add_argument("--fps", type=positive, help="of the video written; default: that of VIDEO, or 8")
    parser.add_argument("--trail", type=int, default=12, help="frames until a trail has faded; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("tracks"), metavar="DIR", help="default: %(default)s")
    add_report(parser)
    _add_options(parser.add_argument_group("how", "The defaults are those of dcm.track."))
    parser.set_defaults(run=run)


def _add_options(group: Any) -> None:
    group.add_argument("--layers", nargs="+", type=int, metavar="N")
    group.add_argument("--heads", nargs="+", type=int, metavar="N")
    group.add_argument("--noise-level", type=float, metavar="FRACTION")
    group.add_argument("--add-noise", action="store_true", help="to the latents, as much as the model is told")
    group.add_argument("--readout", metavar="NAME", help="such as 'refined', 'displacement' or 'argmax'")
    group.add_argument("--direction", metavar="NAME", help="'both', 'forward' or 'backward'")
    group.add_argument("--visibility-tokens", type=float, metavar="N")
    group.add_argument("--chunk", type=positive, metavar="N", help="frames that the model sees at a time")
    group.add_argument("--stride", type=positive, metavar="N", help="fewer than a chunk's overlap; with --contiguous")
    group.add_argument("--contiguous", action="store_true", help="chunks of frames that follow one another")
    group.add_argument("--size", nargs=2, type=positive, metavar=("HEIGHT", "WIDTH"), help="that the model sees")
    group.add_argument("--prompt", help="what to tell the model of the video")
    group.add_argument("--seed", type=seed)
    group.add_argument("--parity", metavar="NAME", help="'difftrack': as the official code")


def run(options: argparse.Namespace) -> int:
    """Track, write the files and print a table of the points; the exit status is 0.

    Raises:
        ConceptMapsError: an argument cannot be used, or the `viz` extra is not installed.
    """
    from diffusers_concept_maps.correspondence.tracking import track
    from diffusers_concept_maps.media import read_frames
    from diffusers_concept_maps.visualize import EXTRA, require

    for module in EXTRA:  # missed now, not after minutes of tracking
        require(module)
    clip = read_frames(options.video, max_frames=options.max_frames)
    points = _points(options, clip.frames)
    with staging(options.out) as folder:
        pipe, _ = load_pipeline(options.model, None, None)
        out = track(pipe, clip.frames, points, **_track_options(options))
        out.save(folder / "tracks.npz")
        fps = options.fps or max(1, round(clip.fps or 8))
        out.to_video(folder / "tracks.mp4", clip.frames, trail=options.trail, fps=fps)
        if options.report:
            out.report(folder / REPORT, clip.frames, fps=fps, title=Path(options.video).name)
    _print_table(out)
    print("\n" + written(options.out, "tracks.npz, tracks.mp4", report=options.report))
    return 0


def _track_options(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of the options of `track`."""
    names = ("layers", "heads", "noise_level", "readout", "direction", "visibility_tokens", "chunk", "stride")
    given = {name: getattr(options, name) for name in (*names, "prompt", "seed", "parity")}
    given["size"] = None if options.size is None else tuple(options.size)
    chosen = {name: value for name, value in given.items() if value is not None}
    return chosen | {"add_noise": options.add_noise, "interleave": not options.contiguous}


def _points(options: argparse.Namespace, frames: torch.Tensor) -> Any:
    """The points asked for `[point, 3]`: frame, x and y.

    Raises:
        ConceptMapsError: a point cannot be read.
    """
    if options.grid is not None:
        height, width = frames.shape[2:]
        steps = [(index + 0.5) / options.grid for index in range(options.grid)]
        return [(options.frame, x * width - 0.5, y * height - 0.5) for y in steps for x in steps]
    if len(options.points) == 1 and options.points[0].lower().endswith((".csv", ".npy")):
        return _points_file(Path(options.points[0]))
    return [_point(text.split(","), f"point {text!r}") for text in options.points]


def _points_file(path: Path) -> Any:
    import numpy as np

    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False)
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except (ValueError, OSError, EOFError, csv.Error) as error:
        raise ConceptMapsError(f"cannot read points of {str(path)!r}: {error}") from error
    if lines and [name.strip().lower() for name in lines[0]] == ["frame", "x", "y"]:
        del lines[0]
    return [_point(line, f"{','.join(line)!r} in {str(path)!r}") for line in lines]


def _point(parts: list[str], where: str) -> tuple[float, float, float]:
    try:
        frame, x, y = map(float, parts)
    except ValueError as error:
        raise ConceptMapsValueError(f"{where} is no frame,x,y; expected three numbers such as 0,120.5,80") from error
    return frame, x, y


def _print_table(out: TrackOutput) -> None:
    """One line per point: where it was asked for, in how many frames it is seen, where it ends, how sure that is."""
    frames = out.tracks.shape[1]
    print(f"{'point':>5}  {'frame':>5}  {'x':>7}  {'y':>7}  {'visible':>9}  {'last x':>7}  {'last y':>7}  confidence")
    for index, (frame, x, y) in enumerate(out.points[:_LINES].tolist()):
        visible = f"{int(out.visibility[index].sum())}/{frames}"
        last = "  ".join(f"{value:7.1f}" for value in out.tracks[index, -1].tolist())
        sure = float(out.confidence[index].mean())
        print(f"{index:>5}  {frame:>5.0f}  {x:>7.1f}  {y:>7.1f}  {visible:>9}  {last}  {sure:10.3f}")
    if len(out.points) > _LINES:
        print(f"and {len(out.points) - _LINES} more points")
