"""Write `docs/host.md`: `python docs/make_host.py`. A test runs it, and compares."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from host._features import page

PAGE = Path(__file__).parent / "host.md"

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
