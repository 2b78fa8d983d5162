"""The page of exports runs from top to bottom, and its picture is what its first command makes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from exported import entries, facts, manifest
from PIL import Image

from diffusers_concept_maps import cli

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_exports_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "export.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for language, source in blocks:
        if language == "bash":
            for line in source.splitlines():
                assert cli.main(shlex.split(line)[1:]) == 0
        elif language == "python":
            exec(source, names)
    made = {"words", "layers", "kept", "red", "detail.safetensors", "steps", "means"}
    assert {path.name for path in tmp_path.iterdir()} == made
    layers = tmp_path / "layers"
    for file in ("video.mp4", *(f"concepts/{name}" for name in ("00_red/layer-00.mkv", "sharpening/00_red.mkv"))):
        assert (layers / file).is_file()
    assert len(entries(layers / "concepts", kind="clip")) == 2 * 5
    assert [entry["path"] for entry in entries(tmp_path / "red", step=3)] == ["00_red/step-003"]
    assert manifest(tmp_path / "red")["axes"]["layer"] == [2, 3]
    steps = entries(tmp_path / "steps", concept="circle")
    assert [facts(tmp_path / "steps" / entry["path"])["source_size"] for entry in steps] == [(240, 240)] * 4
    (shown,) = (json.loads(source) for language, source in blocks if language == "json")
    assert set(shown) == set(entries(tmp_path / "red")[0])
    with (
        Image.open(DOCS / "images" / "export.png") as documented,
        Image.open("words/words/grid_step/00003.png") as first,
    ):
        assert documented.size == first.size
