"""The pictures that a judge of motion maps looks at: twelve frames of a clip, plain, masked and as heat maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.upsample import spread_frames

COLUMNS, ROWS = 4, 3
PARITIES = (None, "imap")
_LONGEST_SIDE = 512  # pixels of a cell; what judges are shown larger, they shrink themselves


@dataclass(frozen=True)
class Grids:
    """Three pictures of twelve cells each; time runs along the rows, from the top left to the bottom right.

    Attributes:
        raw: the frames; uint8 `[3, ROWS * height, COLUMNS * width]`, as the other two.
        overlay: the frames, with half the brightness where the score is not above its mean.
        heat_map: the scores in the colors of `visualize.colors.COLORMAP`.
        shown: the video frame of every cell, from 0.
        frames: how many frames the video has.
        per_frame: whether every heat map and every mask has a scale of its own.
    """

    raw: torch.Tensor
    overlay: torch.Tensor
    heat_map: torch.Tensor
    shown: tuple[int, ...]
    frames: int
    per_frame: bool


def make_grids(
    frames: torch.Tensor,
    scores: torch.Tensor,
    *,
    parity: str | None = None,
    frames_per_latent: int | None = None,
    latents_per_token: int = 1,
) -> Grids:
    """Arrange a clip and the map of one concept as IMAP (arXiv 2603.02919) shows them to its judge.

    Twelve frames are evenly spaced, the first and the last among them; of a shorter clip some are shown twice. Scores
    are scaled to 0..1 over the whole clip and masked at one mean, so that a cell is dark where the concept is absent.

    Args:
        frames: uint8 `[frame, 3, height, width]`; frames larger than 512 pixels are shrunk.
        scores: float `[token_frame, height, width]` of one concept.
        parity: "imap" scales and masks every cell by itself, as the official script does, which hides from the judge
            when the concept is there; its token frames are evenly spaced, whatever video frames they cover.
        frames_per_latent: as for `upsample.spread_frames`.
        latents_per_token: as for `upsample.spread_frames`.

    Raises:
        ConceptMapsValueError: frames, scores or parity that cannot be used.
        ConceptMapsError: matplotlib is not installed.
    """
    _check(frames, scores, parity)
    shown = _evenly(len(frames))
    pictures = _shrink(frames[list(shown)].cpu())
    maps = scores.detach().float().cpu()
    if parity is None:
        low, high = maps.amin(), maps.amax()
        cells = spread_frames(
            maps, len(frames), frames_per_latent=frames_per_latent, latents_per_token=latents_per_token
        )[list(shown)]
    else:
        cells = maps[list(_evenly(len(maps)))]
        low, high = cells.amin((1, 2), keepdim=True), cells.amax((1, 2), keepdim=True)
    scaled = torch.where(high > low, (cells - low) / (high - low), 0.0)
    heat = torch.nn.functional.interpolate(scaled[:, None], size=pictures.shape[2:], mode="bilinear")
    mean = heat.mean() if parity is None else heat.mean((1, 2, 3), keepdim=True)
    masked = torch.where(heat > mean, pictures, pictures // 2)
    return Grids(
        raw=_arrange(pictures),
        overlay=_arrange(masked),
        heat_map=_arrange(_colors(heat[:, 0])),
        shown=shown,
        frames=len(frames),
        per_frame=parity is not None,
    )


def _check(frames: torch.Tensor, scores: torch.Tensor, parity: str | None) -> None:
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8 or not frames.numel():
        raise ConceptMapsValueError(
            f"frames of shape {list(frames.shape)} and {frames.dtype}; expected uint8 [frame, 3, height, width] of "
            f"one video; convert them"
        )
    if scores.ndim != 3 or not scores.numel() or not scores.is_floating_point():
        raise ConceptMapsValueError(
            f"scores of shape {list(scores.shape)} and {scores.dtype}; expected floats [token_frame, height, width]; "
            f"take one concept of one video"
        )
    if not bool(scores.isfinite().all()):
        raise ConceptMapsValueError(
            "the scores hold values that are not finite; expected finite ones; find out where the map overflowed"
        )
    if parity not in PARITIES:
        raise ConceptMapsValueError(f"unknown parity {parity!r}; expected None or 'imap'")


def _evenly(count: int) -> tuple[int, ...]:
    """One index of `count` for every cell, evenly spaced; halves do not occur, since 11 is odd."""
    last = COLUMNS * ROWS - 1
    return tuple(round(cell * (count - 1) / last) for cell in range(last + 1))


def _shrink(pictures: torch.Tensor) -> torch.Tensor:
    height, width = pictures.shape[2:]
    if max(height, width) <= _LONGEST_SIDE:
        return pictures
    factor = _LONGEST_SIDE / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    smaller = torch.nn.functional.interpolate(pictures.float(), size=size, mode="bilinear", antialias=True)
    return smaller.round().clamp(0, 255).to(torch.uint8)


def _colors(heat: torch.Tensor) -> torch.Tensor:
    """Colors uint8 `[cell, 3, height, width]` of scores in 0..1 `[cell, height, width]`."""
    from diffusers_concept_maps.visualize.colors import colorize

    return (torch.from_numpy(colorize(heat.numpy())) * 255).round().to(torch.uint8).permute(0, 3, 1, 2)


def _arrange(cells: torch.Tensor) -> torch.Tensor:
    """Cells `[12, 3, height, width]` as one picture."""
    return torch.cat([torch.cat(list(cells[row * COLUMNS : (row + 1) * COLUMNS]), 2) for row in range(ROWS)], 1)
