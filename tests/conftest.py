"""Set-up of the whole suite: one thread per process, no network, quiet libraries, kernels without a GPU."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

# Set before torch and diffusers are imported, since they read these once. The suite runs one process per core: more
# threads would fight over the cores, and make the order of float additions depend on the machine.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    DIFFUSERS_VERBOSITY="error",
    TRANSFORMERS_VERBOSITY="error",
)

import torch

# Where there is no GPU, kernels run in Triton's interpreter. Triton reads this when it is imported, as diffusers does.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import diffusers
import pytest
import transformers
from hypothesis import settings

torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

# The same examples on every run, and no deadline on a shared machine: a red test is red again.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")

_HOSTS = {"contextlib", "diffusers", "torch", "transformers", "warnings"}


@pytest.fixture(autouse=True)
def deprecations_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this package calls and its hosts deprecate is an error.

    pyproject.toml says so too, but a host warns in the name of its own module: who called it is further up the stack.
    """
    warn = warnings.warn

    def strict_warn(message: Any, category: Any = None, stacklevel: int = 1, *args: Any, **options: Any) -> None:
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        if issubclass(kind, DeprecationWarning | FutureWarning) and _caller() == "diffusers_concept_maps":
            raise message if isinstance(message, Warning) else kind(message)
        warn(message, category, stacklevel + 1, *args, **options)

    monkeypatch.setattr(warnings, "warn", strict_warn)


def _caller() -> str:
    """The package on whose behalf a host warns."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _HOSTS:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
