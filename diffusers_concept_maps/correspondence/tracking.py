"""Points of a video followed through its frames by a model that was never trained to (DiffTrack, arXiv 2506.17220).

Every frame is encoded by itself and stands for a latent frame. The frame of the queries comes first in each pass, and
as many others as a model makes at a time follow, away from it in time: later ones in some passes, earlier ones in
others. Where a match is found that leads back to its query, the point is visible.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_concept_maps.correspondence.fusing import MatchAccumulator
from diffusers_concept_maps.correspondence.matching import Matches, MatchOptions, difftrack_scale, match_points
from diffusers_concept_maps.correspondence.output import TrackOutput
from diffusers_concept_maps.correspondence.points import check_points
from diffusers_concept_maps.correspondence.probe import LayerTokens, attach_probe
from diffusers_concept_maps.correspondence.readout import TokenGrid
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.fitting import fit_clip
from diffusers_concept_maps.indices import check_indices
from diffusers_concept_maps.media import read_frames
from diffusers_concept_maps.noising import check_levels
from diffusers_concept_maps.single_pass import SinglePass

PARITIES = ("difftrack",)


@dataclass(frozen=True)
class _Settings:
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    level: float
    add_noise: bool
    options: MatchOptions
    parity: str | None
    chunk: int
    stride: int | None
    interleave: bool
    seed: int


def track(
    pipe: Any,
    video: Any,
    points: Any,
    *,
    layers: int | Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    noise_level: float | None = None,
    add_noise: bool = False,
    readout: str = "refined",
    direction: str = "both",
    radius: int = 1,
    visibility_tokens: float = 1.0,
    chunk: int | None = None,
    stride: int | None = None,
    interleave: bool = True,
    size: tuple[int, int] | None = None,
    prompt: str = "",
    seed: int = 0,
    parity: str | None = None,
    call: Mapping[str, Any] | None = None,
) -> TrackOutput:
    """Follow points through a video (DiffTrack, arXiv 2506.17220, section 4).

    Args:
        pipe: a video pipeline whose transformer is one of `supported()`.
        video: whatever `media.read_frames` reads: a path, PIL images, an array `[frame, height, width, 3]` or a tensor
            `[frame, 3, height, width]` in 0..1.
        points: float `[point, 3]`, (frame, x, y): a 0-based frame of the video, and its pixels, counted by their
            centers: the center of the first is at 0.
        layers: 0-based; several are averaged after the softmax. None is the checkpoint's preset.
        heads: 0-based, of which the mean is taken; None is all.
        noise_level: that the model is told, a fraction of the training schedule in (0, 1]; None is the preset's, or
            0.02, almost no noise.
        add_noise: add that much noise to the latents as well; the official code does not.
        readout: one of `correspondence.readout.READOUTS`.
        direction: "forward", "backward" or "both"; see `ops_matching.temporal_matching`.
        radius: of the window that refines a match, in tokens.
        visibility_tokens: how far from its query, in tokens, the match of a match may be for the point to be visible.
        chunk: frames in a pass, that of the queries included; None is what the model makes by default.
        stride: frames from the start of one pass to that of the next; fewer than `chunk - 1` overlap, and what is
            found twice is averaged by its confidence. None is no overlap. Not for interleaved passes.
        interleave: the frames of a pass are spread over the video; otherwise they follow one another.
        size: `(height, width)` in pixels that the model gets; None keeps the aspect ratio, at no more than the area
            that the model makes by default.
        prompt: what to tell the model of the video.
        seed: of the noise.
        parity: "difftrack" reads matches and scales logits as the official code does, see `docs/tracking.md`; with
            the default `readout` and `direction` only.
        call: further arguments of the pipeline's call.

    Returns:
        `TrackOutput`: `tracks [point, frame, 2]` in pixels of the video, `visibility [point, frame]`, and confidence.

    Raises:
        ConceptMapsError: the video cannot be read, a point is not in it, the pipeline cannot be listened to, or an
            argument is wrong; the pipeline is as it was in any case.

    Example:
        >>> out = dcm.track(pipe, "dog.mp4", [(0, 120.0, 80.0)], layers=17)
        >>> out.tracks[0], out.visibility[0]
    """
    if parity not in (None, *PARITIES):
        raise ConceptMapsValueError(f"unknown parity {parity!r}; expected one of {', '.join(PARITIES)}")
    if parity and (readout, direction) != ("refined", "both"):
        raise ConceptMapsValueError(
            f"readout {readout!r} and direction {direction!r} are there with parity {parity!r}, which has its own; "
            f"drop them or the parity"
        )
    frames = read_frames(video).frames
    source = frames.shape[2], frames.shape[3]
    queries = check_points(points, frames=len(frames), size=source)
    single = SinglePass(pipe, prompt=prompt, call=call)
    if isinstance(layers, int):
        layers = (layers,)
    given = {"layers": layers, "heads": heads, "noise_level": noise_level, "add_noise": add_noise, "parity": parity}
    given |= {"chunk": chunk, "stride": stride, "interleave": interleave, "seed": seed}
    given["visibility_tokens"] = visibility_tokens
    settings = _check(single, given, MatchOptions("both" if parity else direction, parity or readout, radius))
    shape = single.backbone.clip_shape(single.pipe)
    fitted, fit = fit_clip(frames, area=shape.area, multiple=shape.multiple, size=size)
    tracker = _Tracker(single, settings, fitted, source=source)
    tracks, confidence, distance = tracker.follow(queries)
    metadata = {"layers": list(settings.layers), "noise_level": settings.level, "parity": parity}
    metadata |= {"transformer": type(pipe.transformer).__name__, "size": list(fit.model[1:])}
    visible = distance <= visibility_tokens * tracker.token_size
    return TrackOutput(tracks=tracks, visibility=visible, confidence=confidence, points=queries, metadata=metadata)


class _Tracker:
    """Follows points through the frames of one video."""

    def __init__(
        self, single: SinglePass, settings: _Settings, frames: torch.Tensor, *, source: tuple[int, int]
    ) -> None:
        """Encode every frame.

        Args:
            single: of the pipeline.
            settings: how to follow.
            frames: `[frame, 3, height, width]` in 0..1, of the size that the model gets.
            source: `(height, width)` of the video in pixels, which results are in.
        """
        self._single = single
        self._settings = settings
        self._frames = frames
        self._source = source
        # One at a time: not every VAE of the host takes several clips.
        self._latents = torch.cat([single.encode(frame[None, :, None]) for frame in frames])
        self.token_size = 0.0
        """Pixels of the video that a token is wide or high, the mean of the two."""

    def follow(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tracks `[point, frame, 2]`, their confidence and, in pixels, how far they lead off on the way back."""
        count = len(self._frames)
        sums = torch.zeros(len(points), count, 3)  # of positions (x, y) and distances, by confidence
        weights = torch.zeros(len(points), count)
        seen = torch.zeros(len(points), count)
        for anchor in points[:, 0].unique().long().tolist():
            own = (points[:, 0] == anchor).nonzero()[:, 0]
            for part in passes(anchor, count, self._settings):
                found = self._match(anchor, part, points[own])
                assert found.agreement is not None  # was asked for
                place = own[:, None], torch.tensor(part)
                weight = found.confidence[0].clamp(min=1e-12).cpu()
                both = torch.cat([found.positions[0], found.agreement[0][..., None]], dim=-1).cpu()
                sums[place] += both * weight[..., None]
                weights[place] += weight
                seen[place] += 1
            sums[own, anchor, :2], weights[own, anchor], seen[own, anchor] = points[own, 1:].float(), 1.0, 1
        mean = sums / weights[..., None]
        return mean[..., :2], weights / seen, mean[..., 2]

    def _match(self, anchor: int, others: list[int], points: torch.Tensor) -> Matches:
        """Matches of points in one frame with other frames, by one forward pass, or two where layers are fused."""
        settings = self._settings
        grid: TokenGrid | None = None
        queries = points.float() * points.new_tensor([0.0, 1.0, 1.0])  # the frame of the queries comes first
        targets = range(1, len(others) + 1)
        sums: Any = None
        matches: list[Matches] = []

        def consume(layer: LayerTokens) -> None:
            nonlocal grid, sums
            grid = layer.token_grid(self._source)
            self.token_size = sum(grid.stride) / 2
            scale = difftrack_scale(layer.query) if settings.parity else None
            options: dict[str, Any] = {"heads": settings.heads, "scale": scale}
            if len(settings.layers) == 1:
                pair = layer.query, layer.key
                matches.append(match_points(*pair, queries, grid, settings.options, frames=targets, **options))
                return
            sums = sums or MatchAccumulator(queries, grid, settings.options, frames=targets)
            sums.add(layer.query, layer.key, **options)

        self._run([anchor, *others], consume)
        if len(settings.layers) > 1:
            sums = sums.way_back()
            self._run([anchor, *others], consume)
            matches.append(sums.matches())
        return matches[0]

    def _run(self, frames: list[int], consume: Any) -> None:
        """One forward pass over some frames, the layers of which are handed over."""
        single, settings = self._single, self._settings
        transformer = single.pipe.transformer
        repeats = single.backbone.geometry(transformer)["latents_per_token"]
        latents = self._latents[frames].transpose(0, 2).repeat_interleave(repeats, dim=2)  # one clip of latent frames
        missing = single.backbone.latent_frames(single.pipe, latents.shape[2]) - latents.shape[2]
        latents = torch.cat([latents, latents[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        step = single.backbone.clip_shape(single.pipe).frame_step
        asked = (latents.shape[2] - 1) * step + 1
        clip = self._frames[frames[0]].expand(asked, -1, -1, -1)
        probe = attach_probe(single.pipe, consume, layers=settings.layers, single_passes=True)
        try:
            single.run(latents, settings.level, clip, seed=settings.seed, noised=settings.add_noise)
        finally:
            probe.remove()


def passes(anchor: int, count: int, settings: _Settings) -> Iterator[list[int]]:
    """The frames of every pass beside that of the queries, away from it in time.

    Args:
        anchor: frame of the queries.
        count: frames of the video.
        settings: with `chunk`, `stride` and `interleave`.
    """
    room = settings.chunk - 1
    for targets in (range(anchor + 1, count), range(anchor - 1, -1, -1)):
        if settings.interleave:
            spread = -(-len(targets) // room)
            yield from (list(targets[first::spread]) for first in range(spread))
        else:
            for start in range(0, len(targets), settings.stride or room):
                yield list(targets[start : start + room])
                if start + room >= len(targets):
                    break


def _check(single: SinglePass, given: Mapping[str, Any], options: MatchOptions) -> _Settings:
    """The settings, checked against the pipeline.

    Raises:
        ConceptMapsValueError: an argument is wrong.
    """
    backbone, transformer = single.backbone, single.pipe.transformer
    shape = backbone.clip_shape(single.pipe)
    if shape.frames == 1:
        raise ConceptMapsValueError(f"{type(transformer).__name__} makes images; expected a pipeline of a video model")
    preset = backbone.preset(transformer)
    layer, level = (None, 0.02) if preset is None or preset.matching is None else preset.matching
    chosen = given["layers"] if layer is None or given["layers"] is not None else (layer,)
    if chosen is None:
        raise ConceptMapsValueError(
            "no layer is known to be good for matching in this checkpoint; name one of the middle in layers="
        )
    layers = check_indices("layer", chosen, len(backbone.matching_sites(transformer)))
    heads = given["heads"]
    heads = None if heads is None else tuple(sorted(check_indices("head", heads, backbone.heads(transformer))))
    chunk, stride = given["chunk"], given["stride"]
    if chunk is None:
        latents = (shape.frames - 1) // shape.frame_step + 1
        chunk = max(latents // backbone.geometry(transformer)["latents_per_token"], 2)
    if not isinstance(chunk, int) or chunk < 2:
        raise ConceptMapsValueError(f"chunk is {chunk!r}; expected at least 2 frames, that of the queries and another")
    tokens = given["visibility_tokens"]
    if not isinstance(tokens, int | float) or not tokens >= 0:
        raise ConceptMapsValueError(f"visibility_tokens is {tokens!r}; expected 0 or more tokens")
    if stride is not None and (given["interleave"] or not isinstance(stride, int) or not 1 <= stride < chunk):
        raise ConceptMapsValueError(
            f"stride is {stride!r}; expected 1 to {chunk - 1} frames, and interleave=False, for passes that overlap"
        )
    levels = check_levels(level if given["noise_level"] is None else given["noise_level"])
    if len(levels) > 1:
        raise ConceptMapsValueError(f"noise_level is {levels}; expected one number, for points are followed at one")
    return _Settings(
        layers=tuple(sorted(layers)),
        heads=heads,
        level=levels[0],
        add_noise=bool(given["add_noise"]),
        options=options,
        parity=given["parity"],
        chunk=chunk,
        stride=stride,
        interleave=bool(given["interleave"]),
        seed=int(given["seed"]),
    )
