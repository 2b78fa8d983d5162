"""From the token grid to pixels and video frames."""

from __future__ import annotations

import torch

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.guided import follow_edges

_MODES = ("bilinear", "nearest", "guided")
_TEMPORAL = ("nearest", "linear")


def upsample_map(
    maps: torch.Tensor,
    size: tuple[int, int],
    frames: int,
    *,
    mode: str = "bilinear",
    temporal: str = "nearest",
    guide: torch.Tensor | None = None,
    padding: int = 0,
    frames_per_latent: int | None = None,
    latents_per_token: int = 1,
) -> torch.Tensor:
    """Bring maps from the token grid to pixels.

    Args:
        maps: `[..., token_frames, height, width]`; whole numbers, such as labels, only with "nearest" in both.
        size: `(height, width)` in pixels.
        frames: number of video frames.
        mode: in space, "bilinear", "nearest" (the token a pixel lies in), or "guided": bilinear, then made to follow
            the edges of `guide` (see `guided.follow_edges`).
        temporal: as for `spread_frames`.
        guide: float `[frames, 3, *size]` in 0..1, for "guided" only.
        padding: as for `spread_frames`.
        frames_per_latent: as for `spread_frames`.
        latents_per_token: as for `spread_frames`.

    Returns:
        Tensor `[..., frames, *size]` of the same dtype.

    Raises:
        ConceptMapsValueError: a size below 1, an unknown mode, or a guide that is missing, not asked for or not of
            these frames.
        ConceptMapsError: kornia is not installed, for "guided".
    """
    if min(*size, frames) < 1:
        raise ConceptMapsValueError(f"size {size} with {frames} frames; expected at least one pixel and one frame")
    if mode not in _MODES:
        raise ConceptMapsValueError(f"mode is {mode!r}; expected one of {', '.join(_MODES)}")
    if (mode == "guided") != (guide is not None):
        raise ConceptMapsValueError(
            f"mode is {mode!r} {'without' if guide is None else 'with'} a guide; expected frames to follow as `guide` "
            f'with mode="guided", and with that alone'
        )
    scaled = _nearest(maps, size) if mode == "nearest" else _bilinear(maps, size)
    scaled = spread_frames(
        scaled,
        frames,
        temporal=temporal,
        padding=padding,
        frames_per_latent=frames_per_latent,
        latents_per_token=latents_per_token,
    )
    return scaled if guide is None else follow_edges(scaled, guide, (maps.shape[-2], maps.shape[-1]))


def _bilinear(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    scaled = torch.nn.functional.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return scaled.view(*maps.shape[:-2], *size)


def _nearest(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The token that the center of a pixel lies in, in whole numbers and for every dtype."""
    rows, columns = (
        (2 * torch.arange(pixels, device=maps.device) + 1) * tokens // (2 * pixels)
        for tokens, pixels in zip(maps.shape[-2:], size, strict=True)
    )
    return maps[..., rows[:, None], columns]


def spread_frames(
    maps: torch.Tensor,
    frames: int,
    *,
    temporal: str = "nearest",
    padding: int = 0,
    frames_per_latent: int | None = None,
    latents_per_token: int = 1,
) -> torch.Tensor:
    """Give every video frame a map of the token frames.

    A causal video VAE decodes the first latent frame to one video frame and every later one to `frames_per_latent`;
    CogVideoX's decodes an even number of latent frames to `frames_per_latent` each, the first as well. A token frame
    holds `latents_per_token` latent frames; where their number does not divide, padding in front fills the first one.
    Where these numbers are not known, or do not fit, they are inferred: if `frames - 1` is a multiple `r` of
    `token_frames - 1`, video frame `j` takes token frame `ceil(j / r)`, otherwise video frames are spread evenly over
    the token frames.

    Args:
        maps: `[..., token_frames, height, width]`.
        frames: number of video frames.
        temporal: "nearest" gives a video frame the token frame that covers it. "linear" puts each token frame's map at
            the middle of the video frames that it covers, and interpolates between these; before the first and after
            the last middle nothing changes.
        padding: video frames behind these, which the model was given and nobody wants to see.
        frames_per_latent: video frames per latent frame after the first; None if unknown.
        latents_per_token: latent frames per token frame.

    Returns:
        Tensor `[..., frames, height, width]` of the same dtype.

    Raises:
        ConceptMapsValueError: there are no frames, or `temporal` is unknown.
    """
    if frames < 1:
        raise ConceptMapsValueError(f"{frames} video frames; expected at least one")
    if padding < 0:
        raise ConceptMapsValueError(f"{padding} frames of padding; expected none or more")
    if temporal not in _TEMPORAL:
        raise ConceptMapsValueError(f"temporal is {temporal!r}; expected one of {', '.join(_TEMPORAL)}")
    index = _covering(maps.shape[-3], frames + padding, frames_per_latent, latents_per_token)
    if temporal == "nearest":
        return maps[..., index[:frames].to(maps.device), :, :]
    before, after, weight = (part[:frames].to(maps.device) for part in _between(index))
    return torch.lerp(maps[..., before, :, :], maps[..., after, :, :], weight.to(maps.dtype)[:, None, None])


def gather_frames(
    frames: torch.Tensor, tokens: int, *, frames_per_latent: int | None = None, latents_per_token: int = 1
) -> torch.Tensor:
    """The mean over the video frames that each token frame covers, as `spread_frames` has it.

    Args:
        frames: float `[frame, ...]`, one per video frame.
        tokens: number of token frames; no more than video frames.
        frames_per_latent: as for `spread_frames`.
        latents_per_token: as for `spread_frames`.

    Returns:
        `[tokens, ...]` of the same dtype.
    """
    index = _covering(tokens, frames.shape[0], frames_per_latent, latents_per_token).to(frames.device)
    total = frames.new_zeros(tokens, *frames.shape[1:]).index_add_(0, index, frames)
    count = torch.bincount(index, minlength=tokens).clamp(min=1).to(frames)
    return total / count.view(-1, *[1] * (frames.ndim - 1))


def _between(covering: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every video frame, the token frames before and after it, and the weight of the latter."""
    tokens, inverse, count = covering.unique(return_inverse=True, return_counts=True)
    frames = torch.arange(len(covering), dtype=torch.float64)
    middle = torch.zeros(len(tokens), dtype=torch.float64).index_add_(0, inverse, frames) / count
    after = torch.searchsorted(middle, frames).clamp(max=len(tokens) - 1)
    before = (after - 1).clamp(min=0)
    gap = (middle[after] - middle[before]).clamp(
        min=0.5
    )  # middles are at least that far apart, unless one and the same
    return tokens[before], tokens[after], ((frames - middle[before]) / gap).clamp(0, 1)


def _covering(tokens: int, frames: int, frames_per_latent: int | None, latents_per_token: int) -> torch.Tensor:
    """The token frame of every video frame."""
    index = torch.arange(frames)
    if frames_per_latent is not None:
        for first in (1, frames_per_latent):  # video frames of the first latent frame
            latent = (index + frames_per_latent - first) // frames_per_latent
            padding = tokens * latents_per_token - int(latent[-1]) - 1
            if 0 <= padding < latents_per_token:
                return (latent + padding) // latents_per_token
    if tokens > 1 and frames > 1 and (frames - 1) % (tokens - 1) == 0:
        ratio = (frames - 1) // (tokens - 1)
        return (index + ratio - 1) // ratio
    return index * tokens // frames
