"""What a notebook shows of maps: a strip of small pictures for each concept, with its scale; no frames are needed."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.visualize.colors import colorize, score_labels
from diffusers_concept_maps.visualize.overlay import normalized, scale_of

LONGEST_SIDE, FRAMES, CONCEPTS = 64, 8, 16
"""Pixels on a side of one map, maps in a strip, and strips, at most: less than a megabyte."""

_SHOWN = 64  # height of a strip on the screen


def maps_html(title: str, concepts: Sequence[str], maps: torch.Tensor) -> str:
    """A table with one row per concept: its name, its map in every frame or in evenly spaced ones, and its scale.

    Args:
        title: above the table.
        concepts: their names.
        maps: float `[batch, concept, frame, height, width]`; the first of the batch is shown.

    Returns:
        HTML that needs nothing else; all text in it is escaped.

    Raises:
        ConceptMapsValueError: scores that are not finite.
        ConceptMapsError: matplotlib is not installed.
    """
    batch, _, frames = maps.shape[:3]
    notes = [f"map 1 of {batch}"] if batch > 1 else []
    notes += [f"{FRAMES} of {frames} frames"] if frames > FRAMES else []
    notes += [f"{CONCEPTS} of {len(concepts)} concepts"] if len(concepts) > CONCEPTS else []
    caption = html.escape(", ".join([title, *notes]))
    rows = [_row(name, scores) for name, scores in zip(concepts[:CONCEPTS], maps[0], strict=False)]
    return f"<table><caption>{caption}</caption>{''.join(rows)}</table>"


def error_html(text: str, error: Exception) -> str:
    """What to show where there is no map to show yet, or nothing to draw it with."""
    return f"<pre>{html.escape(text)}</pre><p>{html.escape(str(error))}</p>"


def _row(concept: str, concept_map: torch.Tensor) -> str:
    name = html.escape(concept)
    low, high = scale_of(concept_map)
    strip = _strip(concept_map.detach().float().cpu())
    width = round(_SHOWN * strip.width / strip.height)
    picture = _picture(strip, f"map of {name}", width, _SHOWN)
    bar = _colored(np.linspace(0, 1 if high > low else 0, 64)[None])
    labels = score_labels([low, high] if high > low else [low])
    scale = " ".join([labels[0], _picture(bar, "color scale", 64, 10), *labels[1:]])
    return f"<tr><th>{name}</th><td>{picture}</td><td>{scale}</td></tr>"


def _strip(concept_map: torch.Tensor) -> Image.Image:
    """Maps side by side, one pixel per token where there is room."""
    frames, height, width = concept_map.shape
    if min(concept_map.shape) < 1:
        raise ConceptMapsValueError(f"a map of shape {tuple(concept_map.shape)}; expected one score at least")
    shown = np.linspace(0, frames - 1, min(frames, FRAMES)).round().astype(int)
    scores = normalized(concept_map)[shown]
    longest = max(height, width)
    if longest > LONGEST_SIDE:
        size = max(1, height * LONGEST_SIDE // longest), max(1, width * LONGEST_SIDE // longest)
        scores = torch.nn.functional.adaptive_avg_pool2d(scores[:, None], size)[:, 0]
    return _colored(np.concatenate(list(scores.numpy()), 1))


def _colored(scores: np.ndarray) -> Image.Image:
    """A picture of 256 colors, a third as large as one of three channels."""
    steps = np.minimum(scores * 256, 255).astype(np.uint8)
    picture = Image.fromarray(steps, "L")
    picture.putpalette((colorize(np.linspace(0, 1, 256)) * 255).round().astype(np.uint8).tobytes())
    return picture


def _picture(picture: Image.Image, alt: str, width: int, height: int) -> str:
    """An image tag that holds its picture; `alt` is escaped already."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="data:image/png;base64,{data}" alt="{alt}" width="{width}" height="{height}" '
        f'style="image-rendering: pixelated; display: inline; max-width: none">'
    )
