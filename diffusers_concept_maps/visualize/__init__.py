"""Maps as pictures: `overlay` on frames, contact sheets (`figure`) and files (`video`); needs the `viz` extra."""

from __future__ import annotations

import importlib
from types import ModuleType

from diffusers_concept_maps.errors import ConceptMapsError

EXTRA = ("matplotlib", "imageio_ffmpeg")
"""The modules of the `viz` extra that pictures and videos need."""


def require(module: str) -> ModuleType:
    """Import a module of the `viz` extra, at its first use.

    Args:
        module: its dotted name.

    Raises:
        ConceptMapsError: it cannot be imported; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConceptMapsError(
            f'pictures and videos need {module} ({error}); install it with: pip install "diffusers-concept-maps[viz]"'
        ) from error
