"""Matching between frames behind one door: shapes are checked here, the work is done by a reference or a kernel.

Shapes: R rows of the batch, H heads, S tokens of the source frame, F target frames of P tokens, Q query tokens, D head
width. Any floating dtype in, float32 scores out. The ops have no gradient.
"""

from __future__ import annotations

import torch

from diffusers_concept_maps import dispatch
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.ops import expect_shape

__all__ = ["DIRECTIONS", "segment_attention", "temporal_matching"]

DIRECTIONS = ("both", "forward", "backward")


def temporal_matching(
    source_query: torch.Tensor,
    source_key: torch.Tensor,
    target_query: torch.Tensor,
    target_key: torch.Tensor,
    tokens: torch.Tensor,
    head_weights: torch.Tensor,
    frames: int,
    width: int,
    *,
    scale: float | None = None,
    direction: str = "both",
    radius: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Match tokens of one frame, the source, with the tokens of others (DiffTrack, arXiv 2506.17220).

    In a head, the forward weight of query i and target j is the probability of key j for query i among the keys of
    j's frame; the backward weight is the probability of key i for query j among the keys of the source.

    Args:
        source_query: `[R, H, S, D]`; not read backward.
        source_key: `[R, H, S, D]`; not read forward.
        target_query: `[R, H, F * P, D]`; not read forward.
        target_key: `[R, H, F * P, D]`; not read backward.
        tokens: int64 `[R, Q]`, which of the S tokens; not checked, for that would wait for the device.
        head_weights: float `[R, H]`, the factor of every head in the sum, not negative, which is not checked either;
            heads of weight 0 are left out.
        frames: F.
        width: tokens in a line of a target frame; it divides P.
        scale: factor of the logits; None is `1 / sqrt(D)`, as in attention.
        direction: "forward", "backward", or "both" for their mean.
        radius: of the window that refines the position, in tokens; 0 for none.

    Returns:
        Four tensors, of the weighted sum over heads. The first three are `[R, Q, F]`: the place in its frame of the
        token of the largest weight (int64, the lowest on ties), that weight, and the entropy, in nats, of the weights
        of the frame relative to their sum (float32). The last is the position (x, y) of the match in tokens, float32
        `[R, Q, F, 2]`: the mean, by weight, of the tokens of a window around the first, as large as `radius` and the
        frame allow it to be in both senses of an axis, so that the border draws nothing inward.

    Raises:
        ConceptMapsValueError: shapes do not fit, `tokens` are not indices, the target tokens are not `frames` frames
            of lines of `width`, unknown direction, or a negative radius.
    """
    expect_shape("source_key", source_key, source_query.shape)
    expect_shape("target_key", target_key, (*source_query.shape[:2], target_key.shape[2], source_query.shape[3]))
    expect_shape("target_query", target_query, target_key.shape)
    _expect_tokens(tokens, head_weights, source_query)
    targets = target_key.shape[2]
    if frames < 1 or width < 1 or not targets or targets % (frames * width):
        raise ConceptMapsValueError(f"{targets} target tokens are not {frames} frames of lines of {width}")
    if direction not in DIRECTIONS:
        raise ConceptMapsValueError(f"unknown direction {direction!r}; expected one of {', '.join(DIRECTIONS)}")
    if radius < 0:
        raise ConceptMapsValueError(f"radius is {radius}; expected 0 or more tokens")
    scale = source_query.shape[3] ** -0.5 if scale is None else scale
    sides = (source_query, source_key, target_query, target_key)
    index, value, entropy, position = dispatch.temporal_matching(
        *sides, tokens, head_weights, frames, width, scale, direction, radius
    )
    return index, value, entropy, position


def segment_attention(
    image_query: torch.Tensor,
    tokens: torch.Tensor,
    text_key: torch.Tensor,
    image_key: torch.Tensor,
    head_weights: torch.Tensor,
    frames: int,
    *,
    text_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and maxima of attention over the text and over each frame (DiffTrack, arXiv 2506.17220).

    Args:
        image_query: `[R, H, N, D]`.
        tokens: int64 `[R, Q]`, which of the N tokens; not checked, for that would wait for the device.
        text_key: `[R, H, T, D]`; T may be 0.
        image_key: `[R, H, F * P, D]`.
        head_weights: float `[R, H]`, the factor of every head in the sum; heads of weight 0 are left out.
        frames: F.
        text_mask: bool `[R, T]`, False where a text key is padding; None for no padding.
        scale: factor of the logits; None is `1 / sqrt(D)`, as in attention.

    Returns:
        Sum and maximum, float32 `[R, Q, 1 + F]`, of the weighted sum over heads of the probabilities of one softmax
        over all keys: first over the text (0 where there is none), then over every frame.

    Raises:
        ConceptMapsValueError: shapes do not fit, `tokens` are not indices, `text_mask` is not bool, or F does not
            divide the image keys.
    """
    rows, heads, _, width = image_query.shape
    for name, key in (("text_key", text_key), ("image_key", image_key)):
        expect_shape(name, key, (rows, heads, key.shape[2], width))
    _expect_tokens(tokens, head_weights, image_query)
    if text_mask is not None:
        expect_shape("text_mask", text_mask, (rows, text_key.shape[2]))
        if text_mask.dtype != torch.bool:
            raise ConceptMapsValueError(f"text_mask is {text_mask.dtype}; expected torch.bool: pass text_mask.bool()")
    images = image_key.shape[2]
    if frames < 1 or not images or images % frames:
        raise ConceptMapsValueError(f"{images} image keys are not {frames} equal frames")
    scale = width**-0.5 if scale is None else scale
    sums, maxima = dispatch.segment_attention(
        image_query, tokens, text_key, image_key, text_mask, head_weights, frames, scale
    )
    return sums, maxima


def _expect_tokens(tokens: torch.Tensor, head_weights: torch.Tensor, query: torch.Tensor) -> None:
    if tokens.ndim != 2 or tokens.shape[0] != query.shape[0] or tokens.dtype != torch.int64:
        raise ConceptMapsValueError(
            f"tokens are {tokens.dtype} {tuple(tokens.shape)}; expected torch.int64 [{query.shape[0]}, Q]"
        )
    expect_shape("head_weights", head_weights, query.shape[:2])
