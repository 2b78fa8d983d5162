"""What to capture: the arguments of `trace`, checked against the model before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusers_concept_maps.backbones import Backbone, JointBackbone, Preset
from diffusers_concept_maps.concepts import check_concepts, check_embeds, check_token_policy, encode_concepts
from diffusers_concept_maps.crossing import check_crossing
from diffusers_concept_maps.detail import check_axes
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.heads import HeadSelection
from diffusers_concept_maps.indices import check_indices
from diffusers_concept_maps.methods import SPACES, Method, Rules, find_method
from diffusers_concept_maps.parity import TOKEN_POLICY, Parity, find_parity
from diffusers_concept_maps.prompt import PromptTokens, check_words
from diffusers_concept_maps.stream import READS

NORMALIZATIONS = ("none", "softmax", "zscore")
"""How the score of a layer and step is normalized before the mean over layers and steps.

"none": the raw score. "softmax": a softmax over the concepts at every token. "zscore": every head's map of every
concept to mean 0 and deviation 1 over the whole clip, before heads are joined.
"""
BRANCHES = ("cond", "uncond", "both")
TARGETS = ("concepts", "prompt")
ATTENTIONS = ("exact", "one_pass")


@dataclass(frozen=True)
class Request:
    """The options of `trace`, with the same defaults; see there."""

    methods: Sequence[str] = ("concept_attention",)
    layers: Iterable[int] | None = None
    steps: Iterable[int] | None = None
    heads: HeadSelection | Iterable[int] | None = None
    concept_embeds: torch.Tensor | None = None
    token_policy: str = "mean"
    normalize: str | None = None
    branch: str = "cond"
    parity: str | Parity | None = None
    target: str = "concepts"
    prompt_tokens: Mapping[str, Sequence[int]] | None = None
    space: str = "output"
    reads: str = "both"
    attention: str = "exact"
    detail: Sequence[str] = ()
    detail_path: str | Path | None = None


@dataclass(frozen=True)
class MethodPlan:
    """One method with its layers (0-based), its heads (None: all), its rules, and whether a softmax follows."""

    method: Method
    layers: frozenset[int]
    heads: HeadSelection | tuple[int, ...] | None
    rules: Rules
    softmax: bool


@dataclass(frozen=True)
class CapturePlan:
    """Everything that a capture does, resolved.

    Attributes:
        concepts: names, in map order; None where they are the words of a prompt that is not known yet.
        embeds: `[concept, width]` or `[batch, concept, width]` in text-encoder space; None for `target="prompt"`.
        token_policy: how the tokens of a concept became one embedding; None where no concept was encoded.
        prompt: where the words of the prompt are; None for `target="concepts"`.
        methods: by name, in the order asked for.
        preset: the checkpoint's, where layers, heads or steps were left to it; None otherwise.
        steps: 0-based step indices, or a fraction `(start, stop)` of the schedule.
        branches: guidance branches to record.
        normalize: as asked for; None is each method's default.
        parity: the official implementation to equal, None for none.
        reads: what concept tokens attend to.
        attention: how concept tokens get through the blocks, one of `ATTENTIONS`.
        detail: axes to keep.
        detail_path: file for the kept axes, None for memory.
        depth: number of layers of the model.
        head_count: number of heads in each.
    """

    concepts: tuple[str, ...] | None
    embeds: torch.Tensor | None
    token_policy: str | None
    prompt: PromptTokens | None
    methods: dict[str, MethodPlan]
    preset: Preset | None
    steps: frozenset[int] | tuple[float, float]
    branches: tuple[str, ...]
    normalize: str | None
    parity: Parity | None
    reads: str
    attention: str
    detail: tuple[str, ...]
    detail_path: Path | None
    depth: int
    head_count: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the concepts; empty until the prompt is known where they are its words."""
        return self.prompt.names if self.prompt is not None else self.concepts or ()

    @property
    def layers(self) -> frozenset[int]:
        """The layers that any method reads."""
        return frozenset().union(*(plan.layers for plan in self.methods.values()))

    @property
    def deepest(self) -> int:
        """The deepest layer that any method reads."""
        return max(self.layers)

    def reading(self, layer: int) -> dict[str, MethodPlan]:
        """The methods that read a layer; those that choose heads come last, see `LayerTaps.output_similarity`."""
        reading = {name: plan for name, plan in self.methods.items() if layer in plan.layers}
        return dict(sorted(reading.items(), key=lambda item: isinstance(item[1].heads, HeadSelection)))

    def has_softmax(self, method: str) -> bool:
        """Whether a softmax over the concepts is part of a method; over a single one it would be 1 everywhere."""
        return self.methods[method].softmax and (self.parity is not None or len(self.names) != 1)

    def check_words(self) -> None:
        """The words of the prompt are known.

        Raises:
            ConceptMapsValueError: it is one word, and a softmax was asked for.
        """
        if self.normalize == "softmax" and self.parity is None:
            _check_softmax(len(self.names))

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


class _Model(NamedTuple):
    """What the plan needs to know of the model.

    Number of layers, of heads in each, the checkpoint's preset, and whether text and image attend jointly.
    """

    depth: int
    head_count: int
    preset: Preset
    joint: bool


def make_plan(
    pipe: Any | None, transformer: Any, backbone: Backbone, concepts: Sequence[str] | None, request: Request
) -> CapturePlan:
    """Resolve the arguments of `trace`; see there for their meaning and for what is raised."""
    parity = find_parity(request.parity, backbone.parities)
    request = replace(request, layers=_once(request.layers), steps=_once(request.steps), heads=_once(request.heads))
    method_names = _check_methods(request.methods)
    _check_choices(request, method_names)
    joint = isinstance(backbone, JointBackbone)
    if not joint:
        check_crossing(transformer, method_names, request.reads, request.target, parity)
    names, prompt = _targets(pipe, transformer, backbone, concepts, request, parity)
    preset = backbone.preset(transformer)
    defaults = preset or Preset(name="", source="everything", config={})
    model = _Model(len(backbone.sites(transformer)), backbone.heads(transformer), defaults, joint)
    count = None if names is None else len(names)
    methods = {name: _method_plan(name, request, count, parity, model) for name in method_names}
    steps = defaults.steps if request.steps is None else check_indices("step", request.steps, None)
    detail = check_axes(request.detail)
    embeds, policy = request.concept_embeds, None
    if embeds is None and prompt is None:
        assert names is not None  # only a prompt names its words later
        policy, length = (TOKEN_POLICY, parity.concept_length) if parity else (request.token_policy, None)
        embeds = encode_concepts(backbone, pipe, names, policy, length)
    return CapturePlan(
        concepts=names,
        embeds=None if embeds is None else embeds.detach(),
        token_policy=policy,
        prompt=prompt,
        methods=methods,
        preset=preset if None in (request.layers, request.heads, request.steps) else None,
        steps=steps,
        branches=("cond", "uncond") if request.branch == "both" else (request.branch,),
        normalize=request.normalize,
        parity=parity,
        reads=request.reads,
        attention=request.attention,
        detail=detail,
        detail_path=None if request.detail_path is None else Path(request.detail_path),
        depth=model.depth,
        head_count=model.head_count,
    )


def _once(indices: Any) -> Any:
    """An iterator can be read once, and every method reads it."""
    return tuple(indices) if isinstance(indices, Iterable) else indices


def _check_choices(request: Request, method_names: Sequence[str]) -> None:
    """Raise unless every option that has a fixed set of values has one of them."""
    check_token_policy(request.token_policy)
    if request.token_policy != "mean" and (request.target == "prompt" or request.concept_embeds is not None):
        given = "concept_embeds are given" if request.target == "concepts" else "words of the prompt are the targets"
        raise ConceptMapsValueError(
            f"token_policy is {request.token_policy!r}, but it joins the tokens of concepts that are encoded, and "
            f"here {given}; leave it out"
        )
    choices = {"branch": BRANCHES, "target": TARGETS, "space": SPACES, "reads": READS, "attention": ATTENTIONS}
    for name, allowed in choices.items():
        if getattr(request, name) not in allowed:
            raise ConceptMapsValueError(
                f"unknown {name} {getattr(request, name)!r}; expected one of {', '.join(allowed)}"
            )
    if request.space != "output" and "concept_attention" not in method_names:
        raise ConceptMapsValueError(
            f"space is {request.space!r}, but only the method 'concept_attention' has spaces; name it in methods"
        )
    if request.detail_path is not None and not request.detail:
        raise ConceptMapsValueError("detail_path is given without detail; name the axes to keep, such as ('layer',)")


def _targets(
    pipe: Any | None,
    transformer: Any,
    backbone: Backbone,
    concepts: Sequence[str] | None,
    request: Request,
    parity: Parity | None,
) -> tuple[tuple[str, ...] | None, PromptTokens | None]:
    """Names of the targets, and where they are in the prompt if they are its words."""
    if request.target == "prompt":
        return _prompt_targets(pipe, backbone, concepts, request, parity)
    if request.prompt_tokens is not None:
        raise ConceptMapsValueError("prompt_tokens are positions in the prompt; pass target='prompt' with them")
    if request.concept_embeds is not None:
        return check_embeds(request.concept_embeds, concepts, backbone.text_width(transformer)), None
    names = check_concepts(concepts)
    if pipe is None:
        raise ConceptMapsValueError(
            "a bare transformer has no text encoder; pass concept_embeds, or trace the pipeline"
        )
    return names, None


def _prompt_targets(
    pipe: Any | None, backbone: Backbone, concepts: Sequence[str] | None, request: Request, parity: Parity | None
) -> tuple[tuple[str, ...] | None, PromptTokens]:
    if request.concept_embeds is not None:
        raise ConceptMapsValueError("target='prompt' reads the prompt's own tokens; leave concept_embeds out")
    if request.reads != "both":
        raise ConceptMapsValueError(
            f"reads is {request.reads!r}, but words of the prompt attend as the model has them"
        )
    if request.attention != "exact":
        raise ConceptMapsValueError(
            f"attention is {request.attention!r}, but words of the prompt are in the blocks already; leave it out"
        )
    if request.branch != "cond":
        raise ConceptMapsValueError(
            f"branch is {request.branch!r}, but only the conditional branch has the words of the prompt; use 'cond'"
        )
    names = check_words(pipe, concepts, request.prompt_tokens)
    return names, PromptTokens(pipe, backbone, names, request.prompt_tokens, official=parity is not None)


def _check_methods(methods: Sequence[str]) -> Sequence[str]:
    if isinstance(methods, str):
        raise ConceptMapsValueError(f"methods is the string {methods!r}; expected a list such as [{methods!r}]")
    methods = tuple(methods)
    if not methods:
        raise ConceptMapsValueError("no methods; pass at least one, such as methods=['concept_attention']")
    for name in methods:
        find_method(name)
    if len(set(methods)) < len(methods):
        raise ConceptMapsValueError(f"methods {list(methods)} names one twice; name every method once")
    return methods


def _method_plan(
    name: str, request: Request, concepts: int | None, parity: Parity | None, model: _Model
) -> MethodPlan:
    method = find_method(name)
    if request.layers is None:
        layers = frozenset(model.preset.layers.get(name, range(model.depth)))
    else:
        layers = check_indices("layer", request.layers, model.depth)
    rules, normalize = _rules(method, request, concepts, parity, joint=model.joint)
    return MethodPlan(method, layers, _heads(method, request, model), rules, normalize == "softmax")


def _heads(method: Method, request: Request, model: _Model) -> HeadSelection | tuple[int, ...] | None:
    """Indices or a selection; a default that asks for more heads than there are takes those there are."""
    chosen = request.heads
    if chosen is None:
        default = model.preset.heads.get(method.name, method.default_heads)
        if isinstance(default, HeadSelection):
            return replace(default, top_k=min(default.top_k, model.head_count))
        return default
    if not isinstance(chosen, HeadSelection):
        return tuple(sorted(check_indices("head", chosen, model.head_count)))
    if chosen.top_k > model.head_count and chosen.threshold is None:
        raise ConceptMapsValueError(f"top_k is {chosen.top_k}; the model has {model.head_count} heads in a layer")
    return chosen


def _rules(
    method: Method, request: Request, concepts: int | None, parity: Parity | None, *, joint: bool
) -> tuple[Rules, str]:
    """Rules and normalization of a method, in joint or in cross-attention."""
    normalize = request.normalize
    if normalize is not None and normalize not in NORMALIZATIONS:
        raise ConceptMapsValueError(
            f"unknown normalize {normalize!r}; expected None or one of {', '.join(NORMALIZATIONS)}"
        )
    if parity is not None:
        official = parity.rules if joint else parity.crossing
        if method.name not in official:
            raise ConceptMapsValueError(
                f"parity={parity.name!r} has no method {method.name!r}; its methods are {', '.join(official)}"
            )
        if joint and request.target == "prompt" and method.name not in ("gramcol", "imap"):
            raise ConceptMapsValueError(
                f"parity={parity.name!r} has no {method.name!r} for words of the prompt; use 'gramcol' or 'imap'"
            )
        fixed = {"space": "output", "reads": "both", "token_policy": "mean"}
        if normalize == "zscore" or any(getattr(request, name) != value for name, value in fixed.items()):
            raise ConceptMapsValueError(
                f"parity={parity.name!r} reproduces one implementation; leave space, reads and token_policy alone, "
                f"and use normalize='none' or 'softmax'"
            )
        return official[method.name], normalize or parity.default_normalize
    if normalize == "softmax":
        _check_softmax(concepts)
    if normalize is None:
        normalize = "none" if concepts == 1 and method.default_normalize == "softmax" else method.default_normalize
    return Rules(standardize="clip" if normalize == "zscore" else "none", space=request.space), normalize


def _check_softmax(concepts: int | None) -> None:
    """Raise if there is one concept only; None is a number that only the run will tell."""
    if concepts == 1:
        raise ConceptMapsValueError("a softmax over a single concept is 1 everywhere; add a concept or use 'zscore'")
