"""Clips to score correspondence on: those that a model generates of DiffTrack's prompts, and real ones with tracks."""

from __future__ import annotations

import inspect
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_concept_maps.backbones import find_backbone
from diffusers_concept_maps.correspondence.readout import covering_frames, covering_visibility
from diffusers_concept_maps.correspondence.tracing import Correspondence, encode_correspondence, trace_correspondence
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.evaluation.correspondence import Summary, TrackedClip, summarize
from diffusers_concept_maps.evaluation.difftrack_dataset import SEED, SIZE, MatchingSample, read_difftrack
from diffusers_concept_maps.media import read_frames

__all__ = ["LEVELS", "read_tracks", "score_dataset", "score_video"]

LEVELS = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Noise levels that real video is encoded at by default."""


def score_dataset(
    pipe: Any,
    folder: str | os.PathLike[str],
    *,
    call: Mapping[str, Any] | None = None,
    limit: int | None = None,
    layers: Iterable[int] | None = None,
    threshold: float | None = None,
    parity: str | None = None,
    tell: Callable[[str], None] | None = None,
) -> Summary:
    """Generate the videos of DiffTrack's prompts anew, and score matches on the tracks that are given for them.

    The tracks hold only where a video comes out as the authors' did: by the same model, seed, size and steps. Nothing
    can check this.

    Args:
        pipe: the pipeline that the folder is of.
        folder: such as `dataset/cogvideox_t2v_2b/fg`.
        call: further arguments of the pipeline's call; height, width, number of frames and the generator are those of
            the data set if not given.
        limit: the first so many clips alone.
        layers: 0-based; None is all.
        threshold: as for `summarize`.
        parity: "difftrack" counts and reads as the official code does.
        tell: is told of every clip that is done, or left out because no point of it is seen long enough.

    Raises:
        ConceptMapsError: the folder is no such data set, no clip can be scored, or the pipeline cannot be listened to.
    """
    pairs = list(_scorable(pipe, list(read_difftrack(folder))[:limit], parity, tell))
    clips = [clip for _, clip in pairs]
    chosen = None if layers is None else list(layers)

    def match(number: int) -> Correspondence:
        clip = clips[number]
        options: dict[str, Any] = {"layers": chosen, "visibility": clip.visibility, "parity": parity}
        given = _arguments(pipe, pairs[number][0]) | dict(call or {})
        frames = clip.tracks.shape[1]
        with trace_correspondence(pipe, clip.points, size=clip.size, num_frames=frames, **options) as found:
            pipe(**given)
        return found

    return summarize(clips, match, threshold=threshold, parity=parity, tell=tell)


def score_video(
    pipe: Any,
    video: Any,
    tracks: tuple[torch.Tensor, torch.Tensor],
    *,
    levels: Sequence[float] = LEVELS,
    prompt: str = "",
    call: Mapping[str, Any] | None = None,
    layers: Iterable[int] | None = None,
    threshold: float | None = None,
    parity: str | None = None,
    seed: int = 0,
) -> Summary:
    """Score matches on a real video, noised to every level and seen once at each.

    Args:
        pipe: a video pipeline.
        video: whatever `media.read_frames` reads; as many frames are used as the model takes.
        tracks: float `[point, frame, 2]` and visibility `[point, frame]`, such as `read_tracks` gives.
        levels: of noise, fractions of the training schedule.
        prompt: what to tell the model of the video.
        call: further arguments of the pipeline's call.
        layers: 0-based; None is all.
        threshold: as for `summarize`.
        parity: "difftrack" counts and reads as the official code does.
        seed: of the noise.

    Raises:
        ConceptMapsError: the video and its tracks do not fit, or the pipeline cannot be listened to.
    """
    frames, (positions, visibility) = read_frames(video).frames, tracks
    if positions.shape[1] != len(frames):
        raise ConceptMapsError(
            f"the tracks have {positions.shape[1]} frames and the video {len(frames)}; expected as many"
        )
    shape = find_backbone(pipe.transformer).clip_shape(pipe)
    used = (min(len(frames), shape.frames) - 1) // shape.frame_step * shape.frame_step + 1
    size = (frames.shape[2], frames.shape[3])
    clip = TrackedClip.of("video", positions[:, :used], visibility[:, :used], size)
    found = encode_correspondence(
        pipe,
        frames[:used],
        clip.points,
        noise_level=levels,
        layers=layers,
        visibility=clip.visibility,
        parity=parity,
        prompt=prompt,
        seed=seed,
        call=call,
    )
    named: dict[str, Any] = {"columns": levels, "axis": "noise level", "threshold": threshold, "parity": parity}
    return summarize([clip], lambda _: found, **named)


def read_tracks(path: str | os.PathLike[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tracks and visibility of an npz file, such as `TrackOutput.save` writes.

    Args:
        path: with the arrays "tracks", floats `[point, frame, 2]`, (x, y) in pixel-center coordinates, and
            "visibility", bool `[point, frame]`.

    Raises:
        ConceptMapsError: the file cannot be read or has other arrays.
    """
    name = os.fspath(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            tracks, visibility = archive["tracks"], archive["visibility"]
    except KeyError as error:
        raise ConceptMapsError(f"{name!r} has no {error.args[0]!r}; expected the arrays tracks, visibility") from error
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ConceptMapsError(f"cannot read {name!r} as tracks: {error}") from error
    if tracks.ndim != 3 or tracks.shape[2] != 2 or tracks.dtype.kind != "f":
        raise ConceptMapsError(
            f"{name!r} has tracks of {tracks.dtype} {tracks.shape}; expected floats [point, frame, 2]"
        )
    if visibility.shape != tracks.shape[:2] or visibility.dtype != bool:
        raise ConceptMapsError(
            f"{name!r} has visibility of {visibility.dtype} {visibility.shape}; expected bool {tracks.shape[:2]}"
        )
    return torch.from_numpy(tracks.astype(np.float32)), torch.from_numpy(visibility)


def _scorable(
    pipe: Any, samples: Sequence[MatchingSample], parity: str | None, tell: Callable[[str], None] | None
) -> Iterator[tuple[MatchingSample, TrackedClip]]:
    """The samples that have a point in the first frame which is seen in another frame of tokens, with their clips."""
    geometry = find_backbone(pipe.transformer).geometry(pipe.transformer)
    for sample in samples:
        try:
            clip = TrackedClip.of(
                sample.name, sample.tracks, sample.visibility, SIZE, first_frame=True, every_point=parity is not None
            )
            latents = (clip.tracks.shape[1] - 1) // geometry["frames_per_latent"] + 1
            tokens = -(-latents // geometry["latents_per_token"])
            seen = covering_visibility(clip.visibility, covering_frames(clip.tracks.shape[1], tokens, **geometry))
            if not bool((seen[:, 0] & (seen.sum(1) > 1)).any()):
                raise ConceptMapsValueError(f"{sample.name} has no point that is seen in another frame of tokens")
        except ConceptMapsValueError as error:
            if tell is not None:
                tell(f"left out: {error}")
            continue
        yield sample, clip


def _arguments(pipe: Any, sample: MatchingSample) -> dict[str, Any]:
    """Arguments of the call that makes a video of the data set."""
    given: dict[str, Any] = {
        "prompt": sample.prompt,
        "height": SIZE[0],
        "width": SIZE[1],
        "num_frames": sample.tracks.shape[1],
        "generator": torch.Generator().manual_seed(SEED),
        "output_type": "latent",
    }
    if sample.image is not None:
        given["image"] = Image.fromarray(sample.image.permute(1, 2, 0).numpy())
    known = inspect.signature(type(pipe).__call__).parameters
    return {name: value for name, value in given.items() if name in known}
