"""The model families, one file each; every module beside this one is loaded and its `BACKBONE` registered.

Other packages add theirs by an entry point of the group `ENTRY_POINTS`, or by `register`. What the installed diffusers
does not have is left out.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import diffusers
from diffusers.utils import logging
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
    "ENTRY_POINTS",
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

ENTRY_POINTS = "diffusers_concept_maps.backbones"
"""Group of the entry points by which installed packages add backbones; each leads to an instance of `Backbone`."""

logger = logging.get_logger(__name__)

_BACKBONES: dict[str, Backbone] = {}
_UNAVAILABLE: dict[str, str] = {}  # our modules that need another diffusers, and what they miss


def register(backbone: Backbone) -> Backbone:
    """Make a backbone known under each of its transformer classes.

    Raises:
        ConceptMapsValueError: it is no backbone.
        ConceptMapsError: another backbone has one of its classes.
    """
    if not isinstance(backbone, Backbone):
        raise ConceptMapsValueError(f"{backbone!r} is no backbone; expected an instance of a subclass of Backbone")
    _add(backbone, backbone.transformer_classes)
    return backbone


def _add(backbone: Backbone, names: tuple[str, ...]) -> None:
    for name in names:
        if name in _BACKBONES:
            raise ConceptMapsError(
                f"{name} belongs to {type(_BACKBONES[name]).__name__}; remove it from {type(backbone).__name__}"
            )
    _BACKBONES.update(dict.fromkeys(names, backbone))


def supported() -> tuple[str, ...]:
    """Names of the transformer classes that can be traced with the installed diffusers, sorted."""
    _add_entry_points()
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
    _add_entry_points()
    for cls in type(uncompiled(transformer)).__mro__:
        backbone = _BACKBONES.get(cls.__name__)
        if backbone is not None:
            return backbone
    unavailable = "; ".join(f"{name}: {reason}" for name, reason in _UNAVAILABLE.items())
    raise ConceptMapsError(
        f"{type(uncompiled(transformer)).__name__} cannot be traced; supported are {', '.join(supported())}. "
        f"docs/contributing.md says how to add a backbone."
        + (f" diffusers {diffusers.__version__} lacks what these need: {unavailable}" if unavailable else "")
    )


@cache
def _add_entry_points() -> None:
    """Register the backbones of other packages, once, when one is first asked for."""
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            register(entry.load())
        except Exception as error:  # noqa: BLE001  # whatever another package raises must not stop the rest
            logger.warning(
                f"The backbone {entry.name} ({entry.value}) of another package is left out, because it raised "
                f"{type(error).__name__}: {error}. Update or uninstall that package."
            )


def _add_own() -> None:
    """Register what is beside this module, as far as the installed diffusers has the classes."""
    known = frozenset(dir(diffusers))
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue
        try:
            backbone = importlib.import_module(f"{__name__}.{module.name}").BACKBONE
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "diffusers":
                raise
            _UNAVAILABLE[module.name] = str(error)
        else:
            _add(backbone, tuple(name for name in backbone.transformer_classes if name in known))


_add_own()
