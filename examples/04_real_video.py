"""Concepts in a video that no model made, and a score for how well they are found.

The clip is drawn here, so that the mask of every object in it is known, and written as an MP4 file. The model sees it
once at each of two noise levels; nothing is generated. One sees the overlay of each concept on the frames of the file.

python examples/04_real_video.py --out real_video
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from _models import load

import diffusers_concept_maps as dcm
from diffusers_concept_maps.evaluation import segmentation
from diffusers_concept_maps.shapes.captions import full_captions
from diffusers_concept_maps.shapes.scenes import COLORS, sample_scenes
from diffusers_concept_maps.visualize.overlay import as_pictures, enlarge
from diffusers_concept_maps.visualize.video import write_video

PIXELS = 8  # of the file for each one of the drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("real_video"), help="folder for the clip and the overlays")
    parser.add_argument("--model", help="a diffusers pipeline with joint attention; default: the embedded model")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    scenes = sample_scenes(1, np.random.default_rng(5), objects=2)
    caption, (first, second) = full_captions(scenes)[0], [list(COLORS)[index] for index in scenes.color[0]]
    drawing = as_pictures(scenes.video[0].add(1).div(2).clamp(0, 1))
    clip = options.out / "clip.mp4"
    write_video(clip, enlarge(drawing, PIXELS * drawing[0].width))

    pipe, _ = load(options.model)
    maps = dcm.encode(pipe, clip, [first, second, "background"], prompt=caption, noise_level=(0.5, 0.6))
    print(caption, "|", maps.fit.describe())

    objects = scenes.masks[0] > 0.5  # [object, frame, height, width]
    labels = (objects[0] + 2 * objects[1].long()).repeat_interleave(PIXELS, 1).repeat_interleave(PIXELS, 2)
    scores = maps.upsample()[0]  # [concept, frame, height, width] in the pixels of the file
    record = segmentation.score_sample(scores, labels, concept_labels=[1, 2, 0], classes=3, rule="argmax")
    summary = segmentation.summarize([record])
    for name, iou in zip(["background", first, second], summary["dataset_iou"], strict=True):
        print(f"IoU of {name}: {iou:.2f}")
    print(f"pixel accuracy: {summary['dataset_pixel_accuracy']:.2f}")

    for concept in maps.concepts:
        maps[concept].to_video(options.out / f"{concept}.mp4", clip)
    maps.save(options.out / "maps.safetensors")
    print(f"the clip, an overlay for each concept and maps.safetensors written to {options.out}")


if __name__ == "__main__":
    main()
