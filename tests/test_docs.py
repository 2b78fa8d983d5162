"""Links in the documentation lead somewhere, and every picture that is shown is there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#]+)[^)]*\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_the_readme_shows_the_contact_sheet_of_the_command() -> None:
    assert "docs/images/contact_sheet.png" in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    with Image.open(ROOT / "docs" / "images" / "contact_sheet.png") as sheet:
        assert sheet.width > 600


def test_the_page_of_the_backbones_is_what_they_declare() -> None:
    make = runpy.run_path(str(ROOT / "docs" / "make_backbones.py"))
    assert (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8") == make["page"](), "run docs/make_backbones.py"
