"""What a researcher asks of a model and its maps, one analysis per file, each with tables (CSV) and pictures (PNG).

Every module beside this one is found, except `_*.py`. A module declares `ANALYSIS`, an `Analysis`.
"""

from __future__ import annotations

import importlib
import pkgutil

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.evaluation.analysis._base import Analysis, Findings, Settings, Table
from diffusers_concept_maps.evaluation.analysis._subjects import Subject, dataset_subjects, shapes_subjects

__all__ = [
    "Analysis",
    "Findings",
    "Settings",
    "Subject",
    "Table",
    "analyses",
    "dataset_subjects",
    "find_analysis",
    "shapes_subjects",
]


def analyses() -> dict[str, Analysis]:
    """The analyses by name, sorted.

    Raises:
        ConceptMapsError: two modules declare one name.
    """
    found: dict[str, Analysis] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue
        analysis = importlib.import_module(f"{__name__}.{module.name}").ANALYSIS
        if analysis.name in found:
            raise ConceptMapsError(f"two analyses are named {analysis.name!r}; rename the one in {module.name}.py")
        found[analysis.name] = analysis
    return dict(sorted(found.items()))


def find_analysis(name: str) -> Analysis:
    """An analysis by its name.

    Raises:
        ConceptMapsValueError: there is none of this name.
    """
    found = analyses()
    if name not in found:
        raise ConceptMapsValueError(f"there is no analysis {name!r}; expected one of {', '.join(found)}")
    return found[name]
