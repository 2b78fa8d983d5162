"""What all kernels share: precision of dot products, and how a launch is shaped.

Rules: every tensor comes with its own strides and a contiguous last axis; dot products go through `dot`; arithmetic is
float32, half precision appears only at loads, stores and as operands of `dot`; no atomics and no autotuning, so that a
result depends on the inputs and the launch shape alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter, on CPU tensors. There a bfloat16 dot product multiplies raw bits."""

HIP: bool = torch.version.hip is not None
"""Kernels are compiled for AMD; a compiler for targets that are not here sets it."""

LOG2E = 1.4426950408889634
PROGRAMS = 396  # three on each multiprocessor of an H200; a constant, so that no result depends on the device
MAX_SPLITS = 32
LAUNCH = {"enable_fp_fusion": True}  # Triton 3.10 turns multiply-add fusion off unless it is asked for


@triton.jit
def dot(left, right, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """`left @ right` with float32 accumulation; `UPCAST` is `INTERPRETED`."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION, out_dtype=tl.float32)


def precision(tensor: torch.Tensor) -> str:
    """Input precision of `dot`."""
    return _precision_of(tensor.dtype)


def _precision_of(dtype: torch.dtype) -> str:
    """Three TF32 products stand for one of float32, whose scalar code spills registers; AMD's compiler has none."""
    return "tf32x3" if dtype == torch.float32 and not HIP else "ieee"


def padded(size: int, least: int = 16) -> int:
    """The power of two that holds `size`, and at least what `tl.dot` takes."""
    power: int = triton.next_power_of_2(size)
    return max(least, power)


def head_shape(dtype: torch.dtype, head_width: int) -> dict[str, Any]:
    """Launch parameters of every kernel whose tiles are head columns wide."""
    return {
        "HEAD_WIDTH": head_width,
        "BLOCK_D": padded(head_width, 32),
        "PRECISION": _precision_of(dtype),
        "UPCAST": INTERPRETED,
        **LAUNCH,
    }


def split(length: int, block: int, programs: int) -> tuple[int, int]:
    """Number of parts of a reduction that `programs` programs start, and the length of each: whole blocks."""
    wanted = min(max(PROGRAMS // programs, 1), MAX_SPLITS)
    part = block * max(-(-length // (block * wanted)), 1)
    return max(-(-length // part), 1), part


def runnable(*tensors: torch.Tensor) -> bool:
    """Whether kernels take these tensors: on one device that runs them, of one dtype, with a contiguous last axis."""
    device, dtype = tensors[0].device, tensors[0].dtype
    able = _is_compiled_for(device) if device.type == "cuda" else device.type == "cpu" and INTERPRETED
    return able and all(t.device == device and t.dtype == dtype and _is_contiguous_last(t) for t in tensors)


def _is_compiled_for(device: torch.device) -> bool:
    """Whether a GPU is of an architecture that the compile matrix covers."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).startswith("gfx942")
    return torch.cuda.get_device_capability(device) >= (8, 0)


def check_last_axis(**tensors: torch.Tensor) -> None:
    """Refuse a tensor whose last axis has gaps.

    Raises:
        ValueError: the last axis of a tensor is not contiguous.
    """
    for name, tensor in tensors.items():
        if not _is_contiguous_last(tensor):
            raise ValueError(
                f"the last axis of {name} has stride {tensor.stride(-1)}; expected 1: pass {name}.contiguous()"
            )


def _is_contiguous_last(tensor: torch.Tensor) -> bool:
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1
