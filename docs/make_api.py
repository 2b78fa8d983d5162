"""Write the reference of the public names from their docstrings: `python docs/make_api.py`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import diffusers_concept_maps as dcm

DOCS = Path(__file__).parent
HEAD = """\
# Reference

The public names, `import diffusers_concept_maps as dcm`, with their docstrings. Written by `python docs/make_api.py`.
"""


def pages() -> dict[str, str]:
    """The text of the page, by path within `docs`."""
    lines = [line for name in dcm.__all__ for line in _section(f"dcm.{name}", getattr(dcm, name))]
    return {"api.md": "\n".join([HEAD, *lines])}


def _section(name: str, thing: Any, level: int = 2) -> Iterator[str]:
    yield from (f"{'#' * level} `{name}`", "")
    if isinstance(thing, FunctionType) or "__init__" in getattr(thing, "__dict__", {}):
        yield from ("```text", f"{name.rpartition('.')[2]}{_signature(thing)}", "```", "")
    # A docstring of its own; without one, a class would show that of its parent in the host.
    text = thing.__doc__ or ""
    yield from ("```text", inspect.cleandoc(text), "```", "")
    for member, value in _members(thing):
        yield from _section(f"{name}.{member}", value, level + 1)


def _signature(thing: Any) -> str:
    """The arguments; a default that has no literal is left open, since its text would be an address in memory."""
    signature = str(inspect.signature(thing)).replace("'", "")
    return re.sub(r"<[^<>]*>", "...", signature)


def _members(thing: Any) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class of this package defines itself, and public functions of a module."""
    if isinstance(thing, type):
        for name, value in vars(thing).items():
            bare = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if not name.startswith("_") and isinstance(bare, FunctionType | property) and bare.__doc__:
                yield name, bare
    elif isinstance(thing, ModuleType):
        values = ((name, getattr(thing, name)) for name in getattr(thing, "__all__", ()))
        yield from ((name, value) for name, value in values if isinstance(value, FunctionType))


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
