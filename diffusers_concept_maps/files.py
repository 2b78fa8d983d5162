"""Files that appear whole or not at all."""

from __future__ import annotations

import os
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
        ConceptMapsError: the folder is not there.
    """
    target = Path(path).absolute()
    if not target.parent.is_dir():
        raise ConceptMapsError(
            f"{os.fspath(path)!r} cannot be written, because there is no folder {str(target.parent)!r}; make it first"
        )
    partial = target.with_name(f".{target.stem}.partial{target.suffix}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
