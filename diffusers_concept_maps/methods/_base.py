"""What a method is: the score it reads off one layer, and the defaults under which it is used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffusers_concept_maps.heads import HeadSelection

METHODS: dict[str, Method] = {}


@dataclass(frozen=True)
class LayerTaps:
    """What one attention layer shows of the recorded rows of the batch, after norms and rotary embedding.

    R rows, H heads, C concepts, N image tokens, D head width; outputs are those before the output projection.
    """

    image_query: torch.Tensor  # [R, H, N, D]
    image_output: torch.Tensor  # [R, H, N, D]
    concept_key: torch.Tensor  # [R, H, C, D]
    concept_output: torch.Tensor  # [R, H, C, D]
    frames: int


class Method(ABC):
    """One way to turn a layer's tensors into a map; subclasses with a `name` register themselves.

    Attributes:
        name: as in `methods=`.
        default_normalize: normalization for two or more concepts; "softmax" over a single concept would be constant,
            so that one gets "none" instead.
        default_heads: head selection where the caller and the preset name none; None is all heads.
    """

    name: ClassVar[str]
    default_normalize: ClassVar[str]
    default_heads: ClassVar[HeadSelection | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in cls.__dict__:
            METHODS[cls.name] = cls()

    @abstractmethod
    def score(self, taps: LayerTaps, heads: torch.Tensor, *, standardize: bool) -> torch.Tensor:
        """Raw score of every concept at every token.

        Args:
            taps: the layer.
            heads: float32 `[R, H]`, 1 for the heads to use and 0 for the others.
            standardize: bring every head's map to mean 0 and deviation 1 over the clip before heads are joined.

        Returns:
            float32 `[R, C, N]`.
        """


def mean_weights(heads: torch.Tensor) -> torch.Tensor:
    """Head factors of a mean over the chosen heads; `[R, H]` ones and zeros to factors that sum to 1."""
    return heads / heads.sum(1, keepdim=True)
