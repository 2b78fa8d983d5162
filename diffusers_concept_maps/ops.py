"""The arithmetic of the methods behind one door: shapes are checked here, the work is done by `reference` or a kernel.

Shapes: R recorded rows of the batch, H heads, C concepts, N image tokens in F frames of P, D head width. Any floating
dtype in, float32 scores out.
"""

from __future__ import annotations

import torch

from diffusers_concept_maps import reference
from diffusers_concept_maps.errors import ConceptMapsValueError

__all__ = [
    "FRAME_SCORES",
    "concept_attention",
    "frame_separability",
    "frame_statistics",
    "gram_columns",
    "output_similarity",
    "query_key_similarity",
]

FRAME_SCORES = ("calinski_harabasz", "davies_bouldin", "fisher", "silhouette")


def concept_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    image_key: torch.Tensor,
    image_value: torch.Tensor,
    multiplicity: torch.Tensor | None = None,
) -> torch.Tensor:
    """One-directional attention of the concept tokens (ConceptAttention, arXiv 2502.04320).

    Args:
        query: concept queries `[R, H, C, D]`.
        key: concept keys `[R, H, C, D]`.
        value: concept values `[R, H, C, D]`.
        image_key: image keys `[R, H, N, D]`.
        image_value: image values `[R, H, N, D]`; N may be 0.
        multiplicity: float `[C]`, how many equal concepts each concept key stands for; None is one each.

    Returns:
        Concept outputs `[R, H, C, D]` in the dtype of `query`: concepts read concepts and image, never the prompt.

    Raises:
        ConceptMapsValueError: shapes do not fit.
    """
    _expect("key", key, query.shape)
    _expect("value", value, query.shape)
    _expect("image_value", image_value, image_key.shape)
    _expect("image_key", image_key, (*query.shape[:2], image_key.shape[2], query.shape[3]))
    return reference.concept_attention(query, key, value, image_key, image_value, multiplicity)


def output_similarity(
    concept_output: torch.Tensor,
    image_output: torch.Tensor,
    head_weights: torch.Tensor,
    *,
    standardize: str = "none",
    multiplicity: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dot product of concept and image attention outputs, summed over heads (ConceptAttention, arXiv 2502.04320).

    Args:
        concept_output: `[R, H, C, D]`.
        image_output: `[R, H, N, D]`.
        head_weights: float `[R, H]`, the factor of every head in the sum.
        standardize: bring every head's map to mean 0 and deviation 1 first: "clip" over the N tokens, "text" over
            the C concepts (unbiased), or "none".
        multiplicity: float `[C]`, how many equal rows of the text axis each concept stands for in "text"; None is one.

    Returns:
        float32 `[R, C, N]`.

    Raises:
        ConceptMapsValueError: shapes do not fit.
    """
    _expect_pair(concept_output, image_output, head_weights)
    return reference.output_similarity(concept_output, image_output, head_weights, _axis(standardize, multiplicity))


def query_key_similarity(
    image_query: torch.Tensor,
    concept_key: torch.Tensor,
    head_weights: torch.Tensor,
    *,
    standardize: str = "none",
    multiplicity: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-attention logits of image queries and concept keys, `q k / sqrt(D)`, summed over heads.

    Args:
        image_query: `[R, H, N, D]`.
        concept_key: `[R, H, C, D]`.
        head_weights: float `[R, H]`, the factor of every head in the sum.
        standardize: bring every head's map to mean 0 and deviation 1 first: "clip" over the N tokens, "text" over
            the C concepts (unbiased), or "none".
        multiplicity: float `[C]`, how many equal rows of the text axis each concept stands for in "text"; None is one.

    Returns:
        float32 `[R, C, N]`.

    Raises:
        ConceptMapsValueError: shapes do not fit.
    """
    _expect_pair(concept_key, image_query, head_weights)
    return reference.query_key_similarity(image_query, concept_key, head_weights, _axis(standardize, multiplicity))


def gram_columns(
    image_query: torch.Tensor,
    concept_key: torch.Tensor,
    image_output: torch.Tensor,
    head_weights: torch.Tensor,
    frames: int,
    *,
    standardize: str = "none",
    multiplicity: torch.Tensor | None = None,
) -> torch.Tensor:
    """GramCol (IMAP, arXiv 2603.02919): per frame and head, the Gram-matrix column of the token that best matches.

    Args:
        image_query: `[R, H, N, D]`.
        concept_key: `[R, H, C, D]`.
        image_output: attention outputs before the output projection `[R, H, N, D]`, the features of the Gram matrix.
        head_weights: float `[R, H]`, the factor of every head in the sum.
        frames: F, which divides N.
        standardize: bring every head's map to mean 0 and deviation 1 first: "clip" over the N tokens, "text" over
            the C concepts (unbiased), or "none".
        multiplicity: float `[C]`, how many equal rows of the text axis each concept stands for in "text"; None is one.

    Returns:
        float32 `[R, C, N]`.

    Raises:
        ConceptMapsValueError: shapes do not fit.
    """
    _expect_pair(concept_key, image_query, head_weights)
    _expect("image_output", image_output, image_query.shape)
    _expect_frames(image_output, frames)
    return reference.gram_columns(
        image_query, concept_key, image_output, head_weights, frames, _axis(standardize, multiplicity)
    )


def frame_statistics(image_output: torch.Tensor, frames: int) -> reference.FrameStatistics:
    """Means of the frames and spread around them, of every head.

    Args:
        image_output: attention outputs before the output projection `[R, H, N, D]`.
        frames: F, at least 2, which divides N.

    Raises:
        ConceptMapsValueError: F does not divide N, or is below 2.
    """
    if frames < 2:
        raise ConceptMapsValueError(f"frames is {frames}; separability compares frames and needs at least 2")
    _expect_frames(image_output, frames)
    return reference.frame_statistics(image_output, frames)


def frame_separability(
    image_output: torch.Tensor,
    frames: int,
    score: str = "calinski_harabasz",
    statistics: reference.FrameStatistics | None = None,
) -> torch.Tensor:
    """How well the features of every head separate the frames, which picks IMAP's motion heads (arXiv 2603.02919).

    Features without spread get what scikit-learn defines: see each score in `reference`. NaN stays NaN.

    Args:
        image_output: attention outputs before the output projection `[R, H, N, D]`.
        frames: F, at least 2, which divides N.
        score: "calinski_harabasz", "fisher" or "silhouette", higher where the frames differ more, or
            "davies_bouldin", lower there. Where there are more than 5000 tokens, the silhouette is that of 5000 drawn
            with seed 0.
        statistics: `frame_statistics` of the same features; None computes them.

    Returns:
        float32 `[R, H]`.

    Raises:
        ConceptMapsValueError: unknown score, F does not divide N, or F is below 2.
    """
    if score not in FRAME_SCORES:
        raise ConceptMapsValueError(f"unknown head score {score!r}; expected one of {', '.join(FRAME_SCORES)}")
    statistics = statistics or frame_statistics(image_output, frames)
    if score == "calinski_harabasz":
        return reference.calinski_harabasz(statistics)
    if score == "fisher":
        return reference.fisher(statistics)
    if score == "davies_bouldin":
        return reference.davies_bouldin(image_output, statistics)
    return reference.silhouette(image_output, frames)


def _axis(standardize: str, multiplicity: torch.Tensor | None) -> reference.Axis:
    if standardize not in ("none", "clip", "text"):
        raise ConceptMapsValueError(f"standardize is {standardize!r}; expected 'none', 'clip' or 'text'")
    return reference.Axis(standardize, multiplicity)


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...] | torch.Size) -> None:
    if tensor.shape != shape:
        raise ConceptMapsValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")


def _expect_pair(concept: torch.Tensor, image: torch.Tensor, head_weights: torch.Tensor) -> None:
    expected = (*image.shape[:2], concept.shape[2], image.shape[3])
    _expect("the concept tensor", concept, expected)
    _expect("head_weights", head_weights, image.shape[:2])


def _expect_frames(image: torch.Tensor, frames: int) -> None:
    if image.shape[2] % frames:
        raise ConceptMapsValueError(f"frames is {frames}, which does not divide the {image.shape[2]} image tokens")
