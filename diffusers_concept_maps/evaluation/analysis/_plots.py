"""Pictures of analyses, in colors that color-blind readers tell apart (Okabe and Ito; viridis)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffusers_concept_maps.visualize import require

BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#777777"


def new_figure(width: float, height: float) -> Any:
    """A figure that needs no display; sizes in inches.

    Raises:
        ConceptMapsError: matplotlib is not installed.
    """
    figure = require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def heat_map(
    values: torch.Tensor,
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    title: str,
    label: str,
) -> Any:
    """A heat map with its numbers, as long as there is room for them.

    Args:
        values: `[row, column]`, NaN for what is not defined.
        rows: label of the axis, and the name of every row.
        columns: likewise.
        title: above.
        label: of the colors.
    """
    count, across = values.shape
    figure = new_figure(max(5.0, 2.4 + 0.55 * across), max(3.2, 1.6 + 0.38 * count))
    axes = figure.subplots()
    image = axes.imshow(values.numpy(), cmap="viridis", aspect="auto")
    axes.set_xticks(range(across), columns[1], fontsize=8)
    axes.set_yticks(range(count), rows[1], fontsize=8)
    axes.set(xlabel=columns[0], ylabel=rows[0])
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes).set_label(label, fontsize=8)
    if values.numel() <= 200:
        middle = (values.nan_to_num(-torch.inf).max() + values.nan_to_num(torch.inf).min()) / 2
        for row, column in torch.cartesian_prod(torch.arange(count), torch.arange(across)).tolist():
            value = float(values[row, column])
            color = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    return figure


def scatter(
    axes: Any, first: torch.Tensor, second: torch.Tensor, groups: Sequence[int], labels: tuple[str, str, str]
) -> None:
    """Points, colored by the group that they are of.

    Args:
        axes: of matplotlib.
        first: `[n]`.
        second: `[n]`.
        groups: `[n]`, such as layers.
        labels: of the horizontal axis, of the vertical one, and of the colors.
    """
    points = axes.scatter(first.numpy(), second.numpy(), c=list(groups), cmap="viridis", edgecolors="black", s=38)
    points.set_linewidth(0.4)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.grid(alpha=0.3)
    bar = axes.figure.colorbar(points, ax=axes, ticks=sorted(set(groups)) if len(set(groups)) <= 12 else None)
    bar.set_label(labels[2], fontsize=8)
