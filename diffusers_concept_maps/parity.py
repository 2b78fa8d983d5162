"""Switches that reproduce the maps of official implementations, quirks included, and what each turns on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.methods import Rules


@dataclass(frozen=True)
class Parity:
    """One official implementation.

    Attributes:
        name: as in `parity=`.
        rules: how each of its methods forms scores; a method that is not there does not exist in it.
        default_normalize: where the caller names none.
        softmax_again: with "softmax", a second softmax over the concepts in every step, after the mean over its
            layers; a single concept is scaled to 0..1 over the clip instead.
        padded: the text axis has as many rows as the prompt; those without a concept are zero embeddings. They take
            part in the concept attention, in z-scores and in the softmax over the text axis, and are dropped after it.
            `dataclasses.replace(IMAP, padded=False)` is the same without them, as official code is when it is given
            concepts that are not padded; the z-score of a single concept is then not a number.
        crossing: `rules` for models with cross-attention, of which there is official code for words of the prompt
            alone; empty where there is none.
        pooled: concepts are modulated by the prompt's pooled text vector, where the model has one; False puts zeros in
            its place.
        concept_length: tokens that the text of a concept is padded to; None is what suits the model.
        quirks: concepts pass through a model with the quirks of this implementation's code for it.
    """

    name: str
    rules: Mapping[str, Rules]
    default_normalize: str
    softmax_again: bool
    padded: bool = True
    crossing: Mapping[str, Rules] = field(default_factory=dict)
    pooled: bool = True
    concept_length: int | None = 16
    quirks: bool = False


IMAP = Parity(
    name="imap",
    rules={
        "concept_attention": Rules(),
        "cross_attention": Rules(scaled=False),
        "gramcol": Rules(standardize="text", sum_heads=True),
        "imap": Rules(standardize="text"),
    },
    default_normalize="none",
    softmax_again=True,
    crossing={
        "cross_attention": Rules(probabilities=True),
        "gramcol": Rules(standardize="text", sum_heads=True),
        "imap": Rules(standardize="text"),
    },
    quirks=True,
)
"""IMAP (arXiv 2603.02919), its published code for CogVideoX, HunyuanVideo and, for words of the prompt, Wan.

Turns on: the first sub-word of a concept, padded to 16; the text axis padded to the prompt's length; unscaled
query-key logits; Gram columns z-scored over the padded text axis, per head, with unbiased deviation; `gramcol`
summed over all heads, `imap` averaged over the chosen ones; `normalize="none"` by default, which is what its scripts
run, and two softmaxes with `normalize="softmax"`. `target="prompt"` z-scores over all rows of the prompt, padding
included, and a word is its first sub-word. In HunyuanVideo, concepts are refined as one sequence, and a block adds to
them not what they have read but what they were to read with; only its dual-stream blocks (the preset's layers) have
official maps. With cross-attention (Wan), `cross_attention` is a softmax over the text in every head, of logits that
are divided by `sqrt(D)` twice.
"""

CONCEPT_ATTENTION = Parity(
    name="concept_attention",
    rules={"concept_attention": Rules(), "cross_attention": Rules(scaled=False)},
    default_normalize="softmax",
    softmax_again=False,
)
"""ConceptAttention (arXiv 2502.04320), its published code for CogVideoX.

Turns on: the first sub-word of a concept, padded to 16; the text axis padded to the prompt's length, so that the
softmax over concepts includes padding and the concepts do not sum to 1; unscaled query-key logits, heads averaged.

Not reproduced: the second softmax that its pipeline applies to cross-attention maps.
"""

FLUX_CONCEPT_ATTENTION = replace(
    CONCEPT_ATTENTION, rules={"concept_attention": Rules()}, padded=False, pooled=False, concept_length=None
)
"""ConceptAttention (arXiv 2502.04320), its published code for FLUX.1; `parity="concept_attention"` there.

Turns on: the first sub-word of a concept, padded to the prompt's length; a pooled text vector of zeros in the
modulation of the concepts; nothing on the text axis but the concepts.

Not reproduced: its cross-attention maps, which compare image queries with concept queries.
"""

TOKEN_POLICY = "first"
"""How official codes embed a concept: by its first sub-word."""

_PARITIES = {parity.name: parity for parity in (IMAP, CONCEPT_ATTENTION)}


def find_parity(name: str | Parity | None, own: Mapping[str, Parity]) -> Parity | None:
    """The switch of that name, None for none; a `Parity` is itself.

    Args:
        name: as in `parity=`.
        own: switches of that name that are others for the model family.

    Raises:
        ConceptMapsValueError: there is no such switch.
    """
    if name is None or isinstance(name, Parity):
        return name
    if name not in _PARITIES:
        raise ConceptMapsValueError(f"unknown parity {name!r}; expected None or one of {', '.join(sorted(_PARITIES))}")
    return own.get(name, _PARITIES[name])
