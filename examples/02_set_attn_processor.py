"""An existing diffusers script with three lines added, each marked: its frames stay what they were.

python examples/02_set_attn_processor.py --out processors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline

import diffusers_concept_maps as dcm  # added: line 1

EMBEDDED = Path(dcm.__file__).parent / "shapes" / "pipeline"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("processors"), help="folder for frames and maps")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    pipe = CogVideoXPipeline.from_pretrained(EMBEDDED, dtype=torch.float32)
    pipe.transformer.set_attn_processor(dcm.concept_attn_processors(pipe.transformer))  # added: line 2
    with dcm.trace(pipe, concepts=["green", "yellow"]) as maps:  # added: line 3
        frames = pipe(
            "a green triangle moving up and a yellow circle moving left on dark background",
            num_inference_steps=options.steps,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(2),
            max_sequence_length=20,
        ).frames[0]

    for index, frame in enumerate(frames):
        frame.save(options.out / f"frame_{index}.png")
    maps.save(options.out / "maps.safetensors")
    print(f"{len(frames)} frames and the maps of {', '.join(maps.concepts)} written to {options.out}")


if __name__ == "__main__":
    main()
