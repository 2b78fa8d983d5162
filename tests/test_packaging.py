"""What is installed: two packages, their data, five dependencies, and never Hugging Face's `kernels`."""

from __future__ import annotations

import ast
import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from markers import needs_xformers
from packaging.requirements import Requirement

import diffusers_concept_maps

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffusers_concept_maps"
KERNELS = ROOT / "kernels"
KERNEL_PACKAGE = KERNELS / "torch-ext" / "concept_map_kernels"
BASE = {"torch", "diffusers", "transformers", "safetensors", "numpy"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Standard output of a fresh interpreter."""
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def build(tree: Path, kind: str) -> Path:
    """Build the sdist or the wheel of a source tree with the setuptools at hand, hence without a network."""
    call = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    return tree / "dist" / python("-c", call, cwd=tree).splitlines()[-1]


def names_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, since a build writes into its tree."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    for folder in (PACKAGE, KERNELS):
        shutil.copytree(folder, copy / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel_names(tree: Path) -> set[str]:
    return names_of(build(tree, "wheel"))


def test_wheel_holds_exactly_the_two_packages(wheel_names: set[str]) -> None:
    packages = {name for name in wheel_names if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT) for path in PACKAGE.rglob("*") if path.is_file()}
    expected |= {path.relative_to(KERNEL_PACKAGE.parent) for path in KERNEL_PACKAGE.rglob("*") if path.is_file()}
    assert packages == {path.as_posix() for path in expected if "__pycache__" not in path.parts}
    assert {name.split("/")[0] for name in packages} == {"diffusers_concept_maps", "concept_map_kernels"}


def test_wheel_carries_the_embedded_pipeline_the_types_and_the_license(wheel_names: set[str]) -> None:
    pipeline = "diffusers_concept_maps/shapes/pipeline"
    version = f"diffusers_concept_maps-{diffusers_concept_maps.__version__}"
    assert wheel_names >= {
        f"{pipeline}/model_index.json",
        f"{pipeline}/transformer/diffusion_pytorch_model.safetensors",
        "diffusers_concept_maps/py.typed",
        "concept_map_kernels/py.typed",
        f"{version}.dist-info/licenses/LICENSE",
    }


def test_sdist_builds_the_same_wheel(tree: Path, wheel_names: set[str], tmp_path: Path) -> None:
    with tarfile.open(build(tree, "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert names_of(build(unpacked, "wheel")) == wheel_names
    assert (unpacked / "kernels" / "build.toml").is_file()


def test_package_data_is_small() -> None:
    data = [path for path in (*PACKAGE.rglob("*"), *KERNEL_PACKAGE.rglob("*")) if path.is_file()]
    assert sum(path.stat().st_size for path in data if path.suffix not in {".py", ".pyc"}) < 10_000_000


def test_base_dependencies() -> None:
    names = [re.split(r"[^\w.-]", requirement)[0] for requirement in PROJECT["dependencies"]]
    assert len(names) == 5
    assert set(names) == BASE
    assert not any("<" in requirement or "==" in requirement for requirement in PROJECT["dependencies"])


def test_both_packages_have_one_version() -> None:
    # Read, not imported: the kernels need triton, which is not for every system.
    text = (KERNEL_PACKAGE / "__init__.py").read_text()
    assert f'\n__version__ = "{diffusers_concept_maps.__version__}"\n' in text


def test_build_toml_is_named_after_the_kernel_package() -> None:
    general = tomllib.loads((KERNELS / "build.toml").read_text())["general"]
    packages = [path.parent.name for path in (KERNELS / "torch-ext").glob("*/__init__.py")]
    assert packages == [general["name"].replace("-", "_")]
    assert general["license"] == PROJECT["license"]


def test_kernels_is_no_package() -> None:
    assert not (KERNELS / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or "site-packages" in Path(spec.origin).parts


def test_an_installed_kernels_package_wins_over_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'hugging face'")
    # `python -c` puts the working directory first on the path, before PYTHONPATH.
    found = python("-c", "import kernels; print(kernels.owner)", cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert found == "hugging face"


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def runs_later(node: ast.AST) -> bool:
    """Whether the statement's body does not run when its module is imported."""
    typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    return typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def imports(tree: ast.AST, *, at_import_time: bool) -> Iterator[str]:
    """Names of the modules that a module imports absolutely, inside functions too unless `at_import_time`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (at_import_time and runs_later(node)):
            yield from imports(node, at_import_time=at_import_time)


def foreign_imports(folder: Path, allowed: set[str], *, at_import_time: bool) -> dict[str, set[str]]:
    """By file: imports from outside the standard library and `allowed`."""
    found = {}
    for path in folder.rglob("*.py"):
        modules = set(imports(parse(path), at_import_time=at_import_time))
        foreign = {name for name in modules if name.split(".")[0] not in sys.stdlib_module_names | allowed}
        found[path.relative_to(folder).as_posix()] = foreign
    return {name: modules for name, modules in found.items() if modules}


def test_package_can_be_imported_with_its_base_dependencies_alone() -> None:
    # Pillow is a dependency of diffusers, whose frames are its images; tokenizers is one of transformers.
    allowed = BASE | {"PIL", "tokenizers", "diffusers_concept_maps", "concept_map_kernels"}
    assert foreign_imports(PACKAGE, allowed, at_import_time=True) == {}


def test_kernel_package_imports_nothing_but_torch_and_triton() -> None:
    assert foreign_imports(KERNEL_PACKAGE, {"torch", "triton"}, at_import_time=False) == {}


def test_kernel_package_registers_no_op() -> None:
    imported = {name for path in KERNEL_PACKAGE.rglob("*.py") for name in imports(parse(path), at_import_time=False)}
    assert not any(name.startswith("torch.library") for name in imported)
    assert not any("torch.library" in path.read_text() for path in KERNEL_PACKAGE.rglob("*.py"))


def test_kernel_package_hides_no_failure() -> None:
    """Whoever loads it is told that triton is missing; falling back is up to the library."""
    modules = [parse(path) for path in KERNEL_PACKAGE.rglob("*.py")]
    assert not any(isinstance(node, ast.Try) for module in modules for node in ast.walk(module))


def test_every_kernel_module_says_where_it_is_enabled_and_is_public() -> None:
    public = set(names_in(KERNEL_PACKAGE / "__init__.py", "__all__"))
    modules = [path for path in KERNEL_PACKAGE.glob("*.py") if not path.name.startswith("_")]
    exported = {name for path in modules for name in names_in(path, "__all__")}
    assert {path.stem for path in modules if "supports" not in names_in(path, "__all__")} == set()
    assert public <= exported


def names_in(path: Path, variable: str) -> list[str]:
    """The strings of a list that a module assigns to a variable."""
    (value,) = (
        node.value
        for node in parse(path).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == variable
    )
    names: list[str] = ast.literal_eval(value)
    return names


def test_imports_are_found(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "module.py").write_text("import torch")
    (tmp_path / "module.py").write_text(
        "import os, triton\nfrom torch import library\nfrom . import other\n"
        "if TYPE_CHECKING:\n    import imageio\n"
        "if True:\n    import sklearn.metrics\n"
        "def f():\n    from matplotlib import pyplot\n"
    )
    early = {"triton", "torch.library", "sklearn.metrics"}
    other = {"other/module.py": {"torch"}}
    assert foreign_imports(tmp_path, set(), at_import_time=True) == {"module.py": early} | other
    everything = early | {"imageio", "matplotlib.pyplot"}
    assert foreign_imports(tmp_path, set(), at_import_time=False) == {"module.py": everything} | other
    assert foreign_imports(tmp_path, {"torch", "triton", "sklearn"}, at_import_time=True) == {}


def test_no_test_skips_where_the_extra_brings_xformers() -> None:
    wanted = {
        requirement.name: requirement for requirement in map(Requirement, PROJECT["optional-dependencies"]["test"])
    }
    condition = wanted["xformers"].marker
    assert condition is not None
    assert [not condition.evaluate()] == list(needs_xformers.args)


def test_import_is_light() -> None:
    loaded = python("-c", "import sys, diffusers_concept_maps; print(*sys.modules)", cwd=ROOT).split()
    assert {"matplotlib", "imageio", "triton"}.isdisjoint(loaded)


def test_every_public_name_needs_no_other_import() -> None:
    call = (
        "import diffusers_concept_maps as dcm; print(dcm.parity.IMAP.name, dcm.backbones.supported()[0]); "
        "[getattr(dcm, name) for name in dcm.__all__]"
    )
    assert python("-c", call, cwd=ROOT) == "imap AuraFlowTransformer2DModel"
    assert sorted(diffusers_concept_maps._HOME) == diffusers_concept_maps.__all__


def test_command_exists() -> None:
    assert callable(pkgutil.resolve_name(PROJECT["scripts"]["concept-maps"]))
