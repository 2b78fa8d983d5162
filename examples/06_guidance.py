"""Guide a video toward frames that look at one another: the same noise without and with it, side by side.

One sees the pipeline's own video on the left and the guided one on the right. Guidance costs some of the layers once
more in every step.

python examples/06_guidance.py --out guidance
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from _models import load
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps.visualize.overlay import as_pictures, enlarge
from diffusers_concept_maps.visualize.video import write_video


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("guidance"), help="folder for the video")
    parser.add_argument("--model", help="a diffusers video pipeline; default: the embedded model")
    parser.add_argument("--layers", nargs="+", type=int, help="0-based; default: those known to be good for the model")
    parser.add_argument("--scale", type=float, default=1.0, help="of the guidance; 0 changes nothing")
    parser.add_argument("--prompt", default="a green triangle moving up on dark background")
    parser.add_argument("--steps", type=int, help="denoising steps")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    pipe, call = load(options.model, options.steps)
    call["guidance_scale"] = 1.0  # no classifier-free guidance, so that this one is seen alone
    clips = []
    for scale in (0.0, options.scale):
        with dcm.cross_attention_guidance(pipe, scale, layers=options.layers):
            frames = pipe(options.prompt, generator=torch.Generator().manual_seed(4), **call).frames[0]
        clips.append(enlarge(as_pictures(frames), 240))

    left, right = (np.stack([np.asarray(frame) for frame in clip]) for clip in clips)  # [frame, height, width, 3]
    both = [Image.fromarray(frame) for frame in np.concatenate([left, right], axis=2)]
    write_video(options.out / "without_and_with.mp4", both)
    print(f"pixels differ by {np.abs(left.astype(float) - right).mean():.1f} of 255 in the mean")
    print(f"without_and_with.mp4 written to {options.out}")


if __name__ == "__main__":
    main()
