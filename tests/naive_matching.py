"""Matching between frames the wasteful way: every probability of every head at once, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Inputs(NamedTuple):
    """The tensors of `temporal_matching`, and the sizes they were made for."""

    source_query: torch.Tensor
    source_key: torch.Tensor
    target_query: torch.Tensor
    target_key: torch.Tensor
    tokens: torch.Tensor
    head_weights: torch.Tensor
    frames: int
    width: int

    @classmethod
    def random(cls, rows, heads, source, frames, height, width, head_width, queries, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def side(tokens):
            return torch.randn(rows, heads, tokens, head_width, generator=generator).to(dtype)

        targets = frames * height * width
        tokens = torch.randint(source, (rows, queries), generator=generator)
        weights = torch.rand(rows, heads, generator=generator) + 0.1
        return cls(side(source), side(source), side(targets), side(targets), tokens, weights, frames, width)

    def to(self, device):
        return self._replace(**{k: v.to(device) for k, v in self._asdict().items() if isinstance(v, torch.Tensor)})


def _rows(side, tokens):
    index = tokens[:, None, :, None].expand(-1, side.shape[1], -1, side.shape[-1])
    return side.double().gather(2, index)  # [R, H, Q, D]


def matching_weights(inputs, scale, direction):
    """`[R, Q, F, P]`."""
    source_query, source_key, target_query, target_key, tokens, head_weights, frames, _ = inputs
    forward = _rows(source_query, tokens) @ target_key.double().mT * scale
    forward = forward.unflatten(-1, (frames, -1)).softmax(-1)
    backward = (target_query.double() @ source_key.double().mT * scale).softmax(-1)  # [R, H, F * P, S]
    backward = backward.mT.gather(2, tokens[:, None, :, None].expand(-1, backward.shape[1], -1, backward.shape[2]))
    backward = backward.unflatten(-1, (frames, -1))
    weights = {"forward": forward, "backward": backward, "both": (forward + backward) / 2}[direction]
    return (head_weights.double()[:, :, None, None, None] * weights).sum(1)


def temporal_matching(inputs, scale, direction, radius):
    weights = matching_weights(inputs, scale, direction)
    value, index = weights.amax(-1), weights.argmax(-1)
    share = weights / weights.sum(-1, keepdim=True)
    position = torch.empty(*index.shape, 2, dtype=torch.float64)
    width, height = inputs.width, weights.shape[-1] // inputs.width
    for place in torch.cartesian_prod(*(torch.arange(size) for size in index.shape)).view(-1, 3).tolist():
        frame = weights[tuple(place)].view(height, width)
        y, x = divmod(int(index[tuple(place)]), width)
        left, up = min(radius, x, width - 1 - x), min(radius, y, height - 1 - y)
        window = frame[y - up : y + up + 1, x - left : x + left + 1]
        lines, columns = torch.arange(y - up, y + up + 1), torch.arange(x - left, x + left + 1)
        mean = torch.stack([(window * columns).sum(), (window * lines[:, None]).sum()]) / window.sum()
        position[tuple(place)] = mean
    return index, value, torch.special.entr(share).sum(-1), position


def segment_attention(image_query, tokens, text_key, image_key, text_mask, head_weights, frames, scale):
    logits = _rows(image_query, tokens) @ torch.cat([text_key, image_key], 2).double().mT * scale
    if text_mask is not None:
        logits[..., : text_mask.shape[1]].masked_fill_(~text_mask[:, None, None], -torch.inf)
    attention = (head_weights.double()[:, :, None, None] * logits.softmax(-1)).sum(1)
    text, image = attention.split([text_key.shape[2], image_key.shape[2]], -1)
    image = image.unflatten(-1, (frames, -1))
    if not text_key.shape[2]:
        text = image.new_zeros(*tokens.shape, 1)
    sums = torch.cat([text.sum(-1, keepdim=True), image.sum(-1)], -1)
    return sums, torch.cat([text.amax(-1, keepdim=True), image.amax(-1)], -1)
