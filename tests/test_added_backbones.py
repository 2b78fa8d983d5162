"""Backbones from elsewhere: two files make one, other packages bring theirs, and this diffusers may lack some."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones._oracle import embeds_of
from torch import nn

import diffusers_concept_maps as dcm
from diffusers_concept_maps import backbones
from diffusers_concept_maps.backbones.cogvideox import BACKBONE as COGVIDEOX

ROOT = Path(__file__).parents[1]
ADDED = ROOT / "tests" / "backbones" / "added"


def test_two_files_add_a_backbone(tmp_path: Path) -> None:
    """One source and one test file, in a copy of the project: it is supported, and under the contract."""
    package = "diffusers_concept_maps"
    shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests" / "backbones").mkdir(parents=True)
    shared = [*(ROOT / "tests" / "backbones").glob("_*.py"), ROOT / "tests" / "backbones" / "test_contract.py"]
    for path in (ROOT / "pyproject.toml", ROOT / "tests" / "conftest.py", ROOT / "tests" / "naive.py", *shared):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    shutil.copy(ADDED / "cogview3plus.py", tmp_path / "diffusers_concept_maps" / "backbones")
    shutil.copy(ADDED / "tiny_cogview3plus.py", tmp_path / "tests" / "backbones")
    (tmp_path / "test_supported.py").write_text(
        "from diffusers_concept_maps.backbones import supported\n"
        "def test_CogView3(): assert 'CogView3PlusTransformer2DModel' in supported()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "CogView3"]
    paths = ["test_supported.py", "tests/backbones/test_contract.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*command, *paths], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    found = re.search(r"^(\d+) passed, \d+ deselected", done.stdout, re.MULTILINE)
    assert found is not None
    assert int(found[1]) > 8  # nothing is skipped


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A registry of its own that has not looked for entry points, and the warnings that it gives."""
    warnings: list[str] = []
    monkeypatch.setattr(backbones, "_BACKBONES", dict(backbones._BACKBONES))
    monkeypatch.setattr(backbones.logger, "warning", warnings.append)
    backbones._add_entry_points.cache_clear()
    yield warnings
    backbones._add_entry_points.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Installs a package of one module, as pip would, with its entry points."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(source: str, entries: str) -> None:
        (tmp_path / "elsewhere.py").write_text(source)
        folder = tmp_path / "elsewhere-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[{backbones.ENTRY_POINTS}]\n{entries}\n")
        monkeypatch.delitem(sys.modules, "elsewhere", raising=False)

    return install


def test_another_package_adds_a_backbone(fresh: list[str], install: Callable[[str, str], None]) -> None:
    install((ADDED / "cogview3plus.py").read_text(), "cogview3plus = elsewhere:BACKBONE")
    assert "elsewhere" not in sys.modules  # it is loaded when a backbone is first asked for
    assert "CogView3PlusTransformer2DModel" in backbones.supported()
    from backbones.added.tiny_cogview3plus import CASES

    (case,) = CASES
    transformer = case.make()
    with dcm.trace(transformer, concept_embeds=embeds_of(case)) as maps:
        transformer(**case.inputs(1, 5, 0))
    assert maps.get().shape == (1, 3, *case.grid)
    assert fresh == []


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("BACKBONE = 3", "ConceptMapsValueError: 3 is no backbone; expected an instance of a subclass of Backbone"),
        (
            "from diffusers_concept_maps.backbones.cogvideox import CogVideoXBackbone\nBACKBONE = CogVideoXBackbone()",
            "ConceptMapsError: CogVideoXTransformer3DModel belongs to CogVideoXBackbone; remove it",
        ),
    ],
)
def test_a_broken_one_is_left_out(
    source: str, reason: str, fresh: list[str], install: Callable[[str, str], None]
) -> None:
    before = set(backbones._BACKBONES)
    install(source, "broken = elsewhere:BACKBONE")
    assert set(backbones.supported()) == before
    assert set(backbones.supported()) == before
    (warning,) = fresh
    assert warning.startswith("The backbone broken (elsewhere:BACKBONE) of another package is left out, because it ")
    assert reason in warning


class Stranger(nn.Module):
    pass


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a module of this source the only one beside the package's `__init__`, and registers it."""
    monkeypatch.setattr(backbones, "__path__", [str(tmp_path)])
    monkeypatch.setattr(backbones, "_BACKBONES", {})
    monkeypatch.setattr(backbones, "_UNAVAILABLE", {})

    def register(source: str) -> None:
        (tmp_path / "newest.py").write_text(source)
        try:
            backbones._add_own()
        finally:
            sys.modules.pop("diffusers_concept_maps.backbones.newest", None)
            backbones.__dict__.pop("newest", None)

    return register


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("from diffusers.models.attention_processor import NewAttnProcessor", "cannot import name 'NewAttnProcessor'"),
        ("from diffusers import NewTransformer3DModel", "cannot import name 'NewTransformer3DModel'"),
        ("import diffusers.models.transformers.transformer_new", "No module named 'diffusers.models.transformers"),
    ],
)
def test_what_diffusers_lacks_is_left_out_and_named(source: str, reason: str, own: Callable[[str], None]) -> None:
    own(source)
    assert "CogVideoXTransformer3DModel" not in backbones.supported()
    with pytest.raises(dcm.ConceptMapsError, match=f"Stranger .* diffusers [^ ]+ lacks .*: newest: {reason}"):
        backbones.find_backbone(Stranger())
    with pytest.raises(dcm.ConceptMapsError, match="^Stranger cannot be traced"):
        backbones.find_backbone(torch.compile(Stranger()))


def test_a_class_that_diffusers_lacks_is_left_out(own: Callable[[str], None]) -> None:
    own(
        "from diffusers_concept_maps.backbones.cogvideox import CogVideoXBackbone\n"
        "class NewBackbone(CogVideoXBackbone):\n"
        "    transformer_classes = ('CogVideoXTransformer3DModel', 'CogVideoNextTransformer3DModel')\n"
        "BACKBONE = NewBackbone()\n"
    )
    assert backbones.supported() == ("CogVideoXTransformer3DModel",)


def test_a_mistake_of_our_own_is_not_hidden(own: Callable[[str], None]) -> None:
    with pytest.raises(ImportError, match="nowhere"):
        own("import nowhere")
    with pytest.raises(ImportError, match="cannot import name 'nothing' from 'diffusers_concept_maps"):
        own("from diffusers_concept_maps.errors import nothing")


def test_all_of_ours_are_there() -> None:
    """With the newest diffusers, which the suite is run with, nothing is missing."""
    assert backbones._UNAVAILABLE == {}


def test_what_is_no_backbone_is_refused() -> None:
    impostor: Any = object
    with pytest.raises(dcm.ConceptMapsValueError, match="is no backbone; expected an instance"):
        backbones.register(impostor)
    with pytest.raises(dcm.ConceptMapsError, match="belongs to CogVideoXBackbone"):
        backbones.register(COGVIDEOX)
