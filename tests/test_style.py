"""The house rules that ruff has no rule for: size of functions and files, and no path of one machine in the text."""

from __future__ import annotations

import ast
import io
import os
import re
import tokenize
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = {"", ".cfg", ".in", ".json", ".jsonl", ".md", ".py", ".toml", ".txt", ".yaml", ".yml"}
MACHINE_PATH = re.compile(r"(?<![\w.~$}-])/(?:farm|home|mnt|opt|root|tmp|Users|work)/\w")
FILE_LINES, FUNCTION_LINES, TRITON_LINES = 400, 60, 120


def project_files() -> Iterator[Path]:
    """Every file of the project that is not git-ignored; git itself may be absent."""
    lines = (ROOT / ".gitignore").read_text().splitlines()
    ignored = [line.strip("/") for line in lines if line and not line.startswith("#")] + [".git"]

    def kept(path: Path) -> bool:
        relative = path.relative_to(ROOT).as_posix()
        return not any(fnmatch(path.name, pattern) or fnmatch(relative, pattern) for pattern in ignored)

    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if kept(Path(folder, name))]
        yield from (path for name in files if kept(path := Path(folder, name)))


PYTHON_FILES = sorted(path for path in project_files() if path.suffix == ".py")


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code: no blank line, no comment, no docstring."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def function_sizes(source: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    """Each function of a module, methods and nested ones too, with its number of code lines."""
    lines = code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, sum(node.lineno <= line <= (node.end_lineno or node.lineno) for line in lines)


def size_offences(source: str) -> list[str]:
    """What is too long in a module."""
    offences = []
    total = len(source.splitlines())
    if total > FILE_LINES:
        offences.append(f"{total} lines, at most {FILE_LINES}")
    for function, size in function_sizes(source):
        triton = any("triton" in ast.unparse(decorator) for decorator in function.decorator_list)
        limit = TRITON_LINES if triton else FUNCTION_LINES
        if size > limit:
            offences.append(f"{function.name}: {size} code lines, at most {limit}")
    return offences


def path_offences(text: str) -> list[str]:
    """The lines of a text that name a path of one machine."""
    return [line for line in text.splitlines() if MACHINE_PATH.search(line)]


def test_sizes() -> None:
    found = {path.relative_to(ROOT).as_posix(): size_offences(path.read_text()) for path in PYTHON_FILES}
    assert {path: offences for path, offences in found.items() if offences} == {}


def test_most_functions_of_the_package_are_short() -> None:
    package = [path for path in PYTHON_FILES if path.is_relative_to(ROOT / "diffusers_concept_maps")]
    sizes = sorted(size for path in package for _, size in function_sizes(path.read_text()))
    assert sizes[len(sizes) * 9 // 10] <= 45


def test_no_path_of_one_machine() -> None:
    texts = [path for path in project_files() if path.suffix in TEXT]
    assert {path.name for path in texts} >= {"pyproject.toml", "README.md", "LICENSE", "run", "test_style.py"}
    found = {path.relative_to(ROOT).as_posix(): path_offences(path.read_text()) for path in texts}
    assert {path: lines for path, lines in found.items() if lines} == {}


def body(lines: int) -> str:
    return "".join(f"    x = {number}\n" for number in range(lines))


@pytest.mark.parametrize(
    ("source", "offences"),
    [
        ("def f():\n" + body(60), ["f: 61 code lines, at most 60"]),
        ("class A:\n    async def f(self):\n" + body(70).replace("    ", " " * 8), ["f: 71 code lines, at most 60"]),
        ("@triton.jit\ndef f():\n" + body(120), ["f: 121 code lines, at most 120"]),
        ("x = 1\n" * 401, ["401 lines, at most 400"]),
        ('def f():\n    """Doc.\n\n    More.\n    """\n\n    # why\n' + body(59), []),
        ("@triton.jit\ndef f():\n" + body(119), []),
    ],
)
def test_sizes_are_counted(source: str, offences: list[str]) -> None:
    assert size_offences(source) == offences


@pytest.mark.parametrize("folder", ["home", "opt", "root", "tmp", "work"])
def test_a_machine_path_is_found(folder: str) -> None:
    path = f"/{folder}/x"
    offending = [f"open('{path}')", f"see {path}", f"file://{path}", path]
    assert path_offences("\n".join(offending)) == offending
    assert path_offences(f"https://example.org{path}\n..{path}\n$HOME{path}\n#!/usr/bin/env bash") == []
