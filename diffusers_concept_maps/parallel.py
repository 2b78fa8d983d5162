"""Context parallelism of the host: every process has a part of the tokens, and a layer is scored over all of them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks.context_parallel import EquipartitionSharder, PartitionAnythingSharder

from diffusers_concept_maps.backbones import Backbone, find_backbones
from diffusers_concept_maps.errors import ConceptMapsError


def check_parallel(backbone: Backbone, transformer: Any) -> None:
    """Refuse context parallelism where it is not known what each process has of a layer.

    Args:
        backbone: of the transformer.
        transformer: the model.

    Raises:
        ConceptMapsError: it is context parallel, and its family is not one of those that may be.
    """
    if not backbone.context_parallel and _config_of(transformer) is not None:
        known = sorted(name for one in find_backbones() if one.context_parallel for name in one.transformer_classes)
        raise ConceptMapsError(
            f"this {type(transformer).__name__} is context parallel, and its maps would be of a part of the text or "
            f"the image; expected one of {', '.join(known)}. Trace it in one process"
        )


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
    config = _config_of(transformer)
    if config is None:
        return tensor
    # As the host splits: in equal parts, or in any.
    if config.ulysses_anything or config.ring_anything:
        whole: torch.Tensor = PartitionAnythingSharder.unshard_anything(tensor, 2, config._flattened_mesh)
        return whole
    whole = EquipartitionSharder.unshard(tensor, 2, config._flattened_mesh)
    return whole


def _config_of(transformer: Any) -> Any:
    """Of context parallelism; None without it."""
    parallel = getattr(transformer, "_parallel_config", None)
    return None if parallel is None else parallel.context_parallel_config
