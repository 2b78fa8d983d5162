"""Write the pages of the errors from the code that raises them: `python docs/make_errors.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "diffusers_concept_maps"
DOCS = Path(__file__).parent
BASE = "ConceptMapsError"
INDEX = """\
# Errors

All that this package refuses is a `dcm.ConceptMapsError`; where an argument has a value that cannot be used, it is a
`dcm.ConceptMapsValueError`, which is a `ValueError` as well. A message says what was given, what was expected and what
to do about it. On the command line it is one line on standard error and status 2. Written by
`python docs/make_errors.py`.

| error | raised in so many places |
|---|---|
"""
PAGE = """\
# {kind}

Every message of [this error](../errors.md), by the module and function that raises it, with what is filled in between
braces; `...` stands for a text that is put together elsewhere.

"""


def pages() -> dict[str, str]:
    """The text of every page, by path within `docs`: one for each class, and their index."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    classes = _classes(trees.values())
    found = {path: list(_errors(tree, classes)) for path, tree in trees.items()}
    counts = {kind: sum(error[1] == kind for errors in found.values() for error in errors) for kind in sorted(classes)}
    rows = (f"| [`{kind}`](errors/{kind}.md) | {count} |" for kind, count in counts.items() if count)
    texts = {"errors.md": INDEX + "\n".join(rows) + "\n"}
    for kind in (kind for kind, count in counts.items() if count):
        chosen = {path: [error for error in errors if error[1] == kind] for path, errors in found.items()}
        lines = [line for path, errors in chosen.items() if errors for line in _section(path, errors)]
        texts[f"errors/{kind}.md"] = PAGE.format(kind=kind) + "\n".join(lines)
    return texts


def _classes(trees: Iterable[ast.Module]) -> set[str]:
    """Names of the base class and of all that inherit from it, in whatever module."""
    parents = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    names = {BASE}
    while more := {name for name, bases in parents.items() if bases & names} - names:
        names |= more
    return names


def _errors(node: ast.AST, classes: set[str], where: str = "") -> Iterator[tuple[str, str, str]]:
    """Of each error that is made: the function, the class and the message."""
    for child in ast.iter_child_nodes(node):
        inside = where
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = f"{where}.{child.name}".lstrip(".")
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id in classes:
            yield where, child.func.id, _message(child.args[0]) if child.args else "..."
        yield from _errors(child, classes, inside)


def _message(node: ast.expr) -> str:
    """The text of a message, with what is filled in as the code has it."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_message(value) for value in values)
        case ast.FormattedValue(value=value):
            return f"{{{ast.unparse(value)}}}"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _message(left) + _message(right)
    return "..."


def _section(path: Path, found: list[tuple[str, str, str]]) -> Iterator[str]:
    yield from (f"## {path.relative_to(PACKAGE.parent).as_posix()}", "")
    for where, _, message in found:
        yield f"- `{where or path.stem}`: {_code(' '.join(message.split()))}"
    yield ""


def _code(text: str) -> str:
    """A code span, whose fence is longer than any run of backticks within."""
    fence = "`"
    while fence in text:
        fence += "`"
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    (DOCS / "errors").mkdir(exist_ok=True)
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
