"""A page in the browser: generate a video, look at where and when each concept is in it, and take the maps with you.

python examples/app.py
python examples/app.py --model THUDM/CogVideoX-2b

It needs `pip install gradio`, and is served to this machine alone. Users take turns with the pipeline; what was made
for one of them is seen by nobody else, and deleted an hour after the page was left.
"""

from __future__ import annotations

import argparse
import functools
import html
import inspect
import re
import tempfile
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _models import load
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones import JointBackbone, find_backbone
from diffusers_concept_maps.methods import find_method, method_names
from diffusers_concept_maps.upsample import spread_frames, upsample_map
from diffusers_concept_maps.visualize import require
from diffusers_concept_maps.visualize.fonts import legible
from diffusers_concept_maps.visualize.overlay import as_pictures, enlarge
from diffusers_concept_maps.visualize.video import write_video

COLORS = ("#D55E00", "#0072B2", "#F0E442", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999")
"""Of the concepts, in the segmentation and on the timeline; told apart by color-blind eyes, too."""

MOST_STEPS, WIDTH = 100, 320
HEADERS = ["concept", "color", "lowest score", "mean", "highest", "peak frame"]


@dataclass(frozen=True)
class Look:
    """What one generation has made, for one user.

    Attributes:
        frames: the video, as large as it is shown.
        maps: of the concepts that were asked for, by one method.
        folder: of the files that are made from them.
    """

    frames: list[Image.Image]
    maps: dcm.ConceptMaps
    folder: tempfile.TemporaryDirectory[str]

    def path(self, name: str) -> Path:
        """A file of this look."""
        return Path(self.folder.name, name)

    def discard(self) -> None:
        """Delete the files."""
        self.folder.cleanup()


class Studio:
    """The pipeline, which one user has at a time.

    Attributes:
        steps: denoising steps unless other ones are asked for.
        methods: that the pipeline's transformer has, the usual one first.
    """

    def __init__(self, model: str | None = None) -> None:
        """Load the pipeline; None is the embedded one."""
        self._pipe, self._call = load(model)
        default = inspect.signature(self._pipe.__call__).parameters["num_inference_steps"].default
        self.steps = self._call.get("num_inference_steps", default)
        self.methods = methods_of(self._pipe.transformer)
        self._turn = threading.Lock()

    def generate(self, prompt: str, concepts: str, method: str, seed: float, steps: float) -> Look:
        """A video and the maps of concepts in it.

        Args:
            prompt: what to generate.
            concepts: words or phrases, with commas between them.
            method: one of `methods`.
            seed: of the noise.
            steps: of denoising.

        Raises:
            ConceptMapsError: something of this cannot be used.
        """
        words = names(concepts)
        call = self._call | {"num_inference_steps": whole(steps, "the number of steps", 1, MOST_STEPS)}
        noise = torch.Generator().manual_seed(whole(seed, "the seed", 0, 2**53))
        with self._turn, dcm.trace(self._pipe, words, methods=[method]) as traced:
            output = self._pipe(prompt, generator=noise, **call)
        folder = tempfile.TemporaryDirectory(prefix="concept-maps-")
        file = Path(folder.name, "maps.safetensors")
        traced.save(file)
        frames = as_pictures(output.frames[0] if hasattr(output, "frames") else output.images[:1])
        return Look(enlarge(frames, WIDTH), dcm.load(file), folder)


def methods_of(transformer: Any) -> list[str]:
    """Without those that look at what text reads, where it reads nothing (Wan and the like)."""
    joint = isinstance(find_backbone(transformer), JointBackbone)
    return [name for name in method_names() if joint or not find_method(name).reading]


def names(text: str) -> list[str]:
    """The concepts of a text with commas or line breaks between them, each of them once.

    Raises:
        ConceptMapsValueError: there is none, or there are more than colors.
    """
    found = list(dict.fromkeys(word.strip() for word in re.split(r"[,\n]", text) if word.strip()))
    if not 1 <= len(found) <= len(COLORS):
        raise dcm.ConceptMapsValueError(
            f"{len(found)} concepts; expected 1 to {len(COLORS)}, such as: red, blue, background"
        )
    return found


def whole(value: float, name: str, low: int, high: int) -> int:
    """A number that a form has sent.

    Raises:
        ConceptMapsValueError: it is not a whole number from `low` to `high`.
    """
    if not isinstance(value, int | float) or value != value // 1 or not low <= value <= high:
        raise dcm.ConceptMapsValueError(f"{name} is {value}; expected a whole number from {low} to {high}")
    return int(value)


def video(look: Look) -> str:
    """The video as a file."""
    path = look.path("video.mp4")
    write_video(path, look.frames)
    return str(path)


def overlay(look: Look, concept: str, opacity: float) -> str:
    """The map of a concept over the video, as a file."""
    pictures = look.maps[concept].overlay(look.frames, opacity=opacity)
    path = look.path(f"overlay_{look.maps.concepts.index(concept)}_{opacity:.2f}.mp4")
    write_video(path, pictures)
    return str(path)


def segmentation(look: Look) -> str | None:
    """The video colored by the concept that scores highest, as a file; None where there is one concept alone."""
    if len(look.maps.concepts) < 2:
        return None
    width, height = look.frames[0].size
    labels = look.maps.segment()[0]
    labels = upsample_map(labels, (height, width), len(look.frames), mode="nearest", **look.maps.geometry)
    table = np.array([list(bytes.fromhex(color[1:])) for color in COLORS], np.uint8)
    colored = (Image.fromarray(picture) for picture in table[labels.numpy()])
    path = look.path("segmentation.mp4")
    write_video(path, [Image.blend(frame, mask, 0.5) for frame, mask in zip(look.frames, colored, strict=True)])
    return str(path)


def timeline(look: Look) -> Any:
    """When each concept is there: a matplotlib figure of its mean score in every frame."""
    curves = spread_frames(look.maps.get()[0], len(look.frames), **look.maps.geometry).mean((2, 3))
    labels, fonts = legible([textwrap.shorten(concept, 40) for concept in look.maps.concepts])
    figure = require("matplotlib.figure").Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.add_subplot(xlabel="frame", ylabel="mean score")
    lines = [axes.plot(curve, color=color, marker=".")[0] for curve, color in zip(curves, COLORS, strict=False)]
    legend = axes.legend(lines, labels, loc="center left", bbox_to_anchor=(1, 0.5))
    for text in legend.get_texts():
        text.set(fontfamily=fonts, parse_math=False)
    return figure


def scores(look: Look) -> list[list[str]]:
    """The rows of a table below `HEADERS`."""
    rows = []
    for concept, of_concept, color in zip(look.maps.concepts, look.maps.get()[0], COLORS, strict=False):
        curve = spread_frames(of_concept, len(look.frames), **look.maps.geometry).mean((1, 2))
        numbers = (f"{float(value):.4g}" for value in (of_concept.min(), of_concept.mean(), of_concept.max()))
        rows.append([concept, color, *numbers, str(int(curve.argmax()))])
    return rows


def export(look: Look, concept: str, opacity: float) -> list[str]:
    """Files to take away: the maps, the overlay that is looked at, and the page that shows them."""
    report = look.path("report.html")
    look.maps.report(report, frames=look.frames)
    return [str(look.path("maps.safetensors")), overlay(look, concept, opacity), str(report)]


def page(studio: Studio) -> Any:
    """The page, a `gradio.Blocks`; nothing of a user is kept but in the state of that user's session."""
    gr = require_gradio()
    told = functools.partial(tell, functools.partial(gr.Error, print_exception=False))

    @told
    def generate(prompt: str, concepts: str, method: str, seed: float, steps: float, opacity: float) -> list[Any]:
        look = studio.generate(prompt, concepts, method, seed, steps)
        first = look.maps.concepts[0]
        choice = gr.update(choices=list(look.maps.concepts), value=first)
        pictures = [video(look), choice, overlay(look, first, opacity), segmentation(look)]
        return [look, *pictures, timeline(look), scores(look), None]

    with gr.Blocks(title="Concept maps", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        look = gr.State(time_to_live=3600, delete_callback=lambda look: look and look.discard())
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox("a red circle moving right and a blue square moving right on dark background",
                                    label="Prompt")  # fmt: skip
                concepts = gr.Textbox("red, blue, background", label="Concepts, with commas between them")
                method = gr.Dropdown(studio.methods, label="Method")
                with gr.Row():
                    seed = gr.Number(2, precision=0, minimum=0, label="Seed")
                    steps = gr.Slider(1, MOST_STEPS, studio.steps, step=1, label="Steps")
                start = gr.Button("Generate", variant="primary")
            made = gr.Video(label="Video", height=WIDTH, autoplay=True, loop=True)
        with gr.Row():
            with gr.Column():
                concept = gr.Dropdown([], label="Concept")
                opacity = gr.Slider(0, 1, 0.6, step=0.05, label="Opacity")
                laid = gr.Video(label="Overlay", height=WIDTH, autoplay=True, loop=True)
            colored = gr.Video(label="Segmentation", height=WIDTH, autoplay=True, loop=True)
        curve = gr.Plot(label="Timeline")
        table = gr.Dataframe(headers=HEADERS, datatype="str", interactive=False, label="Scores")
        save = gr.Button("Export")
        files = gr.Files(label="Files")
        shown = [look, made, concept, laid, colored, curve, table, files]
        asked = [prompt, concepts, method, seed, steps, opacity]
        start.click(generate, asked, shown, concurrency_limit=1)
        for control in (concept.input, opacity.release):
            control(told(overlay), [look, concept, opacity], laid)
        save.click(told(export), [look, concept, opacity], files)
    return blocks


def tell(raised: Callable[[str], Exception], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with errors of this package shown to the user, who may have put markup into them."""

    @functools.wraps(function)
    def telling(*args: Any) -> Any:
        if None in args:
            raise raised("Fill in the form and generate a video first.")
        try:
            return function(*args)
        except dcm.ConceptMapsError as error:
            raise raised(html.escape(str(error))) from error

    return telling


def require_gradio() -> Any:
    """The module, which is no dependency of the package.

    Raises:
        ConceptMapsError: it is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise dcm.ConceptMapsError(f"the page needs gradio ({error}); install it with: pip install gradio") from error
    return gradio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a diffusers pipeline; default: the embedded model")
    parser.add_argument("--port", type=int, help="default: a free one from 7860 on")
    options = parser.parse_args()
    require_gradio()
    blocks = page(Studio(options.model))
    blocks.queue(max_size=16).launch(server_name="127.0.0.1", server_port=options.port, share=False)


if __name__ == "__main__":
    main()
