"""How far edits of the attention move what the embedded model draws: table and picture of docs/editing.md.

    python docs/measure_editing.py [--clips 48]
    python docs/measure_editing.py --picture docs/images/editing.png

Every row is one edit of the same clips, seed by seed. Pixels are told apart by the palette of the scenes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional

import diffusers_concept_maps as dcm
from diffusers_concept_maps import AttentionEdit
from diffusers_concept_maps.shapes.captions import TEXT_LENGTH
from diffusers_concept_maps.shapes.judge import segment
from diffusers_concept_maps.shapes.scenes import COLORS, HEIGHT, WIDTH

ONE = "a red circle standing still on dark background"
TWO = "a red circle standing still and a blue square standing still on dark background"
RED, BLUE = (list(COLORS).index(color) for color in ("red", "blue"))
BATCH, DRAWS = 16, 10_000
LEFT = (torch.arange(WIDTH) < WIDTH // 2).expand(HEIGHT, WIDTH)


def side(words: str, left: float, right: float) -> list[AttentionEdit]:
    """Words whose probabilities are multiplied by one number in the left half, and by another in the right one."""
    return [AttentionEdit(words, scale=scale, mask=mask) for scale, mask in ((left, LEFT), (right, ~LEFT))]


EDITS: dict[str, tuple[str, list[AttentionEdit]]] = {
    "one object, no edit": (ONE, []),
    "`red` x 0 on the left": (ONE, side("red", 0.0, 1.0)),
    "`red` x 8 on the left": (ONE, side("red", 8.0, 1.0)),
    "`red circle` x 0 on the left": (ONE, side("red circle", 0.0, 1.0)),
    "`red circle` x 8 on the left": (ONE, side("red circle", 8.0, 1.0)),
    "two objects, no edit": (TWO, []),
    "`red` left, `blue` right": (TWO, side("red", 8.0, 0.0) + side("blue", 0.0, 8.0)),
    "`red circle` left, `blue square` right": (TWO, side("red circle", 8.0, 0.0) + side("blue square", 0.0, 8.0)),
}
SHOWN = ("`red` left, `blue` right", "`red circle` left, `blue square` right")


def clips_of(pipe: Any, prompt: str, edits: list[AttentionEdit], clips: int) -> torch.Tensor:
    """`[clip, frame, 3, height, width]` in 0..1, clip `i` from the noise of seed `i`."""
    made = []
    for start in range(0, clips, BATCH):
        seeds = [torch.Generator().manual_seed(seed) for seed in range(start, min(start + BATCH, clips))]
        with dcm.edit_attention(pipe, edits):
            call = {"max_sequence_length": TEXT_LENGTH, "output_type": "pt", "num_inference_steps": 20}
            made.append(pipe([prompt] * len(seeds), generator=seeds, guidance_scale=4.0, **call).frames)
    return torch.cat(made)


def counts(clips: torch.Tensor) -> torch.Tensor:
    """Red and blue pixels per frame, left and right of the middle, float64 `[clip, color, side]`."""
    labels = segment(clips)
    halves = torch.stack([labels == RED, labels == BLUE], 1).unflatten(-1, (2, WIDTH // 2))
    return halves.sum((3, 5)).double().mean(2)


def share_left(pixels: torch.Tensor, color: int) -> torch.Tensor:
    """The share of a color's pixels that is on the left, in percent, over the clips `[..., clip, color, side]`."""
    left, right = pixels[..., color, :].sum(-2).unbind(-1)
    return 100 * left / (left + right)


def bounds(values: torch.Tensor) -> str:
    """The middle 95% of draws."""
    low, high = values.nanquantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return f"{low:.0f} to {high:.0f}"


def draw(pipe: Any, path: Path) -> None:
    """The middle frames of eight clips, and below each the same with some edit of two objects."""
    rows = []
    for name in ("two objects, no edit", *SHOWN):
        frames = clips_of(pipe, *EDITS[name], 8)[:, 3]
        rows.append(torch.cat(list(functional.pad(frames, (1, 1, 1, 1), value=1)), dim=2))
    pixels = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().to(torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    picture.resize((3 * picture.width, 3 * picture.height), Image.Resampling.NEAREST).save(path, optimize=True)


def main() -> None:
    """Print a line for every edit; intervals are bootstraps over clips, differences of the same clips."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--picture", type=Path, help="draw it instead of the table")
    options = parser.parse_args()
    pipe, clips = dcm.load_shapes_pipeline(), options.clips
    pipe.set_progress_bar_config(disable=True)
    if options.picture is not None:
        draw(pipe, options.picture)
        return
    draws = torch.randint(clips, (DRAWS, clips), generator=torch.Generator().manual_seed(0))
    stock: dict[str, torch.Tensor] = {}
    print("| edit | color | on the left, % | change, points | pixels per frame |\n|---|---|---|---|---|")
    for name, (prompt, edits) in EDITS.items():
        pixels = counts(clips_of(pipe, prompt, edits, clips))
        before = stock.setdefault(prompt, pixels)
        for color, word in enumerate(("red", "blue")[: 1 if prompt == ONE else 2]):
            share, old = (share_left(what[draws], color) for what in (pixels, before))
            mean, change = share_left(pixels, color), share_left(pixels, color) - share_left(before, color)
            moved = f"{change:+.0f} ({bounds(share - old)})" if edits else ""
            size = pixels[:, color].sum(-1).mean()
            print(f"| {name} | {word} | {mean:.0f} ({bounds(share)}) | {moved} | {size:.0f} |", flush=True)


if __name__ == "__main__":
    main()
