"""What a method is: the score it reads off one layer, and the defaults under which it is used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch

from diffusers_concept_maps import ops
from diffusers_concept_maps.heads import HeadSelection
from diffusers_concept_maps.reference import FrameStatistics

METHODS: dict[str, Method] = {}

SPACES = ("output", "value", "query_key")
"""What `concept_attention` compares: attention outputs, values, or concept queries with video keys."""

_PER_HEAD = ("image_", "text_")  # how the fields begin that every head has for itself


@dataclass
class LayerTaps:
    """What one attention layer shows of the recorded rows of the batch, after norms and rotary embedding.

    R rows, H heads, T rows of the text axis (concepts or prompt tokens), N image tokens, D head width; outputs are
    those before the output projection. In cross-attention only images ask and only text answers: what is None there
    exists in joint attention alone.
    """

    image_query: torch.Tensor  # [R, H, N, D]
    image_key: torch.Tensor | None  # [R, H, N, D]
    image_value: torch.Tensor | None  # [R, H, N, D]
    image_output: torch.Tensor  # [R, H, N, D]
    text_query: torch.Tensor | None  # [R, H, T, D]
    text_key: torch.Tensor  # [R, H, T, D]
    text_value: torch.Tensor | None  # [R, H, T, D]
    text_output: torch.Tensor | None  # [R, H, T, D]
    frames: int
    multiplicity: torch.Tensor | None = None  # [T], how many equal rows each row of the text axis stands for
    selects_heads: bool = False  # a method of the layer is going to ask for the statistics
    _statistics: FrameStatistics | None = field(default=None, init=False)

    @cached_property
    def anchors(self) -> torch.Tensor:
        """Place in its frame of the image token whose query best matches each text key, int64 `[R, H, T, F]`."""
        return ops.query_key_argmax(self.image_query, self.text_key, self.frames)[0]

    @property
    def statistics(self) -> FrameStatistics | None:
        """Statistics of the frames in the attention outputs of every head; None for one frame, which has none."""
        if self._statistics is None and self.frames > 1:
            self._statistics = ops.frame_statistics(self.image_output, self.frames)
        return self._statistics

    def output_similarity(self, heads: torch.Tensor) -> torch.Tensor:
        """Output similarity `[R, T, N]`, and if they are going to be asked for, the statistics in the same read.

        Args:
            heads: float `[R, H]`, the factor of every head in the sum.
        """
        assert self.text_output is not None  # the plan has refused cross-attention
        if not self.selects_heads or self.frames == 1 or self._statistics is not None:
            return ops.output_similarity(self.text_output, self.image_output, heads)
        scores, self._statistics = ops.similarity_and_statistics(
            self.text_output, self.image_output, heads, self.frames
        )
        return scores

    def head(self, index: int) -> LayerTaps:
        """The same layer as if it had this head only."""
        tensors = {name: getattr(self, name) for name in self.__dataclass_fields__ if name.startswith(_PER_HEAD)}
        heads = {name: None if tensor is None else tensor[:, index : index + 1] for name, tensor in tensors.items()}
        return LayerTaps(**heads, frames=self.frames, multiplicity=self.multiplicity)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Rules:
    """Where implementations of one method differ.

    Attributes:
        standardize: per head, "clip" over all tokens of the clip, "text" over the text axis, or "none".
        space: one of `SPACES`, for `concept_attention`.
        scaled: query-key logits are divided by `sqrt(D)`.
        sum_heads: `gramcol` sums the heads instead of averaging them.
        probabilities: `cross_attention` is a softmax over the text axis in every head, of logits that are divided by
            `sqrt(D)` twice.
    """

    standardize: str = "none"
    space: str = "output"
    scaled: bool = True
    sum_heads: bool = False
    probabilities: bool = False


class Method(ABC):
    """One way to turn a layer's tensors into a map; subclasses with a `name` register themselves.

    Attributes:
        name: as in `methods=`.
        default_normalize: normalization for two or more concepts; "softmax" over a single concept would be constant,
            so that one gets "none" instead.
        default_heads: head selection where the caller and the preset name none; None is all heads.
        reading: it needs the queries or outputs of text rows, which exist where text reads, too (joint attention).
    """

    name: ClassVar[str]
    default_normalize: ClassVar[str]
    default_heads: ClassVar[HeadSelection | None] = None
    reading: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in cls.__dict__:
            METHODS[cls.name] = cls()

    @abstractmethod
    def score(self, taps: LayerTaps, heads: torch.Tensor, rules: Rules) -> torch.Tensor:
        """Raw score of every row of the text axis at every token.

        Args:
            taps: the layer.
            heads: float32 `[R, H]`, 1 for the heads to use and 0 for the others.
            rules: which variant of the method.

        Returns:
            float32 `[R, T, N]`.
        """


def mean_weights(heads: torch.Tensor) -> torch.Tensor:
    """Head factors of a mean over the chosen heads; `[R, H]` ones and zeros to factors that sum to 1."""
    return heads / heads.sum(1, keepdim=True)
