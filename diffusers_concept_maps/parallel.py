"""Context parallelism of the host: every process has a part of the tokens, and a layer is scored over all of them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks.context_parallel import EquipartitionSharder, PartitionAnythingSharder


def gather_tokens(transformer: Any, tensor: torch.Tensor) -> torch.Tensor:
    """The tokens of all processes, in their order; those of this one where the model is not context parallel.

    A layer is gathered, scored and let go before the next one, so that no process holds more than one without
    parallelism does; every process then has the whole maps.

    Args:
        transformer: the model.
        tensor: what this process has of a layer `[row, H, token, D]`.

    Returns:
        `[row, H, token, D]` of the whole sequence.
    """
    parallel = getattr(transformer, "_parallel_config", None)
    config = None if parallel is None else parallel.context_parallel_config
    if config is None:
        return tensor
    # As the host splits: in equal parts, or in any.
    if config.ulysses_anything or config.ring_anything:
        whole: torch.Tensor = PartitionAnythingSharder.unshard_anything(tensor, 2, config._flattened_mesh)
        return whole
    whole = EquipartitionSharder.unshard(tensor, 2, config._flattened_mesh)
    return whole
