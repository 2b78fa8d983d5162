"""Set-up of the kernel tests: on a GPU where there is one, else on CPU tensors in Triton's interpreter."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

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


@pytest.fixture
def far_apart(tmp_path: Path, device: torch.device) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Copies a tensor so that along one axis the stride fits into 32 bits, and offsets do not.

    An offset that wraps around leads into memory of the copy, too. On a CPU the file behind it has holes, so that it
    takes no room, and every offset from the third entry on is too long; on a GPU that of the last entry is.
    """
    number = itertools.count()

    def lay_out(tensor: torch.Tensor, axis: int) -> torch.Tensor:
        steps = tensor.shape[axis] - 1
        assert steps > 1, "a stride of 2^31 is a 64-bit number, and so are all its multiples"
        aligned = 16  # as the strides of the original are
        stride = 2**30 if device.type == "cpu" else aligned * -(-(2**31) // (aligned * steps))
        strides = list(tensor.select(axis, 0).contiguous().stride())
        strides.insert(axis, stride)
        size = 2**31 + stride * steps + tensor.select(axis, 0).numel()
        if device.type == "cpu":
            holes = torch.from_file(str(tmp_path / f"{next(number)}"), shared=True, size=size, dtype=tensor.dtype)
        else:
            holes = torch.empty(size, dtype=tensor.dtype, device=device)
        return holes.as_strided(tensor.shape, strides, 2**31).copy_(tensor)

    return lay_out
