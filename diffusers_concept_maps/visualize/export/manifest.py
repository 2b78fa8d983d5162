"""`manifest.json`: what each exported file is, and how its pixels become scores again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

FORMAT = "diffusers_concept_maps/export/1"
NAME = "manifest.json"


class Manifest:
    """A manifest that is being written: its list of files goes to the disk entry by entry."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._separator = "\n  "

    def add(self, entry: dict[str, Any]) -> None:
        """One more file, or one that could not be made."""
        self._file.write(self._separator + json.dumps(entry, ensure_ascii=False))
        self._separator = ",\n  "


@contextmanager
def open_manifest(folder: Path, header: dict[str, Any]) -> Iterator[Manifest]:
    """A manifest with these entries and a list "files", which is filled within the context.

    Args:
        folder: where to write it.
        header: JSON-compatible.
    """
    with (folder / NAME).open("w", encoding="utf-8") as file:
        text = json.dumps({"format": FORMAT, **header}, ensure_ascii=False, indent=1)
        file.write(text.removesuffix("\n}") + ',\n "files": [')
        yield Manifest(file)
        file.write("\n ]\n}\n")
