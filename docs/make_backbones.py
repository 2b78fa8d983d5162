"""Write the page of the backbones from what they declare: `python docs/make_backbones.py`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from diffusers_concept_maps.backbones import Backbone, JointBackbone, Preset, find_backbones
from diffusers_concept_maps.heads import HeadSelection
from diffusers_concept_maps.methods import find_method, method_names

PAGE = Path(__file__).parent / "backbones.md"
HEAD = """\
# Backbones

The transformer classes of diffusers that can be traced. One that the installed diffusers does not have is not among
`dcm.backbones.supported()`, which always says what can be traced here and now. Written by
`python docs/make_backbones.py` from `diffusers_concept_maps/backbones/`.

- **Joint attention**: concepts are carried through the blocks and read the image, so that all methods exist.
- **Cross-attention**: no block updates the text, so that concepts have keys and read nothing. `concept_attention` is
  refused there, with the methods that exist.

| transformer classes | attention | methods |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    backbones = sorted(find_backbones(), key=lambda backbone: backbone.transformer_classes)
    rows = "\n".join(f"| {_classes(one)} | {_attention(one)} | {', '.join(_methods(one))} |" for one in backbones)
    return "\n".join([HEAD + rows, *(line for one in backbones for line in _section(one))]) + "\n"


def _classes(backbone: Backbone) -> str:
    return ", ".join(f"`{name}`" for name in backbone.transformer_classes)


def _attention(backbone: Backbone) -> str:
    return "joint" if isinstance(backbone, JointBackbone) else "cross"


def _methods(backbone: Backbone) -> Iterator[str]:
    joint = isinstance(backbone, JointBackbone)
    return (f"`{name}`" for name in method_names() if joint or not find_method(name).reading)


def _section(backbone: Backbone) -> Iterator[str]:
    text = inspect.cleandoc(sys.modules[type(backbone).__module__].__doc__ or "")
    title, _, rest = text.partition("\n\n")
    yield from ("", f"## {title.rstrip('.').replace(chr(10), ' ')}", "")
    if rest:
        yield from (rest, "")
    yield f"Classes: {_classes(backbone)}. " + (
        "Both guidance branches are one batch." if backbone.batched_guidance else "Each guidance branch is one pass."
    )
    if backbone.presets:
        yield from (
            "",
            "| checkpoint | layers | heads | matching | guidance | source |",
            "|---|---|---|---|---|---|",
            *map(_preset, backbone.presets),
        )


def _preset(preset: Preset) -> str:
    layers = "; ".join(f"`{name}`: {_ranges(chosen)}" for name, chosen in preset.layers.items()) or "all"
    heads = "; ".join(f"`{name}`: {_chosen(heads)}" for name, heads in preset.heads.items()) or "all"
    matching = f"layer {preset.matching[0]} at {preset.matching[1]}" if preset.matching else ""
    return f"| {preset.name} | {layers} | {heads} | {matching} | {_ranges(preset.guidance)} | {preset.source} |"


def _chosen(heads: HeadSelection | tuple[int, ...]) -> str:
    return f"{heads.top_k} best by `{heads.score}`" if isinstance(heads, HeadSelection) else _ranges(heads)


def _ranges(numbers: tuple[int, ...]) -> str:
    """Runs of consecutive numbers as `first-last`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
