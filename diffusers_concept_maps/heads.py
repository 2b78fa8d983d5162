"""Which attention heads a map is made of: all, a list, or those whose features separate the frames best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from diffusers_concept_maps import ops
from diffusers_concept_maps.errors import ConceptMapsValueError

if TYPE_CHECKING:
    from diffusers_concept_maps.methods import LayerTaps
    from diffusers_concept_maps.reference import FrameStatistics


@dataclass(frozen=True)
class HeadSelection:
    """Motion heads by frame separability (IMAP, arXiv 2603.02919), chosen anew for every video, layer and step.

    The features of a head are its attention outputs, its clusters the frames. The scores equal scikit-learn's:

    - "calinski_harabasz": spread between the frames over spread within them, each per degree of freedom.
    - "fisher": the same without the degrees of freedom, that is the Calinski-Harabasz index times `(F - 1) / (N - F)`
      for N tokens in F frames. Both rank heads alike, their thresholds differ.
    - "davies_bouldin": how alike each frame is to the frame most like it; the one score of which less is better.
    - "silhouette": how much nearer a token is to its own frame than to the next, in [-1, 1]. Of a clip of more than
      5000 tokens, it is that of 5000 drawn with seed 0, by a generator of its own. Far slower than the others.

    A head without spread within its frames (all zero, say), with equal means of all frames, or with a NaN has nothing
    to separate. It is never chosen, though its score may be good: an all-zero head has a Calinski-Harabasz index of
    1.0, and a Davies-Bouldin index of 0.0, the best there is. So fewer than `top_k` heads may be taken. Where no head
    would be left, and in a clip of one frame, all are taken.

    Attributes:
        score: "calinski_harabasz", "davies_bouldin", "fisher" or "silhouette".
        top_k: take this many best heads; ignored when `threshold` is given.
        threshold: take the heads whose score is better than it (above, for "davies_bouldin" below), and the best one
            if none is. The official code has 100 for "calinski_harabasz", 10 for "davies_bouldin", 0.3 for "fisher"
            and 0.1 for "silhouette", none of which is a default here.

    Raises:
        ConceptMapsValueError: unknown score, or `top_k` below 1.
    """

    score: str = "calinski_harabasz"
    top_k: int = 5
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.score not in ops.FRAME_SCORES:
            raise ConceptMapsValueError(
                f"unknown head score {self.score!r}; expected one of {', '.join(ops.FRAME_SCORES)}"
            )
        if not isinstance(self.top_k, int) or self.top_k < 1:
            raise ConceptMapsValueError(f"top_k is {self.top_k}; expected at least 1 head")

    def choose(
        self, image_output: torch.Tensor, frames: int, statistics: FrameStatistics | None = None
    ) -> torch.Tensor:
        """The chosen heads as ones in a float32 tensor `[R, H]`.

        Args:
            image_output: attention outputs before the output projection `[R, H, N, D]`.
            frames: number of frames in the N tokens.
            statistics: `ops.frame_statistics` of the same outputs; None computes them.

        Raises:
            ConceptMapsValueError: `frames` does not divide N.
        """
        if frames == 1:
            return torch.ones(image_output.shape[:2], device=image_output.device)
        statistics = statistics or ops.frame_statistics(image_output, frames)
        score = ops.frame_separability(image_output, frames, self.score, statistics)
        sign = -1.0 if self.score == "davies_bouldin" else 1.0
        rank = torch.where(statistics.separable, sign * score, -torch.inf)
        best = rank.topk(1 if self.threshold is not None else self.top_k, dim=1).indices
        chosen = torch.zeros_like(rank).scatter_(1, best, 1.0)
        if self.threshold is not None:
            chosen = torch.maximum(chosen, (rank > sign * self.threshold).float())
        chosen = chosen * statistics.separable
        return torch.where(statistics.separable.any(1, keepdim=True), chosen, 1.0)


def head_mask(heads: HeadSelection | tuple[int, ...] | None, taps: LayerTaps) -> torch.Tensor:
    """Ones for the heads to use, zeros for the others.

    Args:
        heads: a selection, indices, or None for all.
        taps: the layer.

    Returns:
        float32 `[R, H]`.
    """
    if isinstance(heads, HeadSelection):
        return heads.choose(taps.image_output, taps.frames, taps.statistics)
    rows, count = taps.image_output.shape[:2]
    if heads is None:
        return torch.ones(rows, count, device=taps.image_output.device)
    # Filled column by column: indexing with a list would copy it from the host and make the device wait.
    mask = torch.zeros(rows, count, device=taps.image_output.device)
    for head in heads:
        mask[:, head].fill_(1.0)
    return mask
