"""A file appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.files import whole_file, whole_folder


def write(path: Path | str, seen: list[Path]) -> None:
    with whole_file(path) as partial:
        seen.append(partial)
        partial.write_text("new")


def test_the_file_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "clip.v1.mp4"
    target.write_text("older")
    with whole_file(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "older"
        assert (partial.parent, partial.suffix) == (tmp_path, ".mp4")
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["clip.v1.mp4"]


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("older", [None, "older"])
def test_an_exception_leaves_what_was_there(raised: type[BaseException], older: str | None, tmp_path: Path) -> None:
    target = tmp_path / "maps"
    if older is not None:
        target.write_text(older)

    def write_half() -> None:
        with whole_file(target) as partial:
            partial.write_text("half")
            raise raised

    with pytest.raises(raised):
        write_half()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({"maps": older} if older else {})


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="maps"), whole_file(tmp_path / "maps"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_named_before_anything_is_written(tmp_path: Path) -> None:
    seen: list[Path] = []
    message = r"^'.*/a/b/maps' cannot be written, because there is no folder '.*/a/b'; make it first$"
    with pytest.raises(ConceptMapsError, match=message):
        write(tmp_path / "a" / "b" / "maps", seen)
    (tmp_path / "file").touch()
    with pytest.raises(ConceptMapsError, match=r"there is no folder '.*/file'"):
        write(tmp_path / "file" / "maps", seen)
    assert seen == []


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    seen: list[Path] = []
    with pytest.raises(ConceptMapsError, match=r"^'.*' is a folder; name a file to write$"):
        write(tmp_path, seen)
    assert seen == []


def test_a_name_is_relative_to_the_folder_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the block changes the working folder, and a name is never read as an option."""
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with whole_file("-y.txt") as partial:
        assert partial.is_absolute()
        monkeypatch.chdir("other")
        partial.write_text("new")
    assert (tmp_path / "-y.txt").read_text() == "new"


def test_a_folder_appears_at_the_end(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a" / "b") as partial:
        (partial / "inside").mkdir()
        assert not (tmp_path / "a" / "b").exists()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["a", "a/b", "a/b/inside"]


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("empty", [True, False])
def test_an_exception_leaves_no_folder(raised: type[BaseException], empty: bool, tmp_path: Path) -> None:
    target = tmp_path / "empty" if empty else tmp_path / "a" / "b" / "c"
    if empty:
        target.mkdir()

    def write_half() -> None:
        with whole_folder(target) as partial:
            (partial / "file").touch()
            raise raised

    with pytest.raises(raised):
        write_half()
    assert list(tmp_path.rglob("*")) == ([target] if empty else [])


def test_a_folder_is_empty_or_new(tmp_path: Path) -> None:
    def write(name: str) -> None:
        with whole_folder(tmp_path / name) as partial:
            (partial / "file").touch()

    (tmp_path / "empty").mkdir()
    write("empty")
    for taken in ("empty", "empty/file"):
        with pytest.raises(ConceptMapsError, match=f"{taken}' is there already and not empty; name a new folder$"):
            write(taken)
    with pytest.raises(FileExistsError):
        write("empty/file/folder")
    assert os.listdir(tmp_path / "empty") == ["file"]
