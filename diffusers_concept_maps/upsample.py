"""From the token grid to pixels and video frames."""

from __future__ import annotations

import torch

from diffusers_concept_maps.errors import ConceptMapsValueError


def upsample_map(
    maps: torch.Tensor,
    size: tuple[int, int],
    frames: int,
    *,
    frames_per_latent: int | None = None,
    latents_per_token: int = 1,
) -> torch.Tensor:
    """Bring maps from the token grid to pixels: bilinear in space, the covering token frame in time.

    Args:
        maps: `[..., token_frames, height, width]`.
        size: `(height, width)` in pixels.
        frames: number of video frames.
        frames_per_latent: as for `spread_frames`.
        latents_per_token: as for `spread_frames`.

    Returns:
        Tensor `[..., frames, *size]` of the same dtype.

    Raises:
        ConceptMapsValueError: a size below 1.
    """
    if min(*size, frames) < 1:
        raise ConceptMapsValueError(f"size {size} with {frames} frames; expected at least one pixel and one frame")
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    scaled = torch.nn.functional.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    scaled = scaled.view(*maps.shape[:-2], *size)
    return spread_frames(scaled, frames, frames_per_latent=frames_per_latent, latents_per_token=latents_per_token)


def spread_frames(
    maps: torch.Tensor, frames: int, *, frames_per_latent: int | None = None, latents_per_token: int = 1
) -> torch.Tensor:
    """Give every video frame the map of the token frame that covers it.

    A causal video VAE decodes the first latent frame to one video frame and every later one to `frames_per_latent`;
    CogVideoX's decodes an even number of latent frames to `frames_per_latent` each, the first as well. A token frame
    holds `latents_per_token` latent frames; where their number does not divide, padding in front fills the first one.
    Where these numbers are not known, or do not fit, they are inferred: if `frames - 1` is a multiple `r` of
    `token_frames - 1`, video frame `j` takes token frame `ceil(j / r)`, otherwise video frames are spread evenly over
    the token frames.

    Args:
        maps: `[..., token_frames, height, width]`.
        frames: number of video frames.
        frames_per_latent: video frames per latent frame after the first; None if unknown.
        latents_per_token: latent frames per token frame.

    Returns:
        Tensor `[..., frames, height, width]` of the same dtype.

    Raises:
        ConceptMapsValueError: there are no frames.
    """
    if frames < 1:
        raise ConceptMapsValueError(f"{frames} video frames; expected at least one")
    index = _covering(maps.shape[-3], frames, frames_per_latent, latents_per_token)
    return maps[..., index.to(maps.device), :, :]


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
