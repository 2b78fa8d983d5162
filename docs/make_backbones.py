"""Write the pages of the backbones from what they declare: `python docs/make_backbones.py`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from diffusers_concept_maps.backbones import Backbone, JointBackbone, Preset, find_backbones
from diffusers_concept_maps.heads import HeadSelection
from diffusers_concept_maps.methods import find_method, method_names

DOCS = Path(__file__).parent
INDEX = "backbones.md"
HEAD = """\
# Backbones

The transformer classes of diffusers that can be traced. One that the installed diffusers does not have is not among
`dcm.backbones.supported()`, which always says what can be traced here and now. Written by
`python docs/make_backbones.py` from `diffusers_concept_maps/backbones/`.

- **Joint attention**: concepts are carried through the blocks and read the image, so that all methods exist.
- **Cross-attention**: no block updates the text, so that concepts have keys and read nothing. `concept_attention` is
  refused there, with the methods that exist.

| page | transformer classes | attention | methods |
|---|---|---|---|
"""


def pages() -> dict[str, str]:
    """The texts of the index and of one page for each backbone, by path within `docs`."""
    backbones = sorted(find_backbones(), key=lambda backbone: backbone.transformer_classes)
    by_name: dict[str, list[Backbone]] = {}
    for backbone in backbones:
        by_name.setdefault(_name(backbone), []).append(backbone)
    rows = "\n".join(_row(backbone) for backbone in backbones)
    written = {f"backbones/{name}.md": "\n".join(_page(ones)) + "\n" for name, ones in by_name.items()}
    return {INDEX: f"{HEAD}{rows}\n"} | written


def _name(backbone: Backbone) -> str:
    return type(backbone).__module__.rpartition(".")[2]


def _row(backbone: Backbone) -> str:
    name = _name(backbone)
    methods = ", ".join(_methods(backbone))
    return f"| [{name}](backbones/{name}.md) | {_classes(backbone)} | {_attention(backbone)} | {methods} |"


def _classes(backbone: Backbone) -> str:
    return ", ".join(f"`{name}`" for name in backbone.transformer_classes)


def _attention(backbone: Backbone) -> str:
    return "joint" if isinstance(backbone, JointBackbone) else "cross"


def _methods(backbone: Backbone) -> Iterator[str]:
    joint = isinstance(backbone, JointBackbone)
    return (f"`{name}`" for name in method_names() if joint or not find_method(name).reading)


def _page(backbones: list[Backbone]) -> Iterator[str]:
    """The lines of the page of a module, whose backbones mostly are one."""
    text = inspect.cleandoc(sys.modules[type(backbones[0]).__module__].__doc__ or "")
    title, _, rest = text.partition("\n\n")
    yield from (f"# {title.rstrip('.').replace(chr(10), ' ')}", "")
    if rest:
        yield from (rest, "")
    for backbone in backbones:
        yield from _facts(backbone)
    yield "[All backbones](../backbones.md)"


def _facts(backbone: Backbone) -> Iterator[str]:
    yield f"- Classes: {_classes(backbone)}"
    yield f"- Attention: {_attention(backbone)}"
    yield f"- Methods: {', '.join(_methods(backbone))}"
    yield f"- Guidance: {'both branches are one batch' if backbone.batched_guidance else 'each branch is one pass'}"
    yield ""
    if backbone.presets:
        yield "| checkpoint | layers | heads | matching | guidance | source |"
        yield "|---|---|---|---|---|---|"
        yield from map(_preset, backbone.presets)
        yield ""


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
    (DOCS / "backbones").mkdir(exist_ok=True)
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
