"""The arithmetic of the methods behind one door: shapes are checked here, the work is done by `reference` or a kernel.

Shapes: R recorded rows of the batch, H heads, C concepts, N image tokens in F frames of P, D head width. Any floating
dtype in, float32 scores out.
"""

from __future__ import annotations

import torch

from diffusers_concept_maps import reference
from diffusers_concept_maps.errors import ConceptMapsValueError

__all__ = ["concept_attention", "frame_separability", "gram_columns", "output_similarity", "query_key_similarity"]


def concept_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, image_key: torch.Tensor, image_value: torch.Tensor
) -> torch.Tensor:
    """One-directional attention of the concept tokens (ConceptAttention, arXiv 2502.04320).

    Args:
        query: concept queries `[R, H, C, D]`.
        key: concept keys `[R, H, C, D]`.
        value: concept values `[R, H, C, D]`.
        image_key: image keys `[R, H, N, D]`.
        image_value: image values `[R, H, N, D]`.

    Returns:
        Concept outputs `[R, H, C, D]` in the dtype of `query`: concepts read concepts and image, never the prompt.

    Raises:
        ConceptMapsValueError: shapes do not fit.
    """
    _expect("key", key, query.shape)
    _expect("value", value, query.shape)
    _expect("image_value", image_value, image_key.shape)
    _expect("image_key", image_key, (*query.shape[:2], image_key.shape[2], query.shape[3]))
    return reference.concept_attention(query, key, value, image_key, image_value)


def output_similarity(
    concept_output: torch.Tensor,
    image_output: torch.Tensor,
    head_weights: torch.Tensor,
    *,
    standardize: bool = False,
) -> torch.Tensor:
    """Dot product of concept and image attention outputs, summed over heads (ConceptAttention, arXiv 2502.04320).

    Args:
        concept_output: `[R, H, C, D]`.
        image_output: `[R, H, N, D]`.
        head_weights: float `[R, H]`, the factor of every head in the sum.
        standardize: bring every head's map to mean 0 and deviation 1 over the N tokens first.

    Returns:
        float32 `[R, C, N]`.

    Raises:
        ConceptMapsValueError: shapes do not fit.
    """
    _expect_pair(concept_output, image_output, head_weights)
    return reference.output_similarity(concept_output, image_output, head_weights, standardize)


def query_key_similarity(
    image_query: torch.Tensor,
    concept_key: torch.Tensor,
    head_weights: torch.Tensor,
    *,
    standardize: bool = False,
) -> torch.Tensor:
    """Cross-attention logits of image queries and concept keys, `q k / sqrt(D)`, summed over heads.

    Args:
        image_query: `[R, H, N, D]`.
        concept_key: `[R, H, C, D]`.
        head_weights: float `[R, H]`, the factor of every head in the sum.
        standardize: bring every head's map to mean 0 and deviation 1 over the N tokens first.

    Returns:
        float32 `[R, C, N]`.

    Raises:
        ConceptMapsValueError: shapes do not fit.
    """
    _expect_pair(concept_key, image_query, head_weights)
    return reference.query_key_similarity(image_query, concept_key, head_weights, standardize)


def gram_columns(
    image_query: torch.Tensor,
    concept_key: torch.Tensor,
    image_output: torch.Tensor,
    head_weights: torch.Tensor,
    frames: int,
    *,
    standardize: bool = False,
) -> torch.Tensor:
    """GramCol (IMAP, arXiv 2603.02919): per frame and head, the Gram-matrix column of the token that best matches.

    Args:
        image_query: `[R, H, N, D]`.
        concept_key: `[R, H, C, D]`.
        image_output: attention outputs before the output projection `[R, H, N, D]`, the features of the Gram matrix.
        head_weights: float `[R, H]`, the factor of every head in the sum.
        frames: F, which divides N.
        standardize: bring every head's map to mean 0 and deviation 1 over the N tokens first.

    Returns:
        float32 `[R, C, N]`.

    Raises:
        ConceptMapsValueError: shapes do not fit.
    """
    _expect_pair(concept_key, image_query, head_weights)
    _expect("image_output", image_output, image_query.shape)
    _expect_frames(image_output, frames)
    return reference.gram_columns(image_query, concept_key, image_output, head_weights, frames, standardize)


def frame_separability(image_output: torch.Tensor, frames: int) -> torch.Tensor:
    """Calinski-Harabasz index of every head with frames as clusters, which picks IMAP's motion heads.

    Args:
        image_output: attention outputs before the output projection `[R, H, N, D]`.
        frames: F, at least 2, which divides N.

    Returns:
        float32 `[R, H]`, higher where the frames differ more.

    Raises:
        ConceptMapsValueError: F does not divide N, or is below 2.
    """
    if frames < 2:
        raise ConceptMapsValueError(f"frames is {frames}; separability compares frames and needs at least 2")
    _expect_frames(image_output, frames)
    return reference.frame_separability(image_output, frames)


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
