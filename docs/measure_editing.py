"""How far edits of the attention move what the embedded model draws: the table of docs/editing.md.

    python docs/measure_editing.py [--clips 64]

Every row is one edit of the same clips, seed by seed. Pixels are told apart by the palette of the scenes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import diffusers_concept_maps as dcm
from diffusers_concept_maps import AttentionEdit
from diffusers_concept_maps.shapes.captions import TEXT_LENGTH
from diffusers_concept_maps.shapes.judge import segment
from diffusers_concept_maps.shapes.scenes import COLORS, HEIGHT, WIDTH

ONE = "a red circle standing still on dark background"
TWO = "a red circle standing still and a blue square standing still on dark background"
RED, BLUE = (list(COLORS).index(color) for color in ("red", "blue"))
BATCH = 16
LEFT = (torch.arange(WIDTH) < WIDTH // 2).expand(HEIGHT, WIDTH)
EDITS: dict[str, tuple[str, list[AttentionEdit]]] = {
    "one: none": (ONE, []),
    "one: red x 0, left": (ONE, [AttentionEdit("red", scale=0.0, mask=LEFT)]),
    "one: red x 8, left": (ONE, [AttentionEdit("red", scale=8.0, mask=LEFT)]),
    "one: red circle x 0, left": (ONE, [AttentionEdit("red circle", scale=0.0, mask=LEFT)]),
    "one: red circle x 8, left": (ONE, [AttentionEdit("red circle", scale=8.0, mask=LEFT)]),
    "one: red x 0, everywhere": (ONE, [AttentionEdit("red", scale=0.0)]),
    "two: none": (TWO, []),
    "two: colors x 8 and x 0, red left": (
        TWO,
        [
            *(AttentionEdit("red", scale=scale, mask=mask) for scale, mask in ((8.0, LEFT), (0.0, ~LEFT))),
            *(AttentionEdit("blue", scale=scale, mask=mask) for scale, mask in ((0.0, LEFT), (8.0, ~LEFT))),
        ],
    ),
    "two: objects x 8 and x 0, red left": (
        TWO,
        [
            *(AttentionEdit("red circle", scale=scale, mask=mask) for scale, mask in ((8.0, LEFT), (0.0, ~LEFT))),
            *(AttentionEdit("blue square", scale=scale, mask=mask) for scale, mask in ((0.0, LEFT), (8.0, ~LEFT))),
        ],
    ),
    "two: red mirrored": (TWO, [AttentionEdit("red", transform=lambda share: share.flip(-1))]),
}


def clips_of(pipe: dcm.backbones.Backbone, prompt: str, edits: list[AttentionEdit], clips: int) -> torch.Tensor:
    """`[clip, frame, 3, height, width]` in 0..1, clip `i` from the noise of seed `i`."""
    made = []
    for start in range(0, clips, BATCH):
        seeds = [torch.Generator().manual_seed(seed) for seed in range(start, min(start + BATCH, clips))]
        with dcm.edit_attention(pipe, edits):
            call = {"max_sequence_length": TEXT_LENGTH, "output_type": "pt", "num_inference_steps": 20}
            made.append(pipe([prompt] * len(seeds), generator=seeds, guidance_scale=4.0, **call).frames)
    return torch.cat(made)


def interval(values: torch.Tensor, draws: int = 10_000) -> tuple[float, float, float]:
    """Mean of `[clip]` and its 95% bootstrap interval."""
    generator = torch.Generator().manual_seed(0)
    means = values[torch.randint(len(values), (draws, len(values)), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return values.mean().item(), low, high


MEASURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "red, left": lambda labels: (labels == RED)[..., : WIDTH // 2].sum((2, 3)).double().mean(1),
    "red, right": lambda labels: (labels == RED)[..., WIDTH // 2 :].sum((2, 3)).double().mean(1),
    "blue, left": lambda labels: (labels == BLUE)[..., : WIDTH // 2].sum((2, 3)).double().mean(1),
    "blue, right": lambda labels: (labels == BLUE)[..., WIDTH // 2 :].sum((2, 3)).double().mean(1),
}


def main() -> None:
    """Print a line for every edit: pixels per frame, and the difference to the same clips without it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=64)
    clips = parser.parse_args().clips
    pipe = dcm.load_shapes_pipeline()
    pipe.set_progress_bar_config(disable=True)
    stock: dict[str, torch.Tensor] = {}
    for name, (prompt, edits) in EDITS.items():
        labels = segment(clips_of(pipe, prompt, edits, clips))
        for measure, count in MEASURES.items():
            pixels = count(labels)
            if not edits:
                stock[prompt + measure] = pixels
            mean, low, high = interval(pixels)
            change, least, most = interval(pixels - stock[prompt + measure])
            difference = f"{change:+.1f} [{least:+.1f}, {most:+.1f}]" if edits else ""
            print(f"| {name} | {measure} | {mean:.1f} [{low:.1f}, {high:.1f}] | {difference} |", flush=True)


if __name__ == "__main__":
    main()
