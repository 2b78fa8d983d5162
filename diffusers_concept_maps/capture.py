"""Attach a capture to a transformer and undo it exactly; the only file that touches a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from diffusers_concept_maps.backbones import Backbone, Site, find_backbone, find_transformers, uncompiled
from diffusers_concept_maps.compiled import FollowedCall, HeldForward, Relay, held_forward, is_compiled, new_order
from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.heads import HeadSelection
from diffusers_concept_maps.maps import ConceptMaps
from diffusers_concept_maps.one_pass import check_one_pass
from diffusers_concept_maps.parallel import check_parallel
from diffusers_concept_maps.parity import Parity
from diffusers_concept_maps.plan import CapturePlan, Request, make_plan
from diffusers_concept_maps.processors import ConceptAttnProcessor, ConceptProcessor, carry_over, concept_processor
from diffusers_concept_maps.recorder import Recorder
from diffusers_concept_maps.results import Results


class CaptureHandle:
    """A capture that is attached to a transformer until `remove` is called.

    Attributes:
        maps: the maps per guidance branch, filled while the transformer runs.
    """

    def __init__(
        self, plan: CapturePlan, recorder: Recorder, backbone: Backbone, sites: Mapping[Any, list[Site]]
    ) -> None:
        """Attach to every transformer; whatever fails on the way, everything done so far is undone."""
        metadata = _metadata(backbone, uncompiled(next(iter(sites))), plan)
        self.maps = {
            branch: ConceptMaps(_BranchView(plan, recorder.results, branch, metadata), tuple(plan.methods))
            for branch in plan.branches
        }
        self._prompt = plan.prompt
        self._recorder = recorder
        self._backbone = backbone
        self._hooks: list[RemovableHandle] = []
        self._swapped: list[tuple[Any, Any, ConceptProcessor]] = []
        self._adopted: list[ConceptProcessor] = []
        self._call: dict[str, Any] = {}
        self._patched: list[tuple[Any, str, Any, Any]] = []
        try:
            if self._prompt is not None:
                self._prompt.listen()
            for transformer, own in sites.items():
                self._follow(transformer)
                if any(is_compiled(module) for module in transformer.modules()):
                    self._attach_compiled(own, plan.deepest)
                else:
                    self._attach(own, joins=plan.attention == "one_pass")
        except BaseException:
            self.remove(failed=True)
            raise

    def _follow(self, transformer: Any) -> None:
        """Notice when a transformer, compiled or not, is called and when it is done."""
        if transformer._compiled_call_impl is None:
            self._hooks.append(transformer.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._hooks.append(transformer.register_forward_hook(self._end, always_call=True))
        else:
            call = FollowedCall(transformer, self._begin, transformer._compiled_call_impl, self._end)
            self._patch(transformer, "_compiled_call_impl", call)

    def _attach(self, sites: list[Site], *, joins: bool) -> None:
        for attention in (attention for site in sites for attention in (site.attention, *site.others)):
            self._install(attention, self._recorder)
        for site in sites:
            self._hooks.append(site.block.register_forward_pre_hook(partial(self._hold, site), with_kwargs=True))
            if joins:  # before the hooks of the user, which then see the outputs that they saw
                self._hooks.append(site.block.register_forward_hook(self._part, prepend=True))

    def _attach_compiled(self, sites: list[Site], deepest: int) -> None:
        """Calls are replaced, because hooks would be compiled along with the module that they are of."""
        order = new_order()
        for layer, site in enumerate(sites):
            relay = Relay(
                self._recorder, self._backbone, site, call=self._call, order=order, recorded=layer <= deepest
            )
            for attention in (site.attention, *site.others):
                self._install(attention, relay)
            self._patch(site.block, "forward", held_forward(relay, site.block.forward))

    def _patch(self, module: Any, name: str, wrapper: Callable[..., Any]) -> None:
        self._patched.append((module, name, wrapper, module.__dict__.get(name)))
        module.__dict__[name] = wrapper

    def _install(self, attention: Any, recorder: Recorder | Relay) -> None:
        installed: Any = attention.processor
        if isinstance(installed, ConceptProcessor):
            installed.recorder = recorder
            self._adopted.append(installed)
        else:
            processor = concept_processor(installed)
            assert processor is not None  # `_check_free` has looked
            processor.recorder = recorder
            self._swapped.append((attention, installed, processor))
            attention.processor = processor

    def remove(self, *, failed: bool = False) -> None:
        """Put the very processors back that were there, and take every hook out; a second call does nothing.

        Args:
            failed: the run was cut short; maps of kept axes are then dropped instead of finished.
        """
        if self._prompt is not None:
            self._prompt.stop()
        for hook in self._hooks:
            hook.remove()
        for module, name, wrapper, before in self._patched:
            restores = module.__dict__.get(name) is wrapper  # otherwise somebody has wrapped it, or compiled anew
            if restores:
                module.__dict__.pop(name)
                module.__dict__.update({} if before is None else {name: before})
            if isinstance(wrapper, HeldForward):
                wrapper.release(passes_on=not restores)
        for attention, stock, processor in self._swapped:
            if attention.processor is processor:  # otherwise somebody has set another one since: theirs stays
                attention.processor = stock
                carry_over(processor, stock)
            processor.recorder = None  # it may live on, where the user or `fuse_qkv_projections` has kept it
        for processor in self._adopted:
            processor.__dict__.pop("recorder", None)
        self._hooks, self._patched, self._swapped, self._adopted, self._prompt = [], [], [], [], None
        self._recorder.results.close(failed=failed)

    def _begin(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _expect_eager()
        whole = uncompiled(transformer)
        self._call.clear()
        self._call.update(_by_name(whole, args, kwargs))
        self._recorder.begin(whole, dict(self._call))

    def _end(self, transformer: Any, args: tuple[Any, ...], output: Any) -> None:
        self._call.clear()
        self._recorder.end(finished=output is not None)

    def _hold(
        self, site: Site, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        _expect_eager()
        joined = self._recorder.hold(site, _by_name(block, args, kwargs))
        return None if joined is None else ((), joined)

    def _part(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._recorder.part(output)


def attach(pipe_or_transformer: Any, concepts: Sequence[str] | None = None, **options: Any) -> CaptureHandle:
    """Attach a capture; the arguments and their defaults are those of `trace`.

    Returns:
        A handle with the maps and `remove()`.

    Raises:
        ConceptMapsError: as `trace`; nothing has been changed then.
    """
    request = Request(**options)
    outer = find_transformers(pipe_or_transformer)
    pipe = None if outer[0] is pipe_or_transformer else pipe_or_transformer
    transformers = [uncompiled(transformer) for transformer in outer]
    backbone = find_backbone(transformers[0])
    sites = {transformer: find_backbone(transformer).sites(transformer) for transformer in transformers}
    for transformer, own in sites.items():
        _check_free(transformer, own)
        check_parallel(backbone, transformer)
    _check_alike(backbone, sites)
    plan = make_plan(pipe, transformers[0], backbone, concepts, request)
    if plan.attention == "one_pass":
        for transformer in outer:
            check_one_pass(backbone, transformer)
    recorder = Recorder(plan, backbone, sites, pipe)
    return CaptureHandle(plan, recorder, backbone, dict(zip(outer, sites.values(), strict=True)))


@contextmanager
def trace(
    pipe_or_transformer: Any,
    concepts: Sequence[str] | None = None,
    *,
    methods: Sequence[str] = ("concept_attention",),
    layers: Iterable[int] | None = None,
    steps: Iterable[int] | None = None,
    heads: HeadSelection | Iterable[int] | None = None,
    concept_embeds: torch.Tensor | None = None,
    token_policy: str = "mean",
    normalize: str | None = None,
    branch: str = "cond",
    parity: str | Parity | None = None,
    target: str = "concepts",
    prompt_tokens: Mapping[str, Sequence[int]] | None = None,
    space: str = "output",
    reads: str = "both",
    attention: str = "exact",
    detail: Sequence[str] = (),
    detail_path: str | Path | None = None,
) -> Iterator[Any]:
    """Record saliency maps of concepts while an unmodified pipeline generates.

    The frames are the ones the pipeline would have made, bit for bit, and afterwards the transformer holds the same
    processor objects as before and no hook. Every run of the pipeline inside the block starts the maps anew; calls
    that another pipeline makes with the same transformer are not recorded.

    Args:
        pipe_or_transformer: a diffusers pipeline whose transformer is one of `supported()`, or such a transformer; of
            a bare transformer every forward pass counts as a step and every row of its batch as a video.
        concepts: words or phrases, in the prompt or not.
        methods: names of map methods: "concept_attention", "cross_attention", "gramcol", "imap".
        layers: 0-based layers; None is the checkpoint's preset, or all layers.
        steps: 0-based denoising steps; None is the checkpoint's preset, or all steps.
        heads: 0-based heads or a `HeadSelection`, for every method of the call; None is the preset or the method's
            default: all heads, and for "imap" the five with the best frame separability.
        concept_embeds: float tensor `[concept, dim]` or `[batch, concept, dim]` in text-encoder space, instead of text
            encoding; `concepts` are then their names.
        token_policy: how the tokens of a concept that is encoded become one embedding: "mean", "first" or "last".
        normalize: "none" the raw scores; "softmax" over the concepts; "zscore" every head's map standardized over the
            clip; None the method's default ("softmax" for "concept_attention" and "cross_attention", "none" where
            there is one concept only; "zscore" for "gramcol" and "imap"). See `docs/methods/`.
        branch: guidance branch to record: "cond", "uncond", or "both".
        parity: equal an official implementation, quirks included: "imap" or "concept_attention"; `parity.IMAP` and
            `parity.CONCEPT_ATTENTION`, which may be passed as well, list what each turns on.
        target: "concepts" are tokens of their own, in the prompt or not; "prompt" are words of the prompt, found by
            the pipeline's tokenizer, sub-words and occurrences averaged, padding left out. Without `concepts` they
            are all its words.
        prompt_tokens: positions of each word in the prompt for `target="prompt"`, where its text is not known.
        space: what "concept_attention" compares: "output", "value" or "query_key".
        reads: what concept tokens attend to: "both" concepts and video, "image", "concepts" or "none".
        attention: "exact" takes the concepts through every block apart from the model's own calls; "one_pass" sends
            them along in those, which is less work and leaves the frames equal to rounding. It refuses caches,
            context parallelism and training mode. See `docs/methods/`.
        detail: axes to keep out of "layer", "step" and "head", for `ConceptMaps.detail`; every kept map is copied to
            the host as it is made, for which the device waits.
        detail_path: safetensors file to stream the kept axes to, where they would not fit into memory.

    Yields:
        `ConceptMaps`, filled while the pipeline runs and valid after the block; with `branch="both"` a dict
        `{"cond": ConceptMaps, "uncond": ConceptMaps}`.

    Raises:
        ConceptMapsError: the transformer cannot be traced or is being traced already, or an argument is wrong (then
            it is also a ValueError). Nothing has been changed in the model then.

    Example:
        >>> with dcm.trace(pipe, ["dog", "running"], methods=["imap"]) as maps:
        ...     video = pipe("a dog running on the beach").frames[0]
        >>> maps["running"].tensor.shape    # [batch, frame, height, width]
    """
    handle = attach(
        pipe_or_transformer,
        concepts,
        methods=methods,
        layers=layers,
        steps=steps,
        heads=heads,
        concept_embeds=concept_embeds,
        token_policy=token_policy,
        normalize=normalize,
        branch=branch,
        parity=parity,
        target=target,
        prompt_tokens=prompt_tokens,
        space=space,
        reads=reads,
        attention=attention,
        detail=detail,
        detail_path=detail_path,
    )
    try:
        yield handle.maps if branch == "both" else handle.maps[branch]
    except BaseException:
        handle.remove(failed=True)
        raise
    handle.remove()


def _check_alike(backbone: Backbone, sites: Mapping[Any, list[Site]]) -> None:
    """Raise unless the transformers of a pipeline have the same layers and heads, of which the maps are made."""
    first, *others = sites
    for other in others:
        if (len(sites[other]), backbone.heads(other)) != (len(sites[first]), backbone.heads(first)):
            raise ConceptMapsError(
                f"transformer_2 has {len(sites[other])} layers of {backbone.heads(other)} heads, transformer has "
                f"{len(sites[first])} of {backbone.heads(first)}; expected two that are alike. Trace one of them"
            )


def _check_free(transformer: Any, sites: list[Site]) -> None:
    """Raise unless every attention module can be captured and none is captured already."""
    for layer, site in enumerate(sites):
        for attention in (site.attention, *site.others):
            _check_processor(transformer, layer, attention.processor)


def _check_processor(transformer: Any, layer: int, installed: Any) -> None:
    if isinstance(installed, ConceptProcessor):
        if installed.recorder is not None:
            raise ConceptMapsError(
                f"this {type(transformer).__name__} is being traced already; leave the other `with` block first"
            )
        if installed.stock is None and not isinstance(installed, ConceptAttnProcessor):
            raise ConceptMapsError(f"layer {layer} holds {type(installed).__name__}, which shows no attention")
    elif concept_processor(installed) is None:
        raise ConceptMapsError(
            f"layer {layer} has the attention processor {type(installed).__name__}, which cannot be traced; put "
            f"the model's own processor or one of concept_attn_processors() back first"
        )


def _expect_eager() -> None:
    if torch.compiler.is_compiling():
        raise ConceptMapsError("the transformer was compiled during the capture; compile it before the `with` block")


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a module's forward by name."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


@dataclass(frozen=True)
class _BranchView:
    """The maps of one guidance branch, as `ConceptMaps` reads them."""

    plan: CapturePlan
    results: Results
    branch: str
    known: dict[str, Any]  # the metadata that does not depend on the run

    @property
    def concepts(self) -> tuple[str, ...]:
        return self.plan.names

    @property
    def metadata(self) -> dict[str, Any]:
        methods = {
            name: entry | {"normalize": _normalization(self.plan, name)}
            for name, entry in self.known["methods"].items()
        }
        return self.known | {"branch": self.branch, "methods": methods}

    def read(self, method: str) -> torch.Tensor:
        return self.results.read(self.branch, method)

    def coverage(self, method: str) -> torch.Tensor:
        return self.results.coverage(self.branch, method)

    def detail(self, method: str) -> torch.Tensor:
        return self.results.detail(self.branch, method)


def _metadata(backbone: Backbone, transformer: Any, plan: CapturePlan) -> dict[str, Any]:
    """What made the maps, for `ConceptMaps.metadata`, as far as it does not depend on the run."""
    return {
        "transformer": type(transformer).__name__,
        "preset": {"name": plan.preset.name, "source": plan.preset.source} if plan.preset else None,
        "target": "concepts" if plan.prompt is None else "prompt",
        "token_policy": plan.token_policy,
        "parity": plan.parity.name if plan.parity else None,
        "reads": plan.reads,
        "attention": plan.attention,
        "steps": sorted(plan.steps) if isinstance(plan.steps, frozenset) else list(plan.steps),
        "methods": {
            name: {
                "layers": sorted(method.layers),
                "heads": _described(method.heads),
                "space": method.rules.space,
            }
            for name, method in plan.methods.items()
        },
        **backbone.geometry(transformer),
    }


def _described(heads: HeadSelection | tuple[int, ...] | None) -> str | list[int] | None:
    """Heads as JSON has them, so that a loaded file says the same."""
    if isinstance(heads, HeadSelection):
        return str(heads)
    return None if heads is None else list(heads)


def _normalization(plan: CapturePlan, method: str) -> str:
    """What was done to the scores of a method; only the run tells whether a prompt has words enough for a softmax."""
    standardized = {"none": "none", "clip": "zscore", "text": "zscore over the text axis"}
    return "softmax" if plan.has_softmax(method) else standardized[plan.methods[method].rules.standardize]
