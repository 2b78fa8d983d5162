"""Data sets in their own formats, one reader per file; every module beside this one is found, none is listed."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable
from typing import Any

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.evaluation.datasets._base import Dataset, Sample

__all__ = ["Dataset", "Sample", "dataset_names", "find_dataset", "open_dataset"]


def dataset_names() -> tuple[str, ...]:
    """Names of the data sets there is a reader for, sorted."""
    return tuple(sorted(_readers()))


def find_dataset(name: str) -> type[Dataset[Any]]:
    """The reader of a data set.

    Raises:
        ConceptMapsValueError: there is none of this name.
    """
    readers = _readers()
    if name not in readers:
        raise ConceptMapsValueError(f"there is no data set {name!r}; expected one of {', '.join(sorted(readers))}")
    return readers[name]


def open_dataset(name: str, root: str | os.PathLike[str], **options: Any) -> Dataset[Any]:
    """Open a data set; its samples are read one at a time.

    Args:
        name: one of `dataset_names()`.
        root: the folder it is in.
        options: what its reader takes, such as `split`, or `max_frames` and `stride` of videos.

    Raises:
        ConceptMapsValueError: there is no such data set, or it has no such option.
        ConceptMapsError: the folder does not hold it.
    """
    reader = find_dataset(name)
    known = list(inspect.signature(reader).parameters)[1:]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ConceptMapsValueError(f"{name} has no option {', '.join(unknown)}; expected some of {', '.join(known)}")
    make: Callable[..., Dataset[Any]] = reader
    return make(root, **options)


def _readers() -> dict[str, type[Dataset[Any]]]:
    """The readers that the modules beside this one declare in `DATASETS`, by name."""
    readers: dict[str, type[Dataset[Any]]] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue
        for reader in importlib.import_module(f"{__name__}.{module.name}").DATASETS:
            if reader.name in readers:
                raise ConceptMapsError(
                    f"{reader.__name__} and {readers[reader.name].__name__} are both named {reader.name!r}; rename one"
                )
            readers[reader.name] = reader
    return readers
