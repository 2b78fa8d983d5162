"""The folder of an evaluation: what it was asked for, and one line of JSON for every sample that is through.

A line is written and brought to the disk before the next sample begins, each process to a file of its own, so that a
kill at any time costs the sample at work and no other. A line that was cut short by it is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.files import whole_file

RUN, SAMPLES, SUMMARY = "run.json", "samples", "summary.json"


def open_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Begin a run in a folder, or check that the one in it can be resumed.

    Args:
        folder: made if it is not there.
        settings: what every sample's result depends on, JSON-compatible.

    Raises:
        ConceptMapsError: the folder holds a run of other settings, or something else under its names.
    """
    wanted = json.loads(json.dumps(settings))
    (folder / SAMPLES).mkdir(parents=True, exist_ok=True)
    path = folder / RUN
    if not path.exists():
        if any((folder / SAMPLES).iterdir()):
            raise ConceptMapsError(
                f"{str(folder / SAMPLES)!r} holds results and {str(path)!r} is missing, so nothing says how they were "
                f"made; choose another folder"
            )
        write_json(path, wanted)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConceptMapsError(f"{str(path)!r} is no JSON ({error}); choose another folder") from error
    if differences := list(_differences(found, wanted)):
        raise ConceptMapsError(
            f"{str(folder)!r} holds a run with other settings: {'; '.join(differences)}; resume it with its own, or "
            f"choose another folder"
        )


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """What differs, by dotted name."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield f"{name or 'all'} was {json.dumps(found)} and is now {json.dumps(wanted)}"


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that appears whole or not at all, with the same bytes for the same content."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """What is known of every sample, by name, from the files of all processes there have ever been.

    Of a sample with several records, one without an error counts.

    Raises:
        ConceptMapsError: a file is damaged.
    """
    records: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / SAMPLES).glob("rank_*.jsonl")):
        for number, line in enumerate(_whole_lines(path.read_bytes()), 1):
            record = _parse(line, f"line {number} of {str(path)!r}")
            if is_finished(record) or not is_finished(records.get(record["sample"], {})):
                records[record["sample"]] = record
    return records


def is_finished(record: Mapping[str, Any]) -> bool:
    """Whether a record is one that does not have to be made again."""
    return bool(record) and "error" not in record


def _whole_lines(content: bytes) -> list[bytes]:
    """Lines without the last one where that was cut short."""
    return content.split(b"\n")[:-1]


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        record["sample"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConceptMapsError(
            f"{place} is no result of a sample ({error!r}); remove that line, and its sample is done again"
        ) from error
    return dict(record)


class Writer:
    """Adds records to the file of one process; a context manager."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Open nothing yet."""
        self._path = folder / SAMPLES / f"rank_{rank}.jsonl"
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Writer:
        """Open the file, without the line that a kill cut short."""
        self._file = self._path.open("a+b")
        self._file.seek(0)
        whole = _whole_lines(self._file.read())
        self._file.truncate(sum(len(line) + 1 for line in whole))
        return self

    def add(self, record: Mapping[str, Any]) -> None:
        """Write one record; it is on the disk when this returns."""
        assert self._file is not None  # entered
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        assert self._file is not None
        self._file.close()
