"""The errors this package raises; every message says what was given, what was expected and what to do."""

from __future__ import annotations


class ConceptMapsError(Exception):
    """Anything this package refuses or cannot do."""


class ConceptMapsValueError(ConceptMapsError, ValueError):
    """An argument has a value that cannot be used."""
