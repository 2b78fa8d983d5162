"""Without a triton that works, everything runs on the reference, and one warning says why and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
CAPTURE = """
import sys
import torch
import diffusers_concept_maps as dcm
from backbones import tiny_cogvideox as tiny
from diffusers_concept_maps import dispatch

assert "concept_map_kernels" not in sys.modules
transformer = tiny.make_transformer(layers=2)
generator = torch.Generator().manual_seed(0)
inputs = {
    "hidden_states": torch.randn(2, 3, 4, 6, 10, generator=generator),
    "encoder_hidden_states": torch.randn(2, 12, 32, generator=generator),
    "timestep": torch.tensor([900, 900]),
}


def capture(backend):
    embeds = torch.linspace(-1, 1, 96).view(3, 32)
    methods = ["concept_attention", "gramcol", "imap"]
    with torch.no_grad(), dispatch.use_backend(backend), dcm.trace(
        transformer, concept_embeds=embeds, methods=methods
    ) as maps:
        transformer(**inputs)
    return [maps.get(method) for method in methods]


expected = capture("auto")
print("no kernel was wanted", file=sys.stderr)
assert all(torch.equal(*pair) for pair in zip(capture("kernels"), expected, strict=True))
assert all(map_.isfinite().all() and map_.std() > 0 for map_ in expected)
"""


INSTALL = "install triton 3.6 or newer: pip install 'diffusers-concept-maps[kernels]'"
REINSTALL = f"reinstall diffusers-concept-maps, or try another release of triton than {version('triton')}"


def check(capture: str, reason: str, remedy: str, *path: Path) -> None:
    """Run a capture in a fresh interpreter that finds modules in `path` first."""
    found = os.pathsep.join([*map(str, path), str(TESTS), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", capture],
        env=os.environ | {"PYTHONPATH": found, "DIFFUSERS_VERBOSITY": "warning"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    before, after = result.stderr.split("no kernel was wanted\n")
    assert "triton" not in before
    assert after.splitlines() == [
        f"Concept maps run on PyTorch alone, slower than with their Triton kernels: {reason}. To use the kernels, "
        f"{remedy}"
    ]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        pytest.param(
            "ModuleNotFoundError(\"No module named 'triton'\", name='triton')",
            "ModuleNotFoundError: No module named 'triton'",
            id="missing",
        ),
        pytest.param(
            "ImportError('libtriton.so: undefined symbol: _ZN4mlir')",
            "ImportError: libtriton.so: undefined symbol: _ZN4mlir",
            id="broken",
        ),
    ],
)
def test_triton_cannot_be_imported(error: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(f"raise {error}")
    check(CAPTURE, f"triton cannot be imported ({reason})", INSTALL, tmp_path)


def test_the_kernels_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "concept_map_kernels").mkdir()
    (tmp_path / "concept_map_kernels" / "__init__.py").write_text("raise ImportError('half of a download')")
    reason = "concept_map_kernels cannot be imported (ImportError: half of a download)"
    check(CAPTURE, reason, REINSTALL, tmp_path)


@pytest.mark.parametrize(
    ("change", "reason", "remedy"),
    [
        pytest.param("triton.__version__ = '3.5.1'", "triton 3.5.1 is too old", INSTALL, id="old"),
        pytest.param(
            "del triton.__version__",
            "triton cannot be imported (AttributeError: module 'triton' has no attribute '__version__')",
            INSTALL,
            id="broken",
        ),
        pytest.param(
            "del triton.knobs",
            "concept_map_kernels cannot be imported (AttributeError: module 'triton' has no attribute 'knobs')",
            REINSTALL,
            id="other",
        ),
    ],
)
def test_triton_is_not_what_the_kernels_expect(change: str, reason: str, remedy: str) -> None:
    # PyTorch and diffusers need a triton in which everything is where they look for it: it is changed after them.
    check(CAPTURE.replace("\nexpected =", f"\nimport triton\n{change}\nexpected ="), reason, remedy)
