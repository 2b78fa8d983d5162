"""Which layer, at which step, with which head? Two tables to plot, every cell of them scored against the truth.

sweep.csv scores single heads on clips whose masks are known: how well the map of a color word ranks the tokens of
its object (average precision). Its steps are the noise levels at which the model sees a clip. correspondence.csv
scores the steps of a generation: which layer knows where points go, by the share of its matches that are within a
token of where `track` finds the points in the finished video.

python examples/07_research_sweep.py --out sweep
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _models import load

import diffusers_concept_maps as dcm
from diffusers_concept_maps.correspondence.scores import matching_accuracy
from diffusers_concept_maps.evaluation.ranking import average_precision
from diffusers_concept_maps.shapes.captions import full_captions
from diffusers_concept_maps.shapes.scenes import COLORS, FRAMES, HEIGHT, WIDTH, sample_scenes

TOKEN = 4  # pixels of a token of the embedded model, whose token frames are the frames of its videos
LEVELS = (0.4, 0.6, 0.8)
PROMPT = "a red circle moving right and a blue square moving right on dark background"


def score_maps(pipe: Any, clips: int) -> np.ndarray:
    """Mean average precision `[layer, step, head]` of color words; of `encode`, every noise level is a step."""
    scenes = sample_scenes(clips, np.random.default_rng(1), objects=2)
    found, layers = [], range(len(pipe.transformer.transformer_blocks))
    for index, caption in enumerate(full_captions(scenes)):
        words = [list(COLORS)[color] for color in scenes.color[index]]
        clip = scenes.video[index].add(1).div(2).clamp(0, 1)
        kept = {"detail": ("layer", "step", "head"), "layers": layers, "normalize": "none"}
        maps = dcm.encode(pipe, clip, [words[0], "background"], prompt=caption, noise_level=LEVELS, **kept)
        covered = torch.nn.functional.avg_pool2d(scenes.masks[index, 0], TOKEN) > 0.5  # [frame, height, width]
        detail = maps.detail()[:, :, :, 0, 0]  # [layer, step, head, frame, height, width] of the color
        cells = [float(average_precision(cell, covered.flatten())) for cell in detail.flatten(3).flatten(0, 2)]
        found.append(np.reshape(cells, detail.shape[:3]))
    return np.mean(found, axis=0)


def score_matches(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    """Percentage `[layer, step]` of right matches."""
    points = [(0, x, y) for x in range(TOKEN // 2, WIDTH, TOKEN) for y in range(TOKEN // 2, HEIGHT, TOKEN)]
    with dcm.trace_correspondence(pipe, points, size=(HEIGHT, WIDTH), num_frames=FRAMES) as found:
        frames = pipe(PROMPT, generator=torch.Generator().manual_seed(2), **call).frames[0]
    true = dcm.track(pipe, frames, points, layers=3, noise_level=0.2)

    def score(layer: int, step: int) -> float:
        places = found.cell(step, layer).matches.positions[0]  # [point, frame, 2]
        return matching_accuracy(places, true.tracks, true.visibility, threshold=TOKEN)

    return np.array([[score(layer, step) for step in found.steps] for layer in found.layers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sweep"), help="folder for the tables")
    parser.add_argument("--clips", type=int, default=4, help="drawn clips to score the maps on")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of the generation")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    pipe, call = load(None, options.steps)
    write(options.out / "sweep.csv", ("layer", "step", "head", "average_precision"), score_maps(pipe, options.clips))
    write(options.out / "correspondence.csv", ("layer", "step", "accuracy_percent"), score_matches(pipe, call))
    print(f"sweep.csv and correspondence.csv written to {options.out}")


def write(path: Path, columns: tuple[str, ...], table: np.ndarray) -> None:
    """A row for each cell, and the best one on the screen."""
    rows = [(*place, round(score, 4)) for place, score in np.ndenumerate(table)]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    print("best of", path.name, dict(zip(columns, max(rows, key=lambda row: row[-1]), strict=True)))


if __name__ == "__main__":
    main()
