"""The arithmetic of the methods behind one door: shapes are checked here, the work is done by `reference` or a kernel.

Shapes: R recorded rows of the batch, H heads, C concepts or other rows of text, N image tokens in F frames of P, D
head width. Any floating dtype in, float32 scores out. The ops have no gradient.
"""

from __future__ import annotations

import torch

from diffusers_concept_maps import dispatch, reference
from diffusers_concept_maps.errors import ConceptMapsValueError

__all__ = [
    "FRAME_SCORES",
    "accumulate_similarity_",
    "attention_probabilities",
    "concept_attention",
    "frame_separability",
    "frame_statistics",
    "gram_columns",
    "output_similarity",
    "query_key_argmax",
    "query_key_similarity",
    "similarity_and_statistics",
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
        multiplicity: float `[C]`, how many equal concepts each concept key stands for, 0 for a key that is not read;
            None is one each.

    Returns:
        Concept outputs `[R, H, C, D]` in the dtype of `query`, under autocast in that of autocast: concepts read
        concepts and image, never the prompt.

    Raises:
        ConceptMapsValueError: shapes do not fit.
    """
    expect_shape("key", key, query.shape)
    expect_shape("value", value, query.shape)
    expect_shape("image_value", image_value, image_key.shape)
    expect_shape("image_key", image_key, (*query.shape[:2], image_key.shape[2], query.shape[3]))
    if multiplicity is not None:
        expect_shape("multiplicity", multiplicity, query.shape[2:3])
    tensors: tuple[torch.Tensor, ...] = (query, key, value, image_key, image_value)
    if torch.is_autocast_enabled(query.device.type):  # as the attention of the model does
        dtype = torch.get_autocast_dtype(query.device.type)
        tensors = tuple(tensor.to(dtype) for tensor in tensors)
    output: torch.Tensor = dispatch.concept_attention(*tensors, multiplicity)
    return output


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
    return _similarity(concept_output, image_output, head_weights, 1.0, standardize, multiplicity)


def accumulate_similarity_(
    total: torch.Tensor,
    concept_output: torch.Tensor,
    image_output: torch.Tensor,
    head_weights: torch.Tensor,
    *,
    scale: float = 1.0,
) -> torch.Tensor:
    """Add `scale` times the `output_similarity` of a layer to a map that is there already.

    Args:
        total: float32 `[R, C, N]`, changed in place.
        concept_output: `[R, H, C, D]`.
        image_output: `[R, H, N, D]`.
        head_weights: float `[R, H]`, the factor of every head in the sum.
        scale: the factor of the layer.

    Returns:
        `total`.

    Raises:
        ConceptMapsValueError: shapes do not fit, or `total` is not float32.
    """
    _expect_pair(concept_output, image_output, head_weights)
    expect_shape("total", total, (image_output.shape[0], concept_output.shape[2], image_output.shape[2]))
    if total.dtype != torch.float32:
        raise ConceptMapsValueError(f"total is {total.dtype}; expected torch.float32, which sums do not overflow")
    dispatch.accumulate_similarity_(total, concept_output, image_output, head_weights, scale)
    return total


def query_key_similarity(
    image_query: torch.Tensor,
    concept_key: torch.Tensor,
    head_weights: torch.Tensor,
    *,
    scaled: bool = True,
    standardize: str = "none",
    multiplicity: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-attention logits of image queries and concept keys, `q k / sqrt(D)`, summed over heads.

    Args:
        image_query: `[R, H, N, D]`.
        concept_key: `[R, H, C, D]`.
        head_weights: float `[R, H]`, the factor of every head in the sum.
        scaled: False leaves out the division by `sqrt(D)`.
        standardize: bring every head's map to mean 0 and deviation 1 first: "clip" over the N tokens, "text" over
            the C concepts (unbiased), or "none".
        multiplicity: float `[C]`, how many equal rows of the text axis each concept stands for in "text"; None is one.

    Returns:
        float32 `[R, C, N]`.

    Raises:
        ConceptMapsValueError: shapes do not fit.
    """
    scale = image_query.shape[-1] ** -0.5 if scaled else 1.0
    return _similarity(concept_key, image_query, head_weights, scale, standardize, multiplicity)


def attention_probabilities(
    image_query: torch.Tensor,
    text_key: torch.Tensor,
    tokens: torch.Tensor,
    head_weights: torch.Tensor,
    image_key: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-attention probabilities of chosen text tokens, summed over heads.

    Args:
        image_query: `[R, H, N, D]`.
        text_key: `[R, H, T, D]`.
        tokens: int64 `[C]`, which of the T text tokens to return; not checked, for that would wait for the device.
        head_weights: float `[R, H]`, the factor of every head in the sum.
        image_key: `[R, H, N, D]` where image queries attend to text and image at once, as in joint attention; None
            where they attend to the text alone.

    Returns:
        float32 `[R, C, N]`.

    Raises:
        ConceptMapsValueError: shapes do not fit, or `tokens` are not indices.
    """
    _expect_pair(text_key, image_query, head_weights)
    if image_key is not None:
        expect_shape("image_key", image_key, image_query.shape)
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        raise ConceptMapsValueError(f"tokens are {tokens.dtype} {tuple(tokens.shape)}; expected torch.int64 [C]")
    scores: torch.Tensor = dispatch.attention_probabilities(image_query, text_key, tokens, head_weights, image_key)
    return scores


def query_key_argmax(
    image_query: torch.Tensor, concept_key: torch.Tensor, frames: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The token of every frame whose query best matches a key, per head.

    Args:
        image_query: `[R, H, N, D]`.
        concept_key: `[R, H, C, D]`.
        frames: F, which divides N.

    Returns:
        Three tensors `[R, H, C, F]`: the place of the token in its frame (int64, the lowest on ties), its logit
        `q k / sqrt(D)`, and the lead over the runner-up, 0 on ties and infinite in a frame of one token (float32).

    Raises:
        ConceptMapsValueError: shapes do not fit.
    """
    expect_shape(
        "the concept tensor", concept_key, (*image_query.shape[:2], concept_key.shape[2], image_query.shape[3])
    )
    _expect_frames(image_query, frames)
    index, value, gap = dispatch.query_key_argmax(image_query, concept_key, frames)
    return index, value, gap


def gram_columns(
    image_output: torch.Tensor,
    index: torch.Tensor,
    head_weights: torch.Tensor,
    *,
    standardize: str = "none",
    multiplicity: torch.Tensor | None = None,
) -> torch.Tensor:
    """GramCol (IMAP, arXiv 2603.02919): per frame and head, the Gram-matrix column of the token that best matches.

    Args:
        image_output: attention outputs before the output projection `[R, H, N, D]`, the features of the Gram matrix.
        index: the matching tokens int64 `[R, H, C, F]` that `query_key_argmax` finds; F divides N.
        head_weights: float `[R, H]`, the factor of every head in the sum.
        standardize: bring every head's map to mean 0 and deviation 1 first: "clip" over the N tokens, "text" over
            the C concepts (unbiased), or "none".
        multiplicity: float `[C]`, how many equal rows of the text axis each concept stands for in "text"; None is one.

    Returns:
        float32 `[R, C, N]`.

    Raises:
        ConceptMapsValueError: shapes do not fit, or unknown `standardize`.
    """
    expect_shape("index", index, (*image_output.shape[:2], *index.shape[2:4]))
    expect_shape("head_weights", head_weights, image_output.shape[:2])
    _expect_frames(image_output, index.shape[3])
    _expect_axis(standardize, multiplicity, index.shape[2])
    scores: torch.Tensor = dispatch.gram_columns(image_output, index, head_weights, standardize, multiplicity)
    return scores


def frame_statistics(image_output: torch.Tensor, frames: int) -> reference.FrameStatistics:
    """Means of the frames and spread around them, of every head.

    Args:
        image_output: attention outputs before the output projection `[R, H, N, D]`.
        frames: F, at least 2, which divides N.

    Raises:
        ConceptMapsValueError: F does not divide N, or is below 2.
    """
    _expect_several_frames(image_output, frames)
    mean, within = dispatch.frame_statistics(image_output, frames)
    return reference.FrameStatistics(mean, within, image_output.shape[2])


def similarity_and_statistics(
    concept_output: torch.Tensor, image_output: torch.Tensor, head_weights: torch.Tensor, frames: int
) -> tuple[torch.Tensor, reference.FrameStatistics]:
    """`output_similarity` and `frame_statistics` in one read of the features.

    Args:
        concept_output: `[R, H, C, D]`.
        image_output: attention outputs before the output projection `[R, H, N, D]`.
        head_weights: float `[R, H]`, the factor of every head in the sum.
        frames: F, at least 2, which divides N.

    Returns:
        float32 `[R, C, N]`, and the statistics.

    Raises:
        ConceptMapsValueError: shapes do not fit, F does not divide N, or is below 2.
    """
    _expect_pair(concept_output, image_output, head_weights)
    _expect_several_frames(image_output, frames)
    scores, mean, within = dispatch.similarity_and_statistics(concept_output, image_output, head_weights, frames)
    return scores, reference.FrameStatistics(mean, within, image_output.shape[2])


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
        spread = dispatch.frame_spread(image_output, statistics.mean, frames)
        return reference.davies_bouldin(statistics, spread)
    return reference.silhouette(image_output, frames)


def _similarity(
    concept: torch.Tensor,
    image: torch.Tensor,
    head_weights: torch.Tensor,
    scale: float,
    standardize: str,
    multiplicity: torch.Tensor | None,
) -> torch.Tensor:
    _expect_pair(concept, image, head_weights)
    _expect_axis(standardize, multiplicity, concept.shape[2])
    scores: torch.Tensor = dispatch.similarity(concept, image, head_weights, scale, standardize, multiplicity)
    return scores


def _expect_axis(standardize: str, multiplicity: torch.Tensor | None, texts: int) -> None:
    if standardize not in ("none", "clip", "text"):
        raise ConceptMapsValueError(f"standardize is {standardize!r}; expected 'none', 'clip' or 'text'")
    if multiplicity is not None:
        expect_shape("multiplicity", multiplicity, (texts,))
    elif standardize == "text" and texts < 2:
        raise ConceptMapsValueError(
            f"standardize is 'text' over {texts} concepts; a deviation needs at least 2: add a concept, give its "
            "multiplicity, or use 'clip' or 'none'"
        )


def expect_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...] | torch.Size) -> None:
    """Refuse a tensor of another shape.

    Raises:
        ConceptMapsValueError: naming the tensor.
    """
    if tensor.shape != shape:
        raise ConceptMapsValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")


def _expect_pair(concept: torch.Tensor, image: torch.Tensor, head_weights: torch.Tensor) -> None:
    expected = (*image.shape[:2], concept.shape[2], image.shape[3])
    expect_shape("the concept tensor", concept, expected)
    expect_shape("head_weights", head_weights, image.shape[:2])


def _expect_frames(image: torch.Tensor, frames: int) -> None:
    if image.shape[2] % frames:
        raise ConceptMapsValueError(f"frames is {frames}, which does not divide the {image.shape[2]} image tokens")


def _expect_several_frames(image: torch.Tensor, frames: int) -> None:
    if frames < 2:
        raise ConceptMapsValueError(f"frames is {frames}; separability compares frames and needs at least 2")
    _expect_frames(image, frames)
