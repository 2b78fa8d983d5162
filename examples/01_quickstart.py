"""Trace one call of a pipeline and look at the maps. Runs on the embedded model in a few seconds.

python examples/01_quickstart.py --out quickstart
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import diffusers_concept_maps as dcm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder for the overlays and the maps")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    pipe = dcm.load_shapes_pipeline()
    with dcm.trace(pipe, concepts=["red", "blue", "background"], methods=["concept_attention", "imap"]) as maps:
        frames = pipe(
            "a red circle moving right and a blue square moving right on dark background",
            num_inference_steps=options.steps,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(2),
            max_sequence_length=20,  # the embedded model's position table is for 20 text tokens
        ).frames[0]

    for method in maps.methods:
        print(method, tuple(maps.get(method).shape), "[batch, concept, frame, height, width]")
    large = [frame.resize((320, 320), resample=0) for frame in frames]
    for concept in maps.concepts:
        maps[concept].to_video(options.out / f"{concept}.mp4", large)
    maps.save(options.out / "maps.safetensors")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
