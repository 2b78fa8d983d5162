"""Cut what is generated into concepts: every token takes the concept that scores highest there.

One sees a video with its parts colored (segmentation.mp4), and has masks to work with: one PNG for each frame, whose
pixels are the number of the concept and whose palette is that of the video.

python examples/03_masks_from_a_generation.py --out masks
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _models import load
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps.upsample import upsample_map
from diffusers_concept_maps.visualize.overlay import as_pictures, enlarge
from diffusers_concept_maps.visualize.video import write_video

PALETTE = bytes.fromhex("D55E000072B2F0E442009E73CC79A756B4E9E69F00999999")  # told apart by color-blind eyes, too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("masks"), help="folder for the masks and the video")
    parser.add_argument("--model", help="a diffusers video pipeline with joint attention; default: the embedded model")
    parser.add_argument(
        "--prompt", default="a red circle moving right and a blue square moving right on dark background"
    )
    parser.add_argument("--concepts", nargs="+", default=["red", "blue", "background"])
    parser.add_argument("--steps", type=int, help="denoising steps")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    pipe, call = load(options.model, options.steps)
    with dcm.trace(pipe, options.concepts) as maps:
        frames = pipe(options.prompt, generator=torch.Generator().manual_seed(2), **call).frames[0]

    labels = maps.segment()[0]  # [frame, height, width] in tokens: indices into maps.concepts
    width, height = frames[0].size
    labels = upsample_map(labels, (height, width), len(frames), mode="nearest", **maps.geometry)

    masks = [Image.fromarray(label.byte().numpy()) for label in labels]
    for index, mask in enumerate(masks):
        mask.putpalette(PALETTE)
        mask.save(options.out / f"mask_{index:03}.png")
    shown = [
        Image.blend(frame, mask.convert("RGB"), 0.5) for frame, mask in zip(as_pictures(frames), masks, strict=True)
    ]
    write_video(options.out / "segmentation.mp4", enlarge(shown, 320))
    maps.save(options.out / "maps.safetensors")
    for index, concept in enumerate(maps.concepts):
        print(f"{concept}: pixels of value {index} in the masks, {float((labels == index).float().mean()):.0%} of all")
    print(f"{len(masks)} masks, segmentation.mp4 and maps.safetensors written to {options.out}")


if __name__ == "__main__":
    main()
