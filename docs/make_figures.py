"""Make the figures of the documentation and the README from the embedded model: `python docs/make_figures.py`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps import cli
from diffusers_concept_maps.commands import generate
from diffusers_concept_maps.shapes.captions import TEXT_LENGTH
from diffusers_concept_maps.shapes.model import GUIDANCE_SCALE, STEPS
from diffusers_concept_maps.shapes.suite.frozen import EVALUATION_SEED
from diffusers_concept_maps.shapes.suite.tracking import tracked_clips
from diffusers_concept_maps.visualize.figure import contact_sheet
from diffusers_concept_maps.visualize.frames import as_pictures
from diffusers_concept_maps.visualize.overlay import enlarge
from diffusers_concept_maps.visualize.trails import draw_tracks
from diffusers_concept_maps.visualize.video import write_image

IMAGES = Path(__file__).parent / "images"
SCENE = 0  # of those of the evaluation seed
TRACKED = 8  # pixels of the picture for one of the clip
METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")


def tracked_scene() -> Image.Image:
    """The frames of a scene of the evaluation seed beside one another, with points of its first frame and trails."""
    clip = tracked_clips(SCENE + 1, EVALUATION_SEED)[SCENE]
    color = clip.frames[0].float()
    y, x = ((color.amax(0) - color.amin(0)) > 120)[::3, ::3].nonzero().mul(3).unbind(1)  # on the objects
    points = torch.stack([torch.zeros(len(x)), x, y], dim=1)
    out = dcm.track(dcm.load_shapes_pipeline(), clip.frames, points)
    pictures = enlarge(as_pictures(clip.frames), TRACKED * clip.frames.shape[3])
    shown = draw_tracks(pictures, (out.tracks + 0.5) * TRACKED - 0.5, out.visibility, radius=4)
    width, height = shown[0].size
    row = Image.new("RGB", (len(shown) * (width + TRACKED) - TRACKED, height), "white")
    for index, picture in enumerate(shown):
        row.paste(picture, (index * (width + TRACKED), 0))
    return row


def main() -> None:
    """The commands' own contact sheets, one for each method from a run with the same prompt and seed, and tracks."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cli.main(["generate", "--out", name])
        shutil.copyfile(folder / "contact_sheet.png", IMAGES / "contact_sheet.png")
        options = ["--concepts", *generate.DEFAULT_CONCEPTS, "--prompt", generate.DEFAULT_PROMPT]
        cli.main(["encode", str(folder / "video.mp4"), *options, "--out", str(folder / "encoded")])
        shutil.copyfile(folder / "encoded" / "contact_sheet.png", IMAGES / "encode.png")
        write_image(IMAGES / "overlay.png", overlays(folder))
        cli.main(["export", "--make", "grid", "--most-columns", "8", "--out", str(folder / "export")])
        with Image.open(folder / "export" / "words" / "grid_step" / "00003.png") as page:
            write_image(IMAGES / "export.png", page.quantize())
    pipe = dcm.load_shapes_pipeline()
    with dcm.trace(pipe, generate.DEFAULT_CONCEPTS, methods=METHODS) as maps:
        frames = pipe(
            generate.DEFAULT_PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator().manual_seed(generate.DEFAULT_SEED),
            max_sequence_length=TEXT_LENGTH,
        ).frames[0]
    for method in METHODS:
        title = f"{generate.DEFAULT_PROMPT}  [{method}]"
        sheet = contact_sheet(frames, maps.get(method)[0], generate.DEFAULT_CONCEPTS, title=title)
        write_image(IMAGES / f"{method}.png", sheet)
    write_image(IMAGES / "tracking.png", tracked_scene())


def overlays(folder: Path) -> Image.Image:
    """Frames of the command's video with a map and a legend, side by side."""
    frames = as_pictures(folder / "video.mp4")
    shown = dcm.load(folder / "maps.safetensors")["red"].overlay(frames, colormap="viridis", legend=True)
    chosen = [shown[index].resize((240, 240)) for index in np.linspace(0, len(shown) - 1, 4).round().astype(int)]
    cells = [np.pad(picture, ((0, 0), (0, 6), (0, 0)), constant_values=255) for picture in chosen]
    return Image.fromarray(np.concatenate(cells, 1))


if __name__ == "__main__":
    main()
