"""Files and folders that appear whole or not at all, and their names."""

from __future__ import annotations

import os
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers_concept_maps.errors import ConceptMapsError


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` at the end of the block.

    If the block raises, nothing of it is left, and an older file stays as it was.

    Args:
        path: the file to write; an existing one is replaced.

    Yields:
        A path in the same folder, with the same suffix: many writers take the format from it.

    Raises:
        ConceptMapsError: the folder is not there, or there is a folder in place of the file.
    """
    target = Path(path).absolute()
    if not target.parent.is_dir():
        raise ConceptMapsError(
            f"{os.fspath(path)!r} cannot be written, because there is no folder {str(target.parent)!r}; make it first"
        )
    if target.is_dir():
        raise ConceptMapsError(f"{os.fspath(path)!r} is a folder; name a file to write")
    partial = target.with_name(f".{target.stem}.partial{target.suffix}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder beside `path` to write to, which becomes `path` at the end of the block.

    If the block raises, nothing of it is left.

    Args:
        path: the folder to make; one that is there already has to be empty. Folders above it are made.

    Yields:
        An empty folder.

    Raises:
        ConceptMapsError: there is something of that name already.
    """
    target = Path(path).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConceptMapsError(f"{os.fspath(path)!r} is there already and not empty; name a new folder")
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.partial-", dir=target.parent) as name:
            partial = Path(name) / "folder"
            partial.mkdir()
            yield partial
            if target.exists():
                target.rmdir()
            partial.rename(target)
    finally:
        for folder in made:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def slug(text: str) -> str:
    """A short file-name part of ASCII letters, digits and dashes; what has none becomes "concept"."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[:40].strip("-") or "concept"
