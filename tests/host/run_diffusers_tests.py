"""Run diffusers' own model and pipeline tests without and with a capture on every model they build, and compare.

python tests/host/run_diffusers_tests.py CHECKOUT

CHECKOUT is a checkout of diffusers, best of the installed version; its tests run against the installed one. Needed
besides the `test` extra is what they import, the `host-tests` extra. Nothing is fetched. The exit status is 1 where a
test ends differently, or a family's models were not captured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "host_tests.md"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
Tests = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """Tests of one model family, as paths below diffusers' `tests`."""

    name: str
    transformer: str
    paths: tuple[str, ...]


FAMILIES = (
    Family(
        "CogVideoX",
        "CogVideoXTransformer3DModel",
        ("models/transformers/test_models_transformer_cogvideox.py", "pipelines/cogvideo"),
    ),
    Family(
        "Wan",
        "WanTransformer3DModel",
        (
            "models/transformers/test_models_transformer_wan.py",
            "models/transformers/test_models_transformer_wan_vace.py",
            "pipelines/wan",
        ),
    ),
    Family(
        "HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        ("models/transformers/test_models_transformer_hunyuan_video.py", "pipelines/hunyuan_video"),
    ),
    Family(
        "Flux",
        "FluxTransformer2DModel",
        ("models/transformers/test_models_transformer_flux.py", "pipelines/flux"),
    ),
    Family(
        "SD3",
        "SD3Transformer2DModel",
        ("models/transformers/test_models_transformer_sd3.py", "pipelines/stable_diffusion_3"),
    ),
)


@dataclass(frozen=True)
class Result:
    """Outcomes of the tests of one family, by test."""

    family: str
    plain: Tests
    captured: Tests

    @property
    def different(self) -> list[str]:
        """Tests that end differently, or fail for another reason."""
        names = sorted(self.plain.keys() | self.captured.keys())
        return [name for name in names if self._end(self.plain, name) != self._end(self.captured, name)]

    @staticmethod
    def _end(tests: Tests, name: str) -> tuple[str, str] | None:
        return (tests[name]["outcome"], tests[name]["message"]) if name in tests else None

    @property
    def captures(self) -> tuple[int, int]:
        """Number of captures that were attached, and of those that have maps."""
        numbers = [test.get("captures", (0, 0)) for test in self.captured.values()]
        return sum(attached for attached, _ in numbers), sum(filled for _, filled in numbers)

    @property
    def good(self) -> bool:
        """No difference, and not for want of captures."""
        return not self.different and self.captures[1] > 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="checkout of diffusers")
    parser.add_argument("--families", nargs="+", choices=[family.name for family in FAMILIES], help="all by default")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write the result")
    parser.add_argument("--workers", type=int, default=0, help="processes of pytest-xdist")
    options = parser.parse_args(arguments)
    tests = options.checkout / "tests"
    if not (tests / "testing_utils.py").is_file():
        parser.error(f"{options.checkout} holds no tests/testing_utils.py; pass a checkout of diffusers")
    with tempfile.TemporaryDirectory() as folder:
        results = run_all(tests, Path(folder), options.families, options.workers)
    options.page.write_text(page(results, tests_version(options.checkout)), encoding="utf-8")
    for result in results:
        print(*row(result), sep="\t")
        print(*(f"  different: {name}" for name in result.different), sep="\n")
    return 0 if results and all(result.good for result in results) else 1


def run_all(tests: Path, workplace: Path, chosen: list[str] | None, workers: int) -> list[Result]:
    """Run the tests of every family that can be traced, in a copy: beside the sources they would import those."""
    from tiny_hub import write_tiny_hub

    from diffusers_concept_maps.backbones import supported

    shutil.copytree(tests, workplace / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    write_tiny_hub(workplace / "hub")
    results = []
    for family in FAMILIES:
        if family.transformer in supported() and (chosen is None or family.name in chosen):
            paths = [f"tests/{path}" for path in family.paths if (workplace / "tests" / path).exists()]
            plain, captured = (run(workplace, paths, attach, workers) for attach in (False, True))
            results.append(Result(family.name, plain, captured))
    return results


def run(workplace: Path, paths: Iterable[str], attach: bool, workers: int) -> Tests:
    """Outcomes of these tests in a process of their own."""
    outcomes = workplace / "outcomes.json"
    outcomes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "capture_plugin", "-p", "no:cacheprovider", "-q", "--tb=short"]
    command += [f"--outcomes={outcomes}", *(["--attach-captures"] if attach else []), f"--numprocesses={workers}"]
    python_path = [str(Path(__file__).parent), str(ROOT), str(ROOT / "kernels" / "torch-ext")]
    environment = os.environ | OFFLINE
    environment["PYTHONPATH"] = os.pathsep.join([*python_path, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["HF_HOME"] = str(workplace / "hub")
    done = subprocess.run(
        [*command, *paths], cwd=workplace, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode not in (0, 1) or not outcomes.exists():  # neither all passed nor some failed
        raise SystemExit(f"pytest ended with status {done.returncode}:\n{done.stdout[-4000:]}")
    found: Tests = json.loads(outcomes.read_text())
    return found


def tests_version(checkout: Path) -> str:
    """Version that the checkout calls itself, with its commit where it has one."""
    source = (checkout / "src" / "diffusers" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "([^"]+)"', source)
    commit = subprocess.run(
        ["git", "-C", checkout, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return " ".join([found[1] if found else "unknown", *([f"({commit})"] if commit else [])])


def row(result: Result) -> list[str]:
    """Name, tests, passed, skipped, failed, captures, captures with maps, differences."""
    ends = Counter(test["outcome"] for test in result.plain.values())
    numbers = (len(result.plain), ends["passed"], ends["skipped"], ends["failed"], *result.captures)
    return [result.family, *map(str, numbers), str(len(result.different))]


def page(results: list[Result], version: str) -> str:
    """The result as a page of the documentation."""
    packages = ("diffusers", "torch", "transformers")
    installed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    columns = ["family", "tests", "passed", "skipped", "failed", "captures", "with maps", "different with captures"]
    table = [columns, ["---", *["---:"] * (len(columns) - 1)], *map(row, results)]
    failed = [name for r in results for name, test in sorted(r.plain.items()) if test["outcome"] == "failed"]
    different = [name for result in results for name in result.different]
    return "\n".join(
        [
            *(_HEAD, ""),
            *(f"| {' | '.join(cells)} |" for cells in table),
            *("", f"Tests of diffusers {version} against {installed}, Python {platform.python_version()}.", ""),
            *_list("Different with captures", different),
            *_list("Failed without captures, and in the same way with them", sorted({*failed} - {*different})),
        ]
    )


_HEAD = """# diffusers' own tests

Written by `python tests/host/run_diffusers_tests.py CHECKOUT`, which runs diffusers' model and pipeline tests twice:
as they are, and with a capture attached to every transformer that they build, by all methods. Tests have to end alike,
with the same message where they fail. The encoders that the tests load from the hub are random stand-ins, so that
tests that expect the numbers of the published ones fail; skipped are tests that need an accelerator, or are slow."""


def _list(title: str, names: list[str]) -> list[str]:
    return [f"## {title}", "", *(f"- `{name.removeprefix('tests/')}`" for name in names), ""] if names else []


if __name__ == "__main__":
    sys.exit(main())
