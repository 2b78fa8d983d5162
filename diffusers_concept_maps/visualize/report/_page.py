"""The page as text: the parts that lie beside this file, and the data, in one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

_SCRIPTS = ("colors.js", "maps.js", "picture.js", "panels.js", "page.js")
_SLOT = re.compile(r"@(POLICY|STYLE|DATA|SCRIPT)@")
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def page(data: Mapping[str, Any]) -> str:
    """The whole page.

    A policy in its head allows the style and the script of this package by their hashes, pictures that are in the
    page, and nothing else: no network, and no script that text of a user might contain.

    Args:
        data: what `_data.gather` returns.
    """
    style = _part("page.css")
    script = "".join(_part(name) for name in _SCRIPTS)
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}; "
        f"base-uri 'none'; form-action 'none'"
    )
    slots = {"POLICY": policy, "STYLE": style, "DATA": embedded(data), "SCRIPT": script}
    return _SLOT.sub(lambda slot: slots[slot[1]], _part("page.html"))


def embedded(data: Mapping[str, Any]) -> str:
    """JSON for a script element: no character in it can end the element or begin a tag, a comment or a line."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
