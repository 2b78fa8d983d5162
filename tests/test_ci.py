"""The script that checks a change: it runs the README's commands as printed, and touches nothing of the user's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = {
    "python3": 'mkdir -p "$4/bin" && touch "$4/bin/activate"',  # -m venv --clear
    "python": "",
    "pip": "",
    "ruff": "",
    "mypy": "",
    "pytest": "",
    "mkdocs": "",
    "chromium": "",
    "chromedriver": "",
    "concept-maps": 'mkdir -p "$3" && echo x | tee "$3/a.mp4" "$3/a.png" "$3/maps.safetensors" >/dev/null',
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project without code, a user's own demo in it, and tools that only note how they are called."""
    tree = tmp_path / "tree"
    for folder in ("diffusers_concept_maps", "kernels", "demo", ".ci"):
        (tree / folder).mkdir(parents=True)
    for name in (".ci/run", ".ci/oldest", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "demo" / "mine.mp4").write_text("mine")
    (tmp_path / "bin").mkdir()
    for name, work in TOOLS.items():
        tool = tmp_path / "bin" / name
        tool.write_text(f'#!/bin/sh\necho "{name} $* in $PWD" >>"$CALLS"\n{work}\n')
        tool.chmod(0o755)
    (tmp_path / "temporary").mkdir()
    return tree


def run(tree: Path, script: str = "run") -> tuple[int, list[str]]:
    """Exit status of a script, and the calls of tools that it made."""
    calls = tree.parent / "calls"
    settings = {
        "PATH": f"{tree.parent / 'bin'}:{os.environ['PATH']}",
        "TMPDIR": str(tree.parent / "temporary"),
        "CALLS": str(calls),
    }
    done = subprocess.run(["bash", tree / ".ci" / script], env=os.environ | settings, capture_output=True, check=False)
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


def test_a_demo_of_the_user_is_left_alone(tree: Path) -> None:
    status, calls = run(tree)
    assert status == 0
    assert [path.name for path in (tree / "demo").iterdir()] == ["mine.mp4"]
    (demo,) = (call for call in calls if call.startswith("concept-maps"))
    command, place = demo.split(" in ")
    assert command == "concept-maps generate --out demo"
    assert Path(place).parent == tree.parent / "temporary"
    assert list((tree.parent / "temporary").iterdir()) == []


def test_a_demo_that_writes_nothing_is_noticed(tree: Path) -> None:
    (tree.parent / "bin" / "concept-maps").write_text('#!/bin/sh\nmkdir "$3"\n')
    status, calls = run(tree)
    assert status == 1
    assert not any(call.startswith("pytest") for call in calls)
    assert [path.name for path in (tree / "demo").iterdir()] == ["mine.mp4"]
    assert list((tree.parent / "temporary").iterdir()) == []


def test_the_oldest_diffusers_is_the_one_that_the_project_names(tree: Path) -> None:
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    (oldest,) = (line.partition(">=")[2] for line in project["dependencies"] if line.startswith("diffusers"))
    status, calls = run(tree, "oldest")
    assert status == 0
    assert (tree / ".venv-oldest" / "constraints.txt").read_text() == f"torch==2.13.0\ndiffusers=={oldest}\n"
    places = [call.partition(" in ")[0] for call in calls]
    assert places[1:3] == ["pip install --quiet torch==2.13.0", "pip install --quiet --editable .[test]"]
    assert places[3] == "pytest -n auto tests --ignore=tests/kernels --ignore=tests/shapes"


def test_a_project_that_names_no_oldest_diffusers_is_noticed(tree: Path) -> None:
    text = (tree / "pyproject.toml").read_text()
    (tree / "pyproject.toml").write_text(re.sub(r"diffusers>=[0-9.]+", "diffusers", text))
    assert run(tree, "oldest") == (1, [])
