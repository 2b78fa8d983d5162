"""Captures: what `trace` attaches to a transformer, and the maps that come of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusers_concept_maps.attachment import Attachment, check_alike, check_free
from diffusers_concept_maps.backbones import Backbone, Site, find_backbone, find_transformers, uncompiled
from diffusers_concept_maps.heads import HeadSelection
from diffusers_concept_maps.maps import ConceptMaps
from diffusers_concept_maps.one_pass import check_one_pass
from diffusers_concept_maps.parallel import check_parallel
from diffusers_concept_maps.parity import Parity
from diffusers_concept_maps.plan import CapturePlan, Request, make_plan
from diffusers_concept_maps.recorder import Recorder
from diffusers_concept_maps.results import Results


class CaptureHandle(Attachment):
    """A capture that is attached to a transformer until `remove` is called.

    Attributes:
        maps: the maps per guidance branch, filled while the transformer runs.
    """

    def __init__(
        self,
        plan: CapturePlan,
        recorder: Recorder,
        backbone: Backbone,
        sites: Mapping[Any, list[Site]],
        *,
        stops: bool = False,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Attach to every transformer; whatever fails on the way, everything done so far is undone."""
        metadata = _metadata(backbone, uncompiled(next(iter(sites))), plan) | dict(notes or {})
        self.maps = {
            branch: ConceptMaps(_BranchView(plan, recorder.results, branch, metadata), tuple(plan.methods))
            for branch in plan.branches
        }
        self._results = recorder.results
        self._prompt = plan.prompt
        if self._prompt is not None:
            self._prompt.listen()
        joins = plan.attention == "one_pass"
        super().__init__(recorder, backbone, sites, deepest=plan.deepest, joins=joins, stops=stops)

    def remove(self, *, failed: bool = False) -> None:
        """See `Attachment.remove`.

        Args:
            failed: the run was cut short; maps of kept axes are then dropped instead of finished.
        """
        if self._prompt is not None:
            self._prompt.stop()
            self._prompt = None
        super().remove(failed=failed)
        self._results.close(failed=failed)


def attach(
    pipe_or_transformer: Any,
    concepts: Sequence[str] | None = None,
    *,
    single_passes: bool = False,
    notes: Mapping[str, Any] | None = None,
    **options: Any,
) -> CaptureHandle:
    """Attach a capture; the arguments and their defaults are those of `trace`.

    Args:
        pipe_or_transformer: as for `trace`.
        concepts: likewise.
        single_passes: every forward pass counts as a step, and ends behind the deepest layer that is read with
            `attachment.DeepestLayerReached`.
        notes: further entries of the metadata, JSON-compatible.
        **options: as for `trace`.

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
        check_free(transformer, own)
        check_parallel(backbone, transformer)
    check_alike(backbone, sites)
    plan = make_plan(pipe, transformers[0], backbone, concepts, request)
    if plan.attention == "one_pass":
        for transformer in outer:
            check_one_pass(backbone, transformer)
    recorder = Recorder(plan, backbone, sites, None if single_passes else pipe)
    return CaptureHandle(
        plan, recorder, backbone, dict(zip(outer, sites.values(), strict=True)), stops=single_passes, notes=notes
    )


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
        "detail": list(plan.detail),
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
