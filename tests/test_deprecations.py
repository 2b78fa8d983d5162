"""A host that deprecates what this package calls is noticed, whoever's name the warning is given in."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from diffusers.utils import deprecate


def caller_in(module: str, source: str) -> Callable[[], None]:
    """A function of that module."""
    names: dict[str, Any] = {"__name__": module, "deprecate": deprecate, "warnings": warnings}
    exec(f"def call():\n    {source}", names)
    return names["call"]


HOST = "deprecate('thing', '99.0.0', 'Use another.')"


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (HOST, FutureWarning),
        ("warnings.warn('thing is deprecated', DeprecationWarning)", DeprecationWarning),
        ("warnings.warn(FutureWarning('thing is deprecated'))", FutureWarning),
    ],
)
def test_calls_of_ours_raise(source: str, kind: type[Warning]) -> None:
    with pytest.raises(kind, match="thing.* is deprecated"):
        caller_in("diffusers_concept_maps.recorder", source)()


def test_calls_of_others_and_other_warnings_do_not() -> None:
    with pytest.warns(FutureWarning, match="thing.* is deprecated"):
        caller_in("somebody_else", HOST)()
    with pytest.warns(UserWarning, match="mind the gap"):
        caller_in("diffusers_concept_maps.recorder", "warnings.warn('mind the gap')")()


@pytest.mark.parametrize("category", ["DeprecationWarning", "FutureWarning"])
def test_warnings_at_import_raise_too(category: str, pytestconfig: pytest.Config) -> None:
    """Before any test runs, the filters of pyproject.toml hold."""
    assert f"error::{category}:diffusers_concept_maps" in pytestconfig.getini("filterwarnings")
    with pytest.raises(Warning, match="old"):
        warnings.warn_explicit("old", getattr(__import__("builtins"), category), "x.py", 1, "diffusers_concept_maps.x")
