"""Set-up of the kernel tests: on a GPU where there is one, else on CPU tensors in Triton's interpreter."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

if sys.platform != "linux":
    collect_ignore_glob = ["test_*.py"]  # there is no triton
else:
    from concept_map_kernels._common import INTERPRETED

    assert INTERPRETED or torch.cuda.is_available(), (
        "kernels run on CPU tensors only in Triton's interpreter: run pytest from the root of the project, whose "
        "tests/conftest.py sets TRITON_INTERPRET before triton is imported, and do not set it to 0"
    )


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """`torch.empty` and its kin are full of NaN, so that what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
