"""How much of motion a layer and step knows: the analysis of DiffTrack (arXiv 2506.17220).

Notation of the shape comments: R rows of the batch, H heads, N points, F frames of P tokens, T text tokens, D head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffusers_concept_maps import ops_matching
from diffusers_concept_maps.correspondence.readout import TokenGrid, nearest_token
from diffusers_concept_maps.correspondence.routes import expect_points, expect_sides, spread_heads
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.ops import expect_shape

__all__ = ["SegmentScores", "harmonic_mean", "matching_accuracy", "segment_scores"]


@dataclass(frozen=True)
class SegmentScores:
    """Attention of points to the segments of the keys, S of them.

    Attributes:
        segments: "text", unless the softmax has none; "self", the frame of the query; "cross", the other frames.
        attention: float32 `[R, S]`, the share of attention that a segment takes; of all segments it is 1.
        confidence: float32 `[R, S]`, the largest probability of a token; of "cross", the mean over the frames in which
            the point is visible of that in the frame.
    """

    segments: tuple[str, ...]
    attention: torch.Tensor
    confidence: torch.Tensor


def segment_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    points: torch.Tensor,
    visible: torch.Tensor,
    grid: TokenGrid,
    *,
    text_key: torch.Tensor | None = None,
    text_mask: torch.Tensor | None = None,
    heads: Sequence[int] | torch.Tensor | None = None,
    scale: float | None = None,
    swap_axes: bool = False,
    all_points: bool = False,
) -> SegmentScores:
    """Attention score and confidence score of a layer.

    Both are means over the points that are visible in the frame of their query and in at least one other. The
    official code's attention score is that of the points visible in the frame of the query, but its confidence score
    that of all points, with 0 for "cross" where no other frame shows them; and it takes x for y.

    Args:
        query: `[R, H, F * P, D]`, of the image tokens, as attention takes it: normed and rotated.
        key: `[R, H, F * P, D]`.
        points: float `[N, 3]`, (frame, x, y): a frame of tokens, and pixel-center coordinates.
        visible: bool `[N, F]`, in the frames of tokens: `readout.covering_visibility`.
        grid: of the clip, of at least 2 frames.
        text_key: `[R, H, T, D]` where the softmax has text; None where it has none, as in Wan.
        text_mask: bool `[R, T]`, False where a text key is padding; None for no padding.
        heads: indices for the mean of some heads, float `[H]` for their mean by weight, None for that of all.
        scale: factor of the logits; None is `1 / sqrt(D)`, as in attention.
        swap_axes: take x for y and y for x, like the official code.
        all_points: over the points of the official code.

    Returns:
        The scores, on the device of `query`.

    Raises:
        ConceptMapsValueError: shapes do not fit the grid, it has one frame, or no point is to be counted.
    """
    expect_sides(query, key, grid)
    frames, pixels = expect_points(points, grid)
    seen, counted = _populations(visible, frames, grid, all_points)
    tokens = _swapped_token(pixels, grid) if swap_axes else nearest_token(pixels, grid)
    sums, maxima = ops_matching.segment_attention(
        query,
        (frames * grid.tokens + tokens).to(query.device).expand(len(query), -1),
        key[:, :, :0] if text_key is None else text_key,
        key,
        spread_heads(heads, query),
        grid.frames,
        text_mask=text_mask,
        scale=scale,
    )
    own = torch.nn.functional.one_hot(frames, grid.frames).to(sums)  # [N, F]
    shares = (visible.cpu() & (own.cpu() == 0)).float()
    shares = (shares / shares.sum(1, keepdim=True).clamp(min=1)).to(sums)
    attention = torch.stack([sums[..., 0], (sums[..., 1:] * own).sum(-1), (sums[..., 1:] * (1 - own)).sum(-1)], -1)
    confidence = torch.stack([maxima[..., 0], (maxima[..., 1:] * own).sum(-1), (maxima[..., 1:] * shares).sum(-1)], -1)
    first = 1 if text_key is None else 0
    return SegmentScores(
        ("text", "self", "cross")[first:],
        attention[:, seen.to(query.device), first:].mean(1),
        confidence[:, counted.to(query.device), first:].mean(1),
    )


def matching_accuracy(
    predicted: torch.Tensor, true: torch.Tensor, visible: torch.Tensor, *, threshold: float = 8.0
) -> float:
    """Percentage of the visible points of all frames that are nearer than some pixels to where they are.

    Args:
        predicted: float `[point, frame, 2]`, in pixels; the official ones are of a clip 720 wide and 480 high.
        true: float `[point, frame, 2]`.
        visible: bool `[point, frame]`.
        threshold: pixels.

    Returns:
        0 to 100.

    Raises:
        ConceptMapsValueError: shapes differ, or nothing is visible.
    """
    expect_shape("true", true, predicted.shape)
    expect_shape("visible", visible, predicted.shape[:2])
    if not bool(visible.any()):
        raise ConceptMapsValueError("no point is visible in any frame; expected one that is")
    near = (predicted - true).norm(dim=-1) < threshold
    return 100 * float(near[visible].double().mean())


def harmonic_mean(*scores: torch.Tensor) -> torch.Tensor:
    """Harmonic mean of scores, each brought to 0..1 over all layers and steps.

    The official one is of matching accuracy and the "cross" confidence and attention scores, after their mean over
    clips. For 0..1 is by the lowest and highest there are, values of several models cannot be compared.

    Args:
        scores: float `[layer, step]` each.

    Returns:
        Float64 `[layer, step]`; 0 where a score is lowest, and everywhere where one is constant.

    Raises:
        ConceptMapsValueError: there are no scores, or their shapes differ.
    """
    if not scores:
        raise ConceptMapsValueError("there are no scores; expected at least one [layer, step]")
    for score in scores:
        expect_shape("a score", score, scores[0].shape)
    every = torch.stack(scores).double().cpu()
    lowest, highest = every.amin((1, 2), keepdim=True), every.amax((1, 2), keepdim=True)
    mean = len(scores) / ((highest - lowest) / (every - lowest)).sum(0)
    return mean.nan_to_num(nan=0.0, posinf=0.0)


def _populations(
    visible: torch.Tensor, frames: torch.Tensor, grid: TokenGrid, all_points: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The points that attention and confidence are means over, bool `[N]`."""
    expect_shape("visible", visible, (len(frames), grid.frames))
    if visible.dtype != torch.bool:
        raise ConceptMapsValueError(f"visible is {visible.dtype}; expected torch.bool: pass visible.bool()")
    if grid.frames < 2:
        raise ConceptMapsValueError("the clip has one frame of tokens; expected others to attend to")
    visible = visible.cpu()
    start = visible.gather(1, frames[:, None])[:, 0]
    seen = start if all_points else start & (visible.sum(1) > 1)
    if not bool(seen.any()):
        raise ConceptMapsValueError("no point is visible in the frame of its query and in another; expected one")
    return seen, torch.ones_like(seen) if all_points else seen


def _swapped_token(pixels: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """The token in its frame that the official code takes: the line by x, the place in it by y, no half token."""
    line, place = (pixels / pixels.new_tensor(grid.stride)).round().long().unbind(-1)
    return line.clamp(0, grid.height - 1) * grid.width + place.clamp(0, grid.width - 1)
