"""What each word of a Wan prompt looks at, layer by layer and step by step, as footage (after arXiv 2509.05323).

One sees, in a folder for each word, a sequence of 16-bit pictures for every layer and step; for each word a video
whose frames are the denoising steps, in which its attention sharpens; and all words by all layers on one page. The
manifest of a folder says which file is what, and how its pixels become scores again. The attention of all layers and
steps goes to a file while the pipeline runs and is read from there piece by piece: memory does not grow with them.

Without `--model` a tiny Wan of random weights runs, whose words look at nothing in particular.

python examples/08_art_export_wan.py --out attention
python examples/08_art_export_wan.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a dog running on the beach"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _models import load, tiny_wan

import diffusers_concept_maps as dcm
from diffusers_concept_maps.visualize.export import ExportSettings, export
from diffusers_concept_maps.visualize.overlay import as_pictures
from diffusers_concept_maps.visualize.video import write_video


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("attention"), help="folder for the footage, a new one")
    parser.add_argument("--model", help="a Wan pipeline; default: a tiny one of random weights")
    parser.add_argument("--prompt", default="a dog running on the beach")
    parser.add_argument("--steps", type=int, help="denoising steps")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    pipe, call = load(options.model) if options.model else tiny_wan(options.prompt)
    if options.steps:
        call["num_inference_steps"] = options.steps
    attention = options.out / "attention.safetensors"
    kept = {"detail": ("layer", "step"), "detail_path": attention, "normalize": "none"}
    with dcm.trace(pipe, target="prompt", methods=["cross_attention"], **kept) as maps:
        frames = pipe(options.prompt, generator=torch.Generator().manual_seed(0), **call).frames[0]
    pictures = as_pictures(frames)
    write_video(options.out / "video.mp4", pictures)

    video = (len(pictures), pictures[0].height, pictures[0].width)
    footage = {
        "sequences": ExportSettings(per=("layer", "step"), video=video),  # 16-bit PNG, a pixel for each token
        "videos": ExportSettings(
            products=("sharpening", "grid"),
            columns="layer",
            file_format="h264",
            look="color",
            size="video",
            video=video,
        ),
    }
    for name, settings in footage.items():
        export(attention, options.out / name, settings, summary=maps)
    print(f"attention of {', '.join(maps.concepts)}: {', '.join(footage)} and video.mp4 written to {options.out}")


if __name__ == "__main__":
    main()
