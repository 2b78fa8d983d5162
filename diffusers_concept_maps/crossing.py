"""What a capture may ask of models whose text is read and reads nothing: those with cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.methods import find_method, method_names
from diffusers_concept_maps.parity import Parity


def check_crossing(transformer: Any, methods: Sequence[str], reads: str, target: str, parity: Parity | None) -> None:
    """Check the options of `trace` that depend on it.

    Raises:
        ConceptMapsValueError: a method or an option that needs text that reads, or an official implementation that
            does not exist.
    """
    name = type(transformer).__name__
    impossible = [method for method in methods if find_method(method).reading]
    if impossible:
        possible = ", ".join(method for method in method_names() if not find_method(method).reading)
        raise ConceptMapsValueError(
            f"method {impossible[0]!r} compares what concepts have read, and text reads nothing in {name}: its blocks "
            f"have cross-attention; use {possible}"
        )
    if reads != "both":
        raise ConceptMapsValueError(
            f"reads is {reads!r}, but concepts read nothing in {name}, whose blocks have cross-attention; leave it out"
        )
    if parity is None:
        return
    if not parity.crossing:
        raise ConceptMapsValueError(
            f"parity={parity.name!r} reproduces code for joint attention, and the blocks of {name} have "
            f"cross-attention; leave it out"
        )
    if target != "prompt":
        raise ConceptMapsValueError(
            f"parity={parity.name!r} has words of the prompt alone where blocks have cross-attention, as those of "
            f"{name}; use target='prompt'"
        )
