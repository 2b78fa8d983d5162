"""Where a transformer's layers are, and how its tokens lie."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffusers_concept_maps.heads import HeadSelection

_PATCHES = ("forward", "_compiled_call_impl")  # of attributes that instances have beside those of their class


@contextmanager
def unpatched(attentions: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context these modules run their class's `forward`.

    Caches patch it in the instance, `torch.compile` its call; calls with concepts must reach neither the state of the
    one nor the graph of the other.
    """
    places = [(attention, name) for attention in attentions for name in _PATCHES]
    patched = [attention.__dict__.pop(name, None) for attention, name in places]
    try:
        yield
    finally:
        for (attention, name), patch in zip(places, patched, strict=True):
            if patch is not None:
                attention.__dict__[name] = patch


def uncompiled(module: Any) -> Any:
    """The module that `torch.compile(module)` has wrapped; any other module as it is."""
    return getattr(module, "_orig_mod", module)


@dataclass(frozen=True)
class Site:
    """One layer.

    Attributes:
        block: a transformer block.
        attention: the attention module in it that maps are read from.
        others: attention modules in it that see images alone, and that a block without an image has to do without.
        forward: of the block's class.
        parameters: names of its arguments.
    """

    block: nn.Module
    attention: Any
    others: tuple[Any, ...] = ()
    forward: Any = field(init=False, repr=False, compare=False)
    parameters: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Find the modules inside of what `torch.compile` may have wrapped them in, and look the forward up."""
        object.__setattr__(self, "block", uncompiled(self.block))
        object.__setattr__(self, "attention", uncompiled(self.attention))
        object.__setattr__(self, "others", tuple(uncompiled(module) for module in self.others))
        object.__setattr__(self, "forward", type(self.block).forward)
        object.__setattr__(self, "parameters", tuple(inspect.signature(self.forward).parameters)[1:])


@dataclass(frozen=True)
class Grid:
    """Token grid of the image stream: latent frames, then rows and columns of patches.

    Attributes:
        frames: latent frames, or what the model makes tokens of.
        height: rows of patches.
        width: columns of patches.
        start: image tokens in front of it, such as those of reference images; whatever follows it is left out as well.
        square: the tokens of a frame come in squares of so many rows and columns, row by row in each; 1 is row by row
            in the whole frame.
    """

    frames: int
    height: int
    width: int
    start: int = 0
    square: int = 1

    def select(self, image: torch.Tensor) -> torch.Tensor:
        """Its tokens of those of the image stream `[R, H, token, D]`, every frame row by row."""
        own = image[:, :, self.tokens]
        if self.square == 1:
            return own
        rows, columns = self.height // self.square, self.width // self.square
        squares = own.unflatten(2, (self.frames, rows, columns, self.square, self.square))
        ordered: torch.Tensor = squares.transpose(4, 5).flatten(2, 6)
        return ordered

    @property
    def tokens(self) -> slice:
        """Where its tokens are among those of the image stream."""
        return slice(self.start, self.start + self.frames * self.height * self.width)


@dataclass(frozen=True)
class Preset:
    """Layers, heads and steps that suit one checkpoint.

    Attributes:
        name: the checkpoint.
        source: where the choice comes from.
        config: entries of the transformer's config that identify the checkpoint, wherever it was loaded from.
        layers: 0-based layers per method; methods not named use all layers.
        heads: heads per method; methods not named use their default.
        steps: fraction of the denoising schedule `(start, stop)`; whatever its length, at least one step is taken.
        matching: layer in which frames are matched and the noise level that it is told, None where none are known.
        guidance: layers at which cross-attention guidance cuts, empty where none are known.
    """

    name: str
    source: str
    config: Mapping[str, object]
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    heads: Mapping[str, HeadSelection | tuple[int, ...]] = field(default_factory=dict)
    steps: tuple[float, float] = (0.0, 1.0)
    matching: tuple[int, float] | None = None
    guidance: tuple[int, ...] = ()
