"""Make the figures of the documentation and the README from the embedded model: `python docs/make_figures.py`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

import diffusers_concept_maps as dcm
from diffusers_concept_maps import cli
from diffusers_concept_maps.commands import generate
from diffusers_concept_maps.shapes.captions import TEXT_LENGTH
from diffusers_concept_maps.shapes.model import GUIDANCE_SCALE, STEPS
from diffusers_concept_maps.visualize.figure import contact_sheet
from diffusers_concept_maps.visualize.video import write_image

IMAGES = Path(__file__).parent / "images"
METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")


def main() -> None:
    """The commands' own contact sheets, and one sheet for each method from a run with the same prompt and seed."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cli.main(["generate", "--out", name])
        shutil.copyfile(folder / "contact_sheet.png", IMAGES / "contact_sheet.png")
        options = ["--concepts", *generate.DEFAULT_CONCEPTS, "--prompt", generate.DEFAULT_PROMPT]
        cli.main(["encode", str(folder / "video.mp4"), *options, "--out", str(folder / "encoded")])
        shutil.copyfile(folder / "encoded" / "contact_sheet.png", IMAGES / "encode.png")
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


if __name__ == "__main__":
    main()
