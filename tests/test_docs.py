"""Links in the documentation lead somewhere, and every picture that is shown is there."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusers_concept_maps import cli
from diffusers_concept_maps.commands import generate

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


@pytest.mark.parametrize("script", ["make_api.py", "make_backbones.py", "make_errors.py"])
def test_generated_pages_are_what_the_code_says(script: str) -> None:
    pages = runpy.run_path(str(ROOT / "docs" / script))["pages"]()
    stale = [name for name, text in pages.items() if (ROOT / "docs" / name).read_text(encoding="utf-8") != text]
    assert not stale, f"run docs/{script}"


def test_no_page_is_of_a_backbone_that_is_gone() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "make_backbones.py"))["pages"]()
    written = {f"backbones/{path.name}" for path in (ROOT / "docs" / "backbones").glob("*.md")}
    assert written | {"backbones.md"} == set(pages)


def test_every_page_of_the_site_is_in_its_navigation_once() -> None:
    config = (ROOT / "docs" / "site" / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"[\w/]+\.md$", config.partition("\nnav:\n")[2], re.MULTILINE)
    there = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(there)


def test_links_of_the_site_stay_in_it_and_their_anchors_exist() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            file = (page.parent / target).resolve() if target else page
            assert file.is_relative_to(ROOT / "docs"), (page, target)
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}


def test_the_page_of_encoding_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "encode.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for language, source in re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if language == "bash":
            for line in source.splitlines():
                assert cli.main(shlex.split(line)[1:]) == 0
        else:
            exec(source, names)
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "encoded", "red.mp4"}
    assert generate.DEFAULT_PROMPT in page
    maps = names["maps"]
    assert maps.detail().shape == (4, 1, 2, *maps.get().shape[2:])
    assert maps.metadata["seeds"] == [7, 8]
    assert f'# "{maps.fit.describe()}"' in page
    assert str(maps.metadata["source"]).replace("'", '"') in page
    with (
        Image.open(ROOT / "docs" / "images" / "encode.png") as documented,
        Image.open("encoded/contact_sheet.png") as made,
    ):
        assert documented.size == made.size


def test_the_page_of_pictures_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "visualize.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for language, source in re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if language == "bash":
            assert cli.main(shlex.split(source)[1:]) == 0
        else:
            exec(source, names)
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "red.mp4", "red_layer.webp", "sheet.png"}
    frames, layers = names["frames"], names["layers"]
    assert [picture.size for picture in names["shown"]] == [frame.size for frame in frames]
    assert {picture.mode for picture in layers} == {"RGBA"}
    with Image.open("red_layer.webp") as stored, Image.open(ROOT / "docs" / "images" / "overlay.png") as documented:
        assert stored.n_frames == len(frames)
        stored.seek(3)
        assert stored.convert("RGBA").tobytes() == layers[3].tobytes()
        assert documented.width > 600
