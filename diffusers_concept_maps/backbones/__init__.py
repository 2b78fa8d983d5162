"""The model families, one file each; every module beside this one is loaded and its `BACKBONE` registered."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from torch import nn

from diffusers_concept_maps.backbones._base import (
    Backbone,
    CrossBackbone,
    Grid,
    JoiningBackbone,
    JointBackbone,
    Preset,
    Site,
    uncompiled,
    unpatched,
)
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError

__all__ = [
    "Backbone",
    "CrossBackbone",
    "Grid",
    "JoiningBackbone",
    "JointBackbone",
    "Preset",
    "Site",
    "find_backbone",
    "find_backbones",
    "find_transformers",
    "register",
    "supported",
    "uncompiled",
    "unpatched",
]

_BACKBONES: dict[str, Backbone] = {}


def register(backbone: Backbone) -> Backbone:
    """Make a backbone known under each of its transformer classes.

    Raises:
        ConceptMapsError: another backbone has one of them.
    """
    for name in backbone.transformer_classes:
        if name in _BACKBONES:
            raise ConceptMapsError(
                f"{name} belongs to {type(_BACKBONES[name]).__name__}; remove it from {type(backbone).__name__}"
            )
    _BACKBONES.update(dict.fromkeys(backbone.transformer_classes, backbone))
    return backbone


def supported() -> tuple[str, ...]:
    """Names of the transformer classes that can be traced, sorted."""
    return tuple(sorted(_BACKBONES))


def find_transformers(pipe_or_transformer: Any) -> list[Any]:
    """The transformers to trace: the object itself, or those of the pipeline.

    Two share the steps of Wan 2.2's pipelines, and in some checkpoints either one alone does the work.

    Raises:
        ConceptMapsValueError: neither a module nor a pipeline with a transformer.
    """
    if isinstance(pipe_or_transformer, nn.Module):
        return [pipe_or_transformer]
    named = (getattr(pipe_or_transformer, name, None) for name in ("transformer", "transformer_2"))
    found = [transformer for transformer in named if isinstance(transformer, nn.Module)]
    if found:
        return found
    raise ConceptMapsValueError(
        f"{type(pipe_or_transformer).__name__} has no transformer to trace; pass a diffusers pipeline whose "
        f"`transformer` is one of {', '.join(supported())}, or such a transformer"
    )


def find_backbones() -> tuple[Backbone, ...]:
    """Every backbone that is registered."""
    return tuple(dict.fromkeys(_BACKBONES.values()))


def find_backbone(transformer: Any) -> Backbone:
    """The backbone of a transformer, by exact class name along its MRO.

    Raises:
        ConceptMapsError: no backbone knows the class.
    """
    for cls in type(uncompiled(transformer)).__mro__:
        backbone = _BACKBONES.get(cls.__name__)
        if backbone is not None:
            return backbone
    raise ConceptMapsError(
        f"{type(transformer).__name__} cannot be traced; supported are {', '.join(supported())}. "
        f"docs/contributing.md says how to add a backbone."
    )


for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        register(importlib.import_module(f"{__name__}.{_module.name}").BACKBONE)
