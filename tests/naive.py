"""Maps in float64, written from the equations of CogVideoX and of the papers alone; everything is materialized.

Shapes: R rows, H heads, C concepts, T text tokens, N image tokens in F frames of P, D head width, W = H D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.metrics import calinski_harabasz_score

NEAR_TIE = 1e-4
"""A choice whose best and second-best candidate are closer than this, relatively, must not decide a comparison."""

HeadRule = Callable[["Taps", int], torch.Tensor]
"""From the tensors of a layer and the number of frames to the chosen heads, `[R, H]` of bool."""


@dataclass(frozen=True)
class Taps:
    """The tensors of one layer and step that maps are made of, after norms and rotary embedding."""

    image_query: torch.Tensor  # [R, H, N, D]
    image_output: torch.Tensor  # [R, H, N, D]
    concept_key: torch.Tensor  # [R, H, C, D]
    concept_output: torch.Tensor  # [R, H, C, D]


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    logits = torch.einsum("rhid,rhjd->rhij", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("rhij,rhjd->rhid", logits.softmax(-1), value)


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate neighboring channels `(x0, x1)` to `(x0 cos - x1 sin, x1 cos + x0 sin)`; the tables are `[N, D]`."""
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = torch.empty_like(x)
    rotated[..., 0::2] = even * cosine[:, 0::2] - odd * sine[:, 0::2]
    rotated[..., 1::2] = odd * cosine[:, 1::2] + even * sine[:, 1::2]
    return rotated


class NaiveCogVideoX:
    """The CogVideoX text-to-video transformer from its weights, with concept tokens beside it."""

    def __init__(self, transformer: Any) -> None:
        self.config = transformer.config
        self.weights: dict[str, torch.Tensor] = {
            name: tensor.double() for name, tensor in transformer.state_dict().items()
        }

    def forward(
        self,
        latents: torch.Tensor,
        text: torch.Tensor,
        timestep: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        concepts: torch.Tensor,
    ) -> tuple[torch.Tensor, list[Taps]]:
        """Noise prediction and what every layer shows.

        Args:
            latents: `[R, frame, channel, height, width]`.
            text: prompt states `[R, T, text_width]`.
            timestep: `[R]`.
            rotary: cosines and sines `[N, D]`, None for a model with sin-cos positions.
            concepts: text encoder states of the concepts `[R, C, text_width]`.
        """
        latents, text, concepts = latents.double(), text.double(), concepts.double()
        rows, frames, channels, height, width = latents.shape
        patch = self.config.patch_size
        grid = (frames, height // patch, width // patch)
        time = self.time(timestep)
        cells = latents.reshape(rows, frames, channels, grid[1], patch, grid[2], patch)
        cells = cells.permute(0, 1, 3, 5, 2, 4, 6).reshape(rows, math.prod(grid), channels * patch * patch)
        image = self.linear("patch_embed.proj", cells)
        if rotary is None:
            image = image + self.positions(grid)
        text = self.linear("patch_embed.text_proj", text)
        concepts = self.linear("patch_embed.text_proj", concepts)
        taps = []
        for layer in range(self.config.num_layers):
            image, text, concepts, seen = self.block(layer, image, text, concepts, time, rotary)
            taps.append(seen)
        return self.unpatchify(image, time, grid), taps

    def block(
        self,
        layer: int,
        image: torch.Tensor,
        text: torch.Tensor,
        concepts: torch.Tensor,
        time: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Taps]:
        """One block; concepts are modulated and gated as text and read concepts and image, never the prompt."""
        name = f"transformer_blocks.{layer}"
        shift, scale, gate, text_shift, text_scale, text_gate = self.modulation(f"{name}.norm1", time)
        image_query, image_key, image_value = self.heads(name, self.norm(f"{name}.norm1.norm", image) * scale + shift)
        text_query, text_key, text_value = self.heads(
            name, self.norm(f"{name}.norm1.norm", text) * text_scale + text_shift
        )
        concept_query, concept_key, concept_value = self.heads(
            name, self.norm(f"{name}.norm1.norm", concepts) * text_scale + text_shift
        )
        if rotary is not None:
            image_query, image_key = rotate(image_query, *rotary), rotate(image_key, *rotary)
        joint_output = attention(
            torch.cat([text_query, image_query], 2),
            torch.cat([text_key, image_key], 2),
            torch.cat([text_value, image_value], 2),
        )
        text_output, image_output = joint_output[:, :, : text.shape[1]], joint_output[:, :, text.shape[1] :]
        concept_output = attention(
            concept_query, torch.cat([concept_key, image_key], 2), torch.cat([concept_value, image_value], 2)
        )
        image = image + gate * self.projected(name, image_output)
        text = text + text_gate * self.projected(name, text_output)
        concepts = concepts + text_gate * self.projected(name, concept_output)

        shift, scale, gate, text_shift, text_scale, text_gate = self.modulation(f"{name}.norm2", time)
        norm = f"{name}.norm2.norm"
        image = image + gate * self.feed_forward(name, self.norm(norm, image) * scale + shift)
        text = text + text_gate * self.feed_forward(name, self.norm(norm, text) * text_scale + text_shift)
        concepts = concepts + text_gate * self.feed_forward(name, self.norm(norm, concepts) * text_scale + text_shift)
        return image, text, concepts, Taps(image_query, image_output, concept_key, concept_output)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weights[f"{name}.weight"].flatten(1).T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: torch.Tensor, epsilon: float | None = None) -> torch.Tensor:
        centered = x - x.mean(-1, keepdim=True)
        variance = centered.square().mean(-1, keepdim=True)
        normed = centered / torch.sqrt(variance + (self.config.norm_eps if epsilon is None else epsilon))
        return normed * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def modulation(self, name: str, time: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Shift, factor and gate of the image, then of the text, `[R, 1, W]` each."""
        shift, scale, gate, text_shift, text_scale, text_gate = self.linear(f"{name}.linear", silu(time)).chunk(6, -1)
        parts = (shift, 1 + scale, gate, text_shift, 1 + text_scale, text_gate)
        return tuple(part[:, None] for part in parts)

    def heads(self, block: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value `[R, H, token, D]`; query and key are normed over the head width."""
        query, key, value = (
            self.linear(f"{block}.attn1.to_{part}", x)
            .reshape(*x.shape[:2], self.config.num_attention_heads, -1)
            .transpose(1, 2)
            for part in "qkv"
        )
        query = self.norm(f"{block}.attn1.norm_q", query, 1e-6)
        return query, self.norm(f"{block}.attn1.norm_k", key, 1e-6), value

    def projected(self, block: str, output: torch.Tensor) -> torch.Tensor:
        return self.linear(f"{block}.attn1.to_out.0", output.transpose(1, 2).flatten(2))

    def feed_forward(self, block: str, x: torch.Tensor) -> torch.Tensor:
        return self.linear(f"{block}.ff.net.2", gelu(self.linear(f"{block}.ff.net.0.proj", x)))

    def time(self, timestep: torch.Tensor) -> torch.Tensor:
        """Embedding of the timestep; the model defines its sinusoid in float32, whatever the dtype of the weights."""
        half = self.config.num_attention_heads * self.config.attention_head_dim // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = timestep[:, None].float() * frequencies
        sinusoid = torch.cat([angles.cos(), angles.sin()], -1).double()
        return self.linear("time_embedding.linear_2", silu(self.linear("time_embedding.linear_1", sinusoid)))

    def positions(self, grid: tuple[int, int, int]) -> torch.Tensor:
        """Sin-cos table `[N, W]`: a quarter of the channels for the frame, the rest shared by column and row."""
        width = self.config.num_attention_heads * self.config.attention_head_dim
        space, clip = self.config.spatial_interpolation_scale, self.config.temporal_interpolation_scale

        def sinusoid(position: torch.Tensor, channels: int) -> torch.Tensor:
            frequencies = 10000.0 ** (-torch.arange(channels // 2, dtype=torch.float64) / (channels // 2))
            angles = position[:, None] * frequencies
            return torch.cat([angles.sin(), angles.cos()], -1)

        frame, row, column = (
            index.flatten() for index in torch.meshgrid(*(torch.arange(n).double() for n in grid), indexing="ij")
        )
        parts = [sinusoid(frame / clip, width // 4)]
        parts += [sinusoid(index / space, width * 3 // 8) for index in (column, row)]
        return torch.cat(parts, -1)

    def unpatchify(self, image: torch.Tensor, time: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        shift, scale = self.linear("norm_out.linear", silu(time))[:, None].chunk(2, -1)
        image = self.norm("norm_out.norm", self.norm("norm_final", image)) * (1 + scale) + shift
        patch, channels = self.config.patch_size, self.config.out_channels
        cells = self.linear("proj_out", image).reshape(-1, *grid, channels, patch, patch)
        frames = cells.permute(0, 1, 4, 2, 5, 3, 6)
        return frames.reshape(-1, grid[0], channels, grid[1] * patch, grid[2] * patch)


def all_heads(taps: Taps, frames: int) -> torch.Tensor:
    return torch.ones(taps.image_output.shape[:2], dtype=torch.bool)


def listed_heads(indices: Sequence[int]) -> HeadRule:
    def choose(taps: Taps, frames: int) -> torch.Tensor:
        chosen = torch.zeros(taps.image_output.shape[:2], dtype=torch.bool)
        chosen[:, list(indices)] = True
        return chosen

    return choose


def separability(taps: Taps, frames: int) -> torch.Tensor:
    """Calinski-Harabasz index of every head `[R, H]`: features are the attention outputs, clusters the frames."""
    rows, heads, tokens, _ = taps.image_output.shape
    labels = [frame for frame in range(frames) for _ in range(tokens // frames)]
    scores = [[calinski_harabasz_score(taps.image_output[r, h], labels) for h in range(heads)] for r in range(rows)]
    return torch.tensor(scores, dtype=torch.float64)


def best_heads(count: int) -> HeadRule:
    """The heads that separate the frames best, per row."""

    def choose(taps: Taps, frames: int) -> torch.Tensor:
        score = separability(taps, frames)
        ranked = score.sort(1, descending=True).values
        near = (ranked[:, count - 1] - ranked[:, count]) <= NEAR_TIE * ranked[:, count - 1]
        assert not near.any(), "two heads are nearly as good: choose another seed"
        return score >= ranked[:, count - 1 : count]

    return choose


def heads_above(threshold: float, *, fisher: bool = False) -> HeadRule:
    """The heads whose score is above a threshold, or the best one, per row."""

    def choose(taps: Taps, frames: int) -> torch.Tensor:
        score, tokens = separability(taps, frames), taps.image_output.shape[2]
        if fisher:
            score = score / ((tokens - frames) / (frames - 1))
        assert ((score - threshold).abs() > NEAR_TIE * threshold).all(), "a head is nearly at the threshold"
        return (score > threshold) | (score == score.max(1, keepdim=True).values)

    return choose


def head_maps(method: str, taps: Taps, frames: int) -> torch.Tensor:
    """Raw score of every head, concept and token `[R, H, C, N]`."""
    if method == "concept_attention":
        return torch.einsum("rhcd,rhnd->rhcn", taps.concept_output, taps.image_output)
    logits = torch.einsum("rhcd,rhnd->rhcn", taps.concept_key, taps.image_query)
    if method == "cross_attention":
        return logits / math.sqrt(taps.image_query.shape[-1])
    feature = taps.image_output.unflatten(2, (frames, -1))  # [R, H, F, P, D]
    gram = torch.einsum("rhfpd,rhfqd->rhfpq", feature, feature)
    logits = logits.unflatten(3, (frames, -1))  # [R, H, C, F, P]
    best, second = logits.topk(2, dim=-1).values.unbind(-1)
    assert (best - second).min() > NEAR_TIE * logits.abs().max(), "two anchors are nearly as good: choose another seed"
    anchor = logits.argmax(-1).transpose(2, 3)  # [R, H, F, C]
    columns = gram.gather(3, anchor[..., None].expand(*anchor.shape, gram.shape[-1]))  # [R, H, F, C, P]
    return columns.transpose(2, 3).flatten(3)


def layer_map(method: str, normalize: str, taps: Taps, frames: int, rule: HeadRule) -> torch.Tensor:
    """Map of one layer and step `[R, C, N]`: heads summed for outputs (they are concatenated there), else averaged."""
    scores, chosen = head_maps(method, taps, frames), rule(taps, frames)
    if normalize == "zscore":
        deviation = scores.std(-1, correction=0, keepdim=True)
        scores = (scores - scores.mean(-1, keepdim=True)) / deviation
    joined = (scores * chosen[:, :, None, None]).sum(1)
    if method != "concept_attention":
        joined = joined / chosen.sum(1)[:, None, None]
    return joined.softmax(1) if normalize == "softmax" else joined


def saliency(
    steps: Sequence[Sequence[Taps]], method: str, normalize: str, grid: tuple[int, int, int], rule: HeadRule
) -> torch.Tensor:
    """Mean of the maps of the given steps and layers `[R, C, frame, height, width]`."""
    maps = [layer_map(method, normalize, taps, grid[0], rule) for layers in steps for taps in layers]
    mean: torch.Tensor = torch.stack(maps).mean(0).unflatten(2, grid)
    return mean
