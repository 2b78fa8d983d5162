"""Maps as pictures: `overlay` on frames, contact sheets (`figure`) and files (`video`); needs the `viz` extra."""

from __future__ import annotations

import importlib
from types import ModuleType

from diffusers_concept_maps.errors import ConceptMapsError

EXTRA = ("matplotlib", "imageio_ffmpeg")
"""The modules of the `viz` extra that pictures and videos need."""


def require(module: str, extra: str = "viz") -> ModuleType:
    """Import a module of an extra, at its first use.

    Args:
        module: its dotted name.
        extra: the extra that brings it.

    Raises:
        ConceptMapsError: it cannot be imported; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConceptMapsError(
            f"pictures and videos need {module} ({error}); install it with: "
            f'pip install "diffusers-concept-maps[{extra}]"'
        ) from error
