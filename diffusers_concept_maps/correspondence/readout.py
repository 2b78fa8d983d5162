"""From matching weights on the token grid to pixels and video frames (DiffTrack, arXiv 2506.17220).

Pixels are counted by their centers: coordinate `i` is the center of pixel `i`, so that a frame spans `-0.5` to
`width - 0.5`, and the center of token `i` is at `(i + 0.5) * stride - 0.5`. Only `token_to_pixel` and
`pixel_to_token` know this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.upsample import spread_frames

__all__ = [
    "READOUTS",
    "TIMES",
    "Neighbors",
    "TokenGrid",
    "covering_frames",
    "covering_visibility",
    "interpolate_matches",
    "nearest_token",
    "neighbors",
    "pixel_to_token",
    "token_to_pixel",
    "video_positions",
]

READOUTS = ("refined", "displacement", "soft", "argmax", "difftrack")
TIMES = ("center", "last", "difftrack")
_APART = 1.5  # tokens: neighbors whose motions differ by more are of two things, and no point moves between these
_MARGIN = 64  # the official grid leaves a 64th of the video's width free, which its read-out takes for its size


@dataclass(frozen=True)
class TokenGrid:
    """Where the tokens of a clip are.

    Attributes:
        frames: of tokens.
        height: lines of a frame.
        width: tokens of a line.
        stride: pixels per token, (x, y).

    Raises:
        ConceptMapsValueError: a size or stride is not positive.
    """

    frames: int
    height: int
    width: int
    stride: tuple[float, float]

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width, *self.stride) <= 0:
            raise ConceptMapsValueError(f"{self} has no tokens; expected positive sizes and strides")

    @property
    def tokens(self) -> int:
        """Tokens of one frame."""
        return self.height * self.width


class Neighbors(NamedTuple):
    """The tokens that a pixel is read from: int64 `[..., K]` in their frame, and their shares, float32 `[..., K]`."""

    tokens: torch.Tensor
    shares: torch.Tensor


def token_to_pixel(tokens: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """Pixel coordinates of positions in tokens.

    Args:
        tokens: float `[..., 2]`, (x, y); the center of token i is at i.
        grid: of the clip.

    Returns:
        Float32 `[..., 2]`, (x, y), in pixel-center coordinates.
    """
    return (tokens + 0.5) * tokens.new_tensor(grid.stride, dtype=torch.float32) - 0.5


def pixel_to_token(pixels: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """Inverse of `token_to_pixel`.

    Args:
        pixels: float `[..., 2]`, (x, y), in pixel-center coordinates.
        grid: of the clip.

    Returns:
        Float32 `[..., 2]`, (x, y), in tokens.
    """
    return (pixels + 0.5) / pixels.new_tensor(grid.stride, dtype=torch.float32) - 0.5


def nearest_token(pixels: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """The token in its frame that has a pixel, or for a pixel outside of the frame the nearest.

    Args:
        pixels: float `[..., 2]`, (x, y), in pixel-center coordinates.
        grid: of the clip.

    Returns:
        Int64 `[...]`.
    """
    x, y = _inside((pixel_to_token(pixels, grid) + 0.5).floor(), grid).long().unbind(-1)
    return y * grid.width + x


def neighbors(pixels: torch.Tensor, grid: TokenGrid, readout: str) -> Neighbors:
    """The tokens whose matches make the match of a pixel.

    Args:
        pixels: float `[..., 2]`, (x, y), in pixel-center coordinates.
        grid: of the clip.
        readout: one of `READOUTS`: the nearest token for "argmax" and "soft" (K is 1), else the four around the pixel
            with their bilinear shares. "difftrack" places them like the official code: no half token, corners of a
            frame smaller than it is, and no token beyond the border.

    Returns:
        Tokens and shares `[..., K]`.
    """
    if readout in ("argmax", "soft"):
        nearest = nearest_token(pixels, grid)[..., None]
        return Neighbors(nearest, torch.ones_like(nearest, dtype=torch.float32))
    size = pixels.new_tensor([grid.width, grid.height], dtype=torch.float32)
    if readout == "difftrack":
        stride = pixels.new_tensor(grid.stride, dtype=torch.float32)
        place = pixels / stride * (size - 1) / (size - grid.width / _MARGIN)
    else:
        place = _inside(pixel_to_token(pixels, grid), grid)
    corner = place.floor()
    corners = corner[..., None, :] + corner.new_tensor([[0, 0], [1, 0], [0, 1], [1, 1]])  # [..., 4, (x, y)]
    shares = (1 - (place[..., None, :] - corners).abs()).prod(-1)
    within = ((corners >= 0) & (corners < size)).all(-1)
    x, y = _inside(corners, grid).long().unbind(-1)
    return Neighbors(y * grid.width + x, shares.masked_fill(~within, 0.0))


def interpolate_matches(
    pixels: torch.Tensor, around: Neighbors, matches: torch.Tensor, grid: TokenGrid, readout: str
) -> torch.Tensor:
    """The position of a pixel's match, from those of the tokens around it.

    Args:
        pixels: float `[..., 2]`, (x, y), in pixel-center coordinates.
        around: `neighbors` of the pixels, for the same read-out.
        matches: float `[..., K, F, 2]`, the matches (x, y) of those tokens in F frames, in tokens.
        grid: of the clip.
        readout: one of `READOUTS`. "argmax" and "soft" give the match of the nearest token itself; "displacement" and
            "refined" add to the pixel what the tokens around it moved, so that no motion is none to the last digit, at
            the border as well, and "refined" leaves out those that moved otherwise than the nearest; "difftrack" mixes
            the matches, and shrinks and cuts the frame in doing so.

    Returns:
        Float32 `[..., F, 2]`, (x, y), in pixel-center coordinates.
    """
    shares = around.shares[..., None, None]
    if readout in ("argmax", "soft"):
        return token_to_pixel(matches.squeeze(-3), grid)
    stride = matches.new_tensor(grid.stride)
    if readout == "difftrack":
        return (shares * matches).sum(-3) * stride
    tokens = torch.stack([around.tokens % grid.width, around.tokens // grid.width], dim=-1)
    moved = matches - tokens[..., None, :]
    if readout == "refined":
        choice = around.shares.argmax(-1)[..., None, None, None].expand(*moved.shape[:-3], 1, *moved.shape[-2:])
        alike = ((moved - moved.gather(-3, choice)).abs() <= _APART).all(-1, keepdim=True)
        shares = shares * alike
        shares = shares / shares.sum(-3, keepdim=True)
    return pixels[..., None, :] + (shares * moved).sum(-3) * stride


def covering_frames(
    frames: int, token_frames: int, *, frames_per_latent: int | None = None, latents_per_token: int = 1
) -> torch.Tensor:
    """The frame of tokens that covers each frame of the video, as maps are spread over it.

    Args:
        frames: of the video.
        token_frames: of the grid.
        frames_per_latent: as for `upsample.spread_frames`.
        latents_per_token: as for `upsample.spread_frames`.

    Returns:
        Int64 `[frames]`, ascending.

    Raises:
        ConceptMapsValueError: a frame of tokens covers none of the video.
    """
    index = torch.arange(token_frames).view(-1, 1, 1)
    cover = spread_frames(index, frames, frames_per_latent=frames_per_latent, latents_per_token=latents_per_token)
    if len(cover.unique()) != token_frames:
        raise ConceptMapsValueError(f"{frames} video frames are too few for {token_frames} frames of tokens")
    return cover.flatten()


def covering_visibility(visible: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
    """Whether a point is visible in all the video frames that a frame of tokens covers.

    Args:
        visible: bool `[point, video frame]`.
        cover: `covering_frames`.

    Returns:
        Bool `[point, frame]`.
    """
    return torch.stack([visible[:, frame == cover].all(1) for frame in cover.unique()], dim=1)


def video_positions(positions: torch.Tensor, cover: torch.Tensor, *, time: str = "center") -> torch.Tensor:
    """Positions in every frame of the video, from those in the frames of tokens: linear between and beyond them.

    Args:
        positions: float `[..., F, 2]`, in the frames of tokens.
        cover: `covering_frames` of the video.
        time: when a frame of tokens is: "center" in the middle of the video frames that it covers, "last" at their
            last, or "difftrack" as if the frames of tokens were cells of equal length, which for a causal VAE they
            are not (the official code; positions beyond the first and last are held).

    Returns:
        Tensor `[..., video frame, 2]`.

    Raises:
        ConceptMapsValueError: unknown time, or the frames are not those of `cover`.
    """
    if time not in TIMES:
        raise ConceptMapsValueError(f"unknown time {time!r}; expected one of {', '.join(TIMES)}")
    count = positions.shape[-2]
    if count != int(cover[-1]) + 1:
        raise ConceptMapsValueError(f"positions have {count} frames; expected {int(cover[-1]) + 1}, as their cover")
    if count == 1:
        return positions.expand(*positions.shape[:-2], len(cover), 2)
    frame = torch.arange(len(cover), dtype=torch.float64)
    if time == "difftrack":
        place = ((frame + 0.5) * count / len(cover) - 0.5).clamp(0, count - 1)
        before = place.long().clamp(max=count - 2)
        share = place - before
    else:
        sizes = cover.bincount()
        moments = sizes.cumsum(0) - (1 if time == "last" else (sizes + 1) / 2)  # of the frames of tokens
        before = (torch.searchsorted(moments.double(), frame, right=True) - 1).clamp(0, count - 2)
        share = (frame - moments[before]) / (moments[before + 1] - moments[before])
    before, share = before.to(positions.device), share.to(positions)[:, None]
    return positions[..., before, :].lerp(positions[..., before + 1, :], share)


def _inside(tokens: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    return tokens.clamp(min=tokens.new_zeros(2), max=tokens.new_tensor([grid.width - 1, grid.height - 1]))
