"""Triton kernels for the operations of diffusers_concept_maps, one module per operation; `__all__` is the public API.

There is none yet: on CPU and on GPU alike, every operation runs as the PyTorch reference in
`diffusers_concept_maps.reference`. A kernel joins only together with a test against that reference.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__: list[str] = []
