"""Set-up of the whole suite: one thread per process, no network, quiet libraries, kernels without a GPU."""

from __future__ import annotations

import os

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
import transformers
from hypothesis import settings

torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

# The same examples on every run, and no deadline on a shared machine: a red test is red again.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")
