"""The variants of the maps in float64 beside `naive`: prompt words, other spaces and reads, the official rules.

Under the official rules the text axis is carried with all its rows, padding included. Shapes: R rows, H heads, T rows
of the text axis, N image tokens, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import naive
import numpy as np
import torch

NEAR_TIE = 1e-5
"""As `naive.NEAR_TIE`, for a text axis of many rows; the logits of the package are off by 1e-6 at most."""
CARRIED = {"both": ("concepts", "image"), "image": ("image",), "concepts": ("concepts",)}


class Tokens(NamedTuple):
    """Query, key, value and attention output of one kind of tokens, `[R, H, token, D]` each."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """All that one layer and step shows."""

    image: Tokens
    text: Tokens
    concepts: Tokens


class VariantCogVideoX(naive.NaiveCogVideoX):
    """The same transformer; keeps what every kind of token shows, and concepts may read less."""

    def layers(self, call: dict[str, Any], rows: slice, concepts: torch.Tensor, reads: str = "both") -> list[Layer]:
        """What every layer shows of some rows in one forward pass.

        Args:
            call: arguments of the transformer.
            rows: which rows of the batch.
            concepts: text encoder states of the concepts `[C, text_width]` or `[R, C, text_width]`.
            reads: what concepts attend to.
        """
        latents, prompt = call["hidden_states"][rows].double(), call["encoder_hidden_states"][rows].double()
        batch, frames, channels, height, width = latents.shape
        patch = self.config.patch_size
        grid = (frames, height // patch, width // patch)
        cells = latents.reshape(batch, frames, channels, grid[1], patch, grid[2], patch)
        cells = cells.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, math.prod(grid), -1)
        rotary, time = call["image_rotary_emb"], self.time(call["timestep"][rows])
        states = {
            "image": self.linear("patch_embed.proj", cells) + (self.positions(grid) if rotary is None else 0),
            "text": self.linear("patch_embed.text_proj", prompt),
            "concepts": self.linear("patch_embed.text_proj", concepts.double().expand(batch, -1, -1)),
        }
        shown = []
        for index in range(self.config.num_layers):
            name = f"transformer_blocks.{index}"
            shown.append(self.attend(name, states, time, rotary, reads))
            states = self.advanced(name, states, time, shown[-1])
        return shown

    def attend(
        self,
        name: str,
        states: dict[str, torch.Tensor],
        time: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        reads: str,
    ) -> Layer:
        """Image and text read each other; concepts what `reads` says."""
        modulation = self.modulation(f"{name}.norm1", time)
        query, key, value = {}, {}, {}
        for kind, tokens in states.items():
            shift, scale = modulation[:2] if kind == "image" else modulation[3:5]
            heads = self.heads(name, self.norm(f"{name}.norm1.norm", tokens) * scale + shift)
            query[kind], key[kind], value[kind] = heads
        if rotary is not None:
            query["image"], key["image"] = naive.rotate(query["image"], *rotary), naive.rotate(key["image"], *rotary)

        def read(kind: str, sources: Sequence[str]) -> torch.Tensor:
            keys, values = ([table[source] for source in sources] for table in (key, value))
            return naive.attention(query[kind], torch.cat(keys, 2), torch.cat(values, 2))

        output = {kind: read(kind, ("text", "image")) for kind in ("image", "text")}
        output["concepts"] = value["concepts"] if reads == "none" else read("concepts", CARRIED[reads])
        return Layer(**{kind: Tokens(query[kind], key[kind], value[kind], output[kind]) for kind in states})

    def advanced(
        self, name: str, states: dict[str, torch.Tensor], time: torch.Tensor, layer: Layer
    ) -> dict[str, torch.Tensor]:
        """States after the block; concepts are treated as text."""
        first, second = self.modulation(f"{name}.norm1", time), self.modulation(f"{name}.norm2", time)
        result = {}
        for kind, tokens in states.items():
            part = slice(0, 3) if kind == "image" else slice(3, 6)
            gate, (shift, scale, last_gate) = first[part][2], second[part]
            attended = tokens + gate * self.projected(name, getattr(layer, kind).output)
            normed = self.norm(f"{name}.norm2.norm", attended) * scale + shift
            result[kind] = attended + last_gate * self.feed_forward(name, normed)
        return result


def taps(layer: Layer, targets: Tokens, space: str = "output") -> naive.Taps:
    """What `naive.head_maps` compares: targets of a layer with its image tokens, in one of the three spaces."""
    text, image = {
        "output": (targets.output, layer.image.output),
        "value": (targets.value, layer.image.value),
        "query_key": (targets.query, layer.image.key),
    }[space]
    return naive.Taps(layer.image.query, image, targets.key, text)


def pick(tokens: Tokens, rows: Sequence[Sequence[int]]) -> Tokens:
    """The tokens at the given positions, another list for every row of the batch."""
    return Tokens(*(torch.stack([tensor[row][:, list(at)] for row, at in enumerate(rows)]) for tensor in tokens))


def saliency(maps: Sequence[Sequence[torch.Tensor]], grid: tuple[int, int, int]) -> torch.Tensor:
    """Mean over steps and layers of maps `[R, C, N]`, as `[R, C, frame, height, width]`."""
    return torch.stack([of_layer for of_step in maps for of_layer in of_step]).mean(0).unflatten(2, grid)


def word_map(
    method: str,
    normalize: str,
    layer: Layer,
    words: Sequence[Sequence[Sequence[int]]],
    frames: int,
    rule: naive.HeadRule,
    space: str = "output",
) -> torch.Tensor:
    """Map of words of the prompt `[R, word, N]`; `words` are positions per row of the batch and word."""
    counts = [[len(at) for at in row] for row in words]
    flat = [[token for at in row for token in at] for row in words]
    columns = []
    for row in range(len(words)):  # one by one: words may have different numbers of tokens
        only = Layer(
            *(Tokens(*(tensor[row : row + 1] for tensor in kind)) for kind in (layer.image, layer.text, layer.text))
        )
        scores = naive.layer_map(
            method,
            "none" if normalize == "softmax" else normalize,
            taps(only, pick(only.text, [flat[row]]), space),
            frames,
            rule,
        )
        columns.append(torch.stack([part.mean(1) for part in scores.split(counts[row], 1)], 1))
    merged = torch.cat(columns)
    return merged.softmax(1) if normalize == "softmax" else merged


def official_scores(method: str, layer: Layer, targets: Tokens, frames: int) -> torch.Tensor:
    """Score of every head and row of the text axis `[R, H, T, N]`: nothing is scaled."""
    if method == "concept_attention":
        return torch.einsum("rhtd,rhnd->rhtn", targets.output, layer.image.output)
    logits = torch.einsum("rhtd,rhnd->rhtn", targets.key, layer.image.query)
    if method == "cross_attention":
        return logits
    logits = logits.unflatten(3, (frames, -1))  # [R, H, T, F, P]
    best, second = logits.topk(2, dim=-1).values.unbind(-1)
    assert (best - second).min() > NEAR_TIE * logits.abs().max(), "two anchors are nearly as good: choose another seed"
    feature = layer.image.output.unflatten(2, (frames, -1))  # [R, H, F, P, D]
    column = torch.stack(
        [feature[r, h, f, logits[r, h, :, f].argmax(-1)] for r, h, f in np.ndindex(feature.shape[:3])]
    )
    column = column.unflatten(0, feature.shape[:3])  # [R, H, F, T, D]
    scores = torch.einsum("rhftd,rhfpd->rhtfp", column, feature)
    deviation, mean = torch.std_mean(scores, 2, keepdim=True)
    spread = deviation[deviation > 1e-12 * scores.abs().max()]  # none where all rows have the same anchor
    assert spread.min() > 0.3 * NEAR_TIE * scores.abs().max(), "texts nearly agree at a token: choose another seed"
    return ((scores - mean) / (deviation + 1e-6)).flatten(3)


def official_layer(
    method: str, softmax: bool, layer: Layer, targets: Tokens, frames: int, rule: naive.HeadRule
) -> torch.Tensor:
    """Map of one layer and step with every row of the text axis `[R, T, N]`, by the rules of the official code."""
    chosen = rule(taps(layer, targets), frames)[:, :, None, None]
    joined = (official_scores(method, layer, targets, frames) * chosen).sum(1)
    if method in ("cross_attention", "imap"):
        joined = joined / chosen.sum(1)
    return joined.softmax(1) if softmax else joined


def official_saliency(
    steps: Sequence[Sequence[torch.Tensor]], keep: Sequence[Sequence[int]], grid: tuple[int, int, int], *, again: bool
) -> torch.Tensor:
    """Mean over layers, then over steps, of the rows that are kept; `again`: one more softmax in every step.

    Args:
        steps: maps `[R, T, N]` per step and layer.
        keep: positions on the text axis per row of the batch.
        grid: frames, height and width.
        again: softmax over the kept rows, or for a single one from its least to its greatest value in the clip.
    """
    total = []
    for layers in steps:
        mean = torch.stack(list(layers)).mean(0)
        mean = torch.stack([mean[row, list(at)] for row, at in enumerate(keep)])
        if again and mean.shape[1] == 1:
            low, high = mean.amin(2, keepdim=True), mean.amax(2, keepdim=True)
            mean = (mean - low) / (high - low)
        elif again:
            mean = mean.softmax(1)
        total.append(mean)
    return torch.stack(total).mean(0).unflatten(2, grid)


def assert_close(maps: torch.Tensor, expected: torch.Tensor, tolerance: float = 3e-5) -> None:
    """Equal to a fraction of the largest value."""
    assert maps.dtype == torch.float32
    assert maps.shape == expected.shape
    assert (maps - expected).abs().max() <= tolerance * expected.abs().max()
