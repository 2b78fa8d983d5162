"""What to capture: the arguments of `trace`, checked against the model before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffusers_concept_maps.backbones import Backbone
from diffusers_concept_maps.concepts import check_concepts, check_embeds, check_token_policy, encode_concepts
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.heads import HeadSelection
from diffusers_concept_maps.methods import Method, find_method

NORMALIZATIONS = ("none", "softmax", "zscore")
"""How the score of a layer and step is normalized before the mean over layers and steps.

"none": the raw score. "softmax": a softmax over the concepts at every token. "zscore": every head's map of every
concept to mean 0 and deviation 1 over the whole clip, before heads are joined.
"""
BRANCHES = ("cond", "uncond", "both")


@dataclass(frozen=True)
class MethodPlan:
    """One method with its layers (0-based), its heads (None: all) and its normalization."""

    method: Method
    layers: frozenset[int]
    heads: HeadSelection | tuple[int, ...] | None
    normalize: str


@dataclass(frozen=True)
class CapturePlan:
    """Everything that a capture does, resolved.

    Attributes:
        concepts: names, in map order.
        embeds: `[concept, width]` or `[batch, concept, width]` in text-encoder space.
        methods: by name, in the order asked for.
        steps: 0-based step indices, or a fraction `(start, stop)` of the schedule.
        branches: guidance branches to record.
    """

    concepts: tuple[str, ...]
    embeds: torch.Tensor
    methods: dict[str, MethodPlan]
    steps: frozenset[int] | tuple[float, float]
    branches: tuple[str, ...]

    @property
    def deepest(self) -> int:
        """The deepest layer that any method reads."""
        return max(max(plan.layers) for plan in self.methods.values())

    def includes(self, step: int, steps: int | None) -> bool:
        """Whether a step is recorded.

        Args:
            step: 0-based.
            steps: number of steps of the run, None if unknown.

        Raises:
            ConceptMapsValueError: a step was asked for that the run does not have.
        """
        if isinstance(self.steps, frozenset):
            if steps is not None and max(self.steps) >= steps:
                raise ConceptMapsValueError(
                    f"step {max(self.steps)} is out of range; this run has {steps} steps, 0 to {steps - 1}"
                )
            return step in self.steps
        if steps is None:
            return True
        start, stop = self.steps
        first = min(int(start * steps), steps - 1)
        return first <= step < max(round(stop * steps), first + 1)


def make_plan(
    pipe: Any | None,
    transformer: Any,
    backbone: Backbone,
    *,
    concepts: Sequence[str] | None,
    methods: Sequence[str],
    layers: Iterable[int] | None,
    steps: Iterable[int] | None,
    heads: HeadSelection | Iterable[int] | None,
    concept_embeds: torch.Tensor | None,
    token_policy: str,
    normalize: str | None,
    branch: str,
) -> CapturePlan:
    """Resolve the arguments of `trace`; see there for their meaning and for what is raised."""
    check_token_policy(token_policy)
    if branch not in BRANCHES:
        raise ConceptMapsValueError(f"unknown branch {branch!r}; expected one of {', '.join(BRANCHES)}")
    if concept_embeds is not None:
        names = check_embeds(concept_embeds, concepts, backbone.text_width(transformer))
    else:
        names = check_concepts(concepts)
        if pipe is None:
            raise ConceptMapsValueError(
                "a bare transformer has no text encoder; pass concept_embeds, or trace the pipeline"
            )
    preset = backbone.preset(transformer)
    chosen_layers = None if layers is None else _indices("layer", layers, len(backbone.sites(transformer)))
    chosen_heads = heads if isinstance(heads, HeadSelection) or heads is None else tuple(heads)
    if isinstance(chosen_heads, tuple):
        _indices("head", chosen_heads, backbone.heads(transformer))
    elif chosen_heads and chosen_heads.threshold is None and chosen_heads.top_k > backbone.heads(transformer):
        raise ConceptMapsValueError(
            f"top_k is {chosen_heads.top_k}; the model has {backbone.heads(transformer)} heads in a layer"
        )
    plans = {
        name: _method_plan(name, chosen_layers, chosen_heads, normalize, len(names), transformer, backbone)
        for name in _check_methods(methods)
    }
    if concept_embeds is None:
        concept_embeds = encode_concepts(backbone, pipe, names, token_policy)
    return CapturePlan(
        concepts=names,
        embeds=concept_embeds.detach(),
        methods=plans,
        steps=_indices("step", steps, None) if steps is not None else preset.steps if preset else (0.0, 1.0),
        branches=("cond", "uncond") if branch == "both" else (branch,),
    )


def _check_methods(methods: Sequence[str]) -> Sequence[str]:
    if isinstance(methods, str):
        raise ConceptMapsValueError(f"methods is the string {methods!r}; expected a list such as [{methods!r}]")
    if not methods:
        raise ConceptMapsValueError("no methods; pass at least one, such as methods=['concept_attention']")
    for name in methods:
        find_method(name)
    if len(set(methods)) < len(methods):
        raise ConceptMapsValueError(f"methods {list(methods)} names one twice; name every method once")
    return methods


def _indices(what: str, indices: Iterable[int], count: int | None) -> frozenset[int]:
    """Checked 0-based indices; `count` is None where only the run will tell."""
    chosen = frozenset(indices)
    if not chosen:
        raise ConceptMapsValueError(f"no {what}s; pass at least one {what} index, or None for the default")
    for index in chosen:
        if not isinstance(index, int) or index < 0 or (count is not None and index >= count):
            limit = "0 or more" if count is None else f"0 to {count - 1}"
            raise ConceptMapsValueError(f"{what} {index!r} is out of range; expected an integer of {limit}")
    return chosen


def _method_plan(
    name: str,
    layers: frozenset[int] | None,
    heads: HeadSelection | tuple[int, ...] | None,
    normalize: str | None,
    concepts: int,
    transformer: Any,
    backbone: Backbone,
) -> MethodPlan:
    method, preset = find_method(name), backbone.preset(transformer)
    if layers is None:
        every = range(len(backbone.sites(transformer)))
        layers = frozenset(preset.layers.get(name, every) if preset else every)
    if heads is None:
        heads = preset.heads.get(name, method.default_heads) if preset else method.default_heads
        if isinstance(heads, HeadSelection):
            heads = replace(heads, top_k=min(heads.top_k, backbone.heads(transformer)))
    if normalize is None:
        normalize = "none" if concepts == 1 and method.default_normalize == "softmax" else method.default_normalize
    elif normalize not in NORMALIZATIONS:
        raise ConceptMapsValueError(
            f"unknown normalize {normalize!r}; expected None or one of {', '.join(NORMALIZATIONS)}"
        )
    elif normalize == "softmax" and concepts == 1:
        raise ConceptMapsValueError("a softmax over a single concept is 1 everywhere; add a concept or use 'zscore'")
    return MethodPlan(method, layers, heads, normalize)
