"""Follow points through a video by the attention of a model that was never trained to.

The clip is drawn here, so that where every point goes is known. One sees the points with their trails: discs where a
point is taken for visible, rings where it is not.

python examples/05_tracking.py --out tracks
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _models import load

import diffusers_concept_maps as dcm
from diffusers_concept_maps.shapes.suite.tracking import tracked_clips
from diffusers_concept_maps.visualize.overlay import as_pictures, enlarge
from diffusers_concept_maps.visualize.video import write_video

PIXELS = 8  # of the file for each one of the drawing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tracks"), help="folder for the tracks and the videos")
    parser.add_argument("--model", help="a diffusers video pipeline; default: the embedded model")
    parser.add_argument("--layer", type=int, default=3, help="whose attention to follow, from 0; default: %(default)s")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    [drawn] = tracked_clips(1, seed=5)
    drawing = as_pictures(drawn.frames)
    clip = options.out / "clip.mp4"
    write_video(clip, enlarge(drawing, PIXELS * drawing[0].width))
    points = drawn.points.clone()  # [point, 3]: frame, x and y by the centers of pixels
    points[:, 1:] = (points[:, 1:] + 0.5) * PIXELS - 0.5
    true = (drawn.tracks + 0.5) * PIXELS - 0.5

    pipe, _ = load(options.model)
    out = dcm.track(pipe, clip, points, layers=options.layer, noise_level=0.2)

    seen = drawn.visibility
    distance = (out.tracks - true).norm(dim=-1)  # [point, frame]
    for kind in dict.fromkeys(drawn.kinds):
        of_kind = [index for index, other in enumerate(drawn.kinds) if other == kind]
        off = distance[of_kind][seen[of_kind]].median()
        print(f"{kind}: {len(of_kind)} points, {off:.1f} pixels from where they are, in the median")
    print(f"visibility as it is: {float((out.visibility == seen).float().mean()):.0%}")

    out.to_video(options.out / "tracks.mp4", clip)
    out.save(options.out / "tracks.npz")
    print(f"clip.mp4, tracks.mp4 and tracks.npz written to {options.out}")


if __name__ == "__main__":
    main()
