"""The map methods, one file each; every module beside this one is loaded and registers what it defines."""

from __future__ import annotations

import importlib
import pkgutil

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.methods._base import METHODS, SPACES, LayerTaps, Method, Rules

__all__ = ["SPACES", "LayerTaps", "Method", "Rules", "find_method", "method_names"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def method_names() -> tuple[str, ...]:
    """Names of all methods, sorted."""
    return tuple(sorted(METHODS))


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ConceptMapsValueError: there is none.
    """
    if name not in METHODS:
        raise ConceptMapsValueError(f"unknown method {name!r}; expected one of {', '.join(method_names())}")
    return METHODS[name]
