"""What the public functions of the kernels launch: they are called on tensors without data, and nothing is launched.

Signature, constants and options are those of the launch, as Triton would compile it, so no table repeats them.
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from kernel_inputs import OPS, Inputs, Sizes, calls
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import driver

from concept_map_kernels import _common

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Launch:
    """One kernel as it is launched by a backend.

    Attributes:
        module: where the kernel is.
        kernel: its name.
        backend: "cuda" or "hip".
        signature: type of every argument.
        constants: by position.
        attributes: what is known of the other arguments, by position.
        options: warps, stages, and what differs from the backend's defaults.
    """

    module: str
    kernel: str
    backend: str
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], str], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def function(self) -> Any:
        """The `triton.jit` function."""
        return getattr(importlib.import_module(self.module), self.kernel)

    def describe(self) -> str:
        """Constants and options, by name; the constants that stand for integers equal to 1 are left out."""
        parameters = self.function.params
        shown = {
            parameters[path[0]].name: value
            for path, value in self.constants
            if value is None or (parameters[path[0]].is_constexpr and parameters[path[0]].name != "UPCAST")
        }
        shown |= {name: value for name, value in self.options if name != "enable_fp_fusion"}
        return " ".join(f"{name}={value}" for name, value in shown.items())


@dataclass
class Use:
    """Who launches it.

    Attributes:
        ops: the operations.
        dtypes: of their tensors.
        head_widths: of their tensors.
    """

    ops: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    head_widths: list[int] = field(default_factory=list)

    def add(self, op: str, dtype: str, head_width: int) -> None:
        """One more."""
        for seen, value in ((self.ops, op), (self.dtypes, dtype), (self.head_widths, head_width)):
            if value not in seen:
                seen.append(value)  # type: ignore[attr-defined]


class _NoDevice:
    """Stands in for Triton's driver: it names a target and launches nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target.backend)  # kernels keep one cache per device

    def get_current_stream(self, device: str) -> int:
        return 0


class Interceptor:
    """Collects what is about to be launched on a backend.

    Attributes:
        launches: since the last look.
    """

    def __init__(self, target: GPUTarget) -> None:
        self.launches: list[Launch] = []
        self._backend = str(target.backend)
        self._defaults = make_backend(target).parse_options({}).__dict__
        _common.HIP = self._backend == "hip"
        driver.set_active(_NoDevice(target))
        triton.knobs.runtime.jit_cache_hook = self._keep

    def _keep(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        plain = {name: value for name, value in options.items() if not isinstance(value, list | dict)}
        named = ("num_warps", "num_stages")
        changed = {name: v for name, v in plain.items() if name in named or v != self._defaults.get(name)}
        attributes = compile["configs"][0]
        self.launches.append(
            Launch(
                fn.module,
                fn.name.rpartition(".")[2],
                self._backend,
                tuple(compile["signature"].items()),
                tuple(compile["constants"].items()),
                tuple((path, json.dumps(value)) for path, value in attributes.items()),
                tuple(sorted(changed.items())),
            )
        )
        return True  # "there is nothing left to do": the launch ends here


def enabled_launches(
    target: GPUTarget, ops: Iterable[str], dtypes: Iterable[str], head_widths: Iterable[int], text_rows: Iterable[int]
) -> dict[Launch, Use]:
    """What the operations launch, for token-major and for head-major tensors, equal launches once."""
    found: dict[Launch, Use] = {}
    interceptor = Interceptor(target)
    sweep = itertools.product(ops, dtypes, head_widths, text_rows, (False, True))
    for op, dtype, head_width, rows, head_major in sweep:
        function = getattr(importlib.import_module(f"concept_map_kernels.{OPS[op]}"), op)
        sizes = Sizes(1, 48, 13, 30, 45, head_width, rows, max(rows, 226))
        for call in calls(op, Inputs(sizes, DTYPES[dtype], "meta", head_major=head_major)):
            interceptor.launches.clear()
            try:
                function(**call.arguments)
            except ValueError as refusal:
                if "not enabled" not in str(refusal):
                    raise
                continue
            for launch in interceptor.launches:
                found.setdefault(launch, Use()).add(op, dtype, head_width)
    return found
