"""Which attention heads a map is made of: all, a list, or those whose features separate the frames best."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffusers_concept_maps import ops
from diffusers_concept_maps.errors import ConceptMapsValueError

_SCORES = ("calinski_harabasz", "fisher")


@dataclass(frozen=True)
class HeadSelection:
    """Motion heads by frame separability (IMAP, arXiv 2603.02919), chosen anew for every video, layer and step.

    The features of a head are its attention outputs, its clusters the frames. Fisher's ratio is the Calinski-Harabasz
    index divided by `(N - F) / (F - 1)` for N tokens in F frames: both rank heads alike, their thresholds differ. A
    clip of one frame has nothing to separate: all heads are taken.

    Attributes:
        score: "calinski_harabasz" or "fisher".
        top_k: take this many best heads; ignored when `threshold` is given.
        threshold: take the heads whose score is above it, and the best one if none is.

    Raises:
        ConceptMapsValueError: unknown score, or `top_k` below 1.
    """

    score: str = "calinski_harabasz"
    top_k: int = 5
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.score not in _SCORES:
            raise ConceptMapsValueError(f"unknown head score {self.score!r}; expected one of {', '.join(_SCORES)}")
        if self.top_k < 1:
            raise ConceptMapsValueError(f"top_k is {self.top_k}; expected at least 1 head")

    def choose(self, image_output: torch.Tensor, frames: int) -> torch.Tensor:
        """The chosen heads as ones in a float32 tensor `[R, H]`.

        Args:
            image_output: attention outputs before the output projection `[R, H, N, D]`.
            frames: number of frames in the N tokens.
        """
        rows, heads, tokens = image_output.shape[:3]
        if frames == 1:
            return torch.ones(rows, heads, device=image_output.device)
        score = ops.frame_separability(image_output, frames)
        if self.score == "fisher":
            score = score * ((frames - 1) / (tokens - frames))
        best = score.topk(1 if self.threshold is not None else self.top_k, dim=1).indices
        chosen = torch.zeros_like(score).scatter_(1, best, 1.0)
        return chosen if self.threshold is None else torch.maximum(chosen, (score > self.threshold).float())
