"""Cross-attention guidance (DiffTrack, arXiv 2506.17220): away from frames that do not look at one another.

Beside the model's own prediction, one is made in which, at some layers, image tokens attend to no other frame. The
difference between the two, times a scale, is added to every prediction of the step alike, conditional or not, so that
it goes through the pipeline's own guidance unchanged: `u + g (c - u)` becomes the same plus the difference.

The model's own calls stay as they are. The second prediction starts from the states that these had in front of the
first guided layer, and from the conditional rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from diffusers_concept_maps.attachment import Attachment, check_alike, check_free, check_without
from diffusers_concept_maps.backbones import Backbone, Site, find_backbone, find_transformers
from diffusers_concept_maps.compiled import is_compiled
from diffusers_concept_maps.correspondence.within_frames import MODES, within_frames
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.indices import check_indices
from diffusers_concept_maps.listener import Announced, Pass, PassListener
from diffusers_concept_maps.progress import Place

_SHARED = ("attention_kwargs", "image_rotary_emb", "rope_interpolation_scale")
"""Arguments of transformers that are the same for all rows, whatever the length of their first dimension."""


@dataclass(frozen=True)
class _Settings:
    scale: float
    layers: frozenset[int]
    start: float
    stop: float
    mode: str


class _Guide(PassListener[Pass]):
    """Follows the model's own passes, and serves the attention of the second prediction.

    Attributes:
        perturbed: the pass of the second prediction while it runs.
    """

    slot: ClassVar[str] = "guide"
    restricts = True

    def __init__(
        self, settings: _Settings, backbone: Backbone, sites: Mapping[nn.Module, list[Site]], pipe: Any
    ) -> None:
        super().__init__(backbone, sites, pipe, layers=settings.layers, branches=("cond", "uncond", "further"))
        self.perturbed: Pass | None = None
        self._settings = settings

    @property
    def current(self) -> Pass | None:
        """The pass that is followed."""
        return self._pass

    def includes(self, place: Place) -> bool:
        assert place.steps is not None  # a pipeline's
        return self._settings.start <= place.step / place.steps < self._settings.stop

    def check(self, transformer: Any) -> None:
        if getattr(transformer, "is_cache_enabled", False):
            raise ConceptMapsError(
                "a cache would keep states of the second prediction for the model's own; call disable_cache() on the "
                "transformer to guide"
            )
        if getattr(transformer, "_parallel_config", None) is not None:
            raise ConceptMapsError("guidance does not work with context parallelism; disable it on the transformer")

    def _check_processors(self, transformer: nn.Module) -> None:
        """Raise where nothing would be cut any more; other listeners can go on without a layer.

        Raises:
            ConceptMapsError: the processor of a guided layer was replaced.
        """
        sites = self._sites[transformer]
        replaced = [layer for layer in sorted(self._settings.layers) if not self._serves(sites[layer])]
        if replaced:
            names = sorted({type(sites[layer].attention.processor).__name__ for layer in replaced})
            raise ConceptMapsError(
                f"the attention processors of the guided layers {replaced} were replaced by {', '.join(names)}, which "
                f"cuts nothing; fuse projections and set processors before the `with` block of guidance, and leave "
                f"blocks in the reverse of their order"
            )

    def open(self, announced: Announced, current: Pass, present: Mapping[str, slice], device: torch.device) -> Pass:
        if current.grid.frames == 1:
            raise ConceptMapsValueError(
                "guidance is about attention between frames, and there is only one; generate a video"
            )
        return current

    def hold(self, site: Site, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        if self.perturbed is not None:
            self.perturbed.arguments = arguments
            return None
        return super().hold(site, arguments)

    def records(self, attention: nn.Module) -> bool:
        return self.perturbed is not None and self._layer.get(attention, -1) in self._layers

    def text_tokens(self, attention: nn.Module) -> int:
        current, self._pass = self._pass, self.perturbed
        try:
            return super().text_tokens(attention)
        finally:
            self._pass = current

    def observe(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is looked at."""

    def restrict(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        text: slice,
        image: slice,
        mask: torch.Tensor | None = None,
        linear: bool = False,
    ) -> torch.Tensor:
        assert self.perturbed is not None  # `records` is True
        grid, mode = self.perturbed.grid, self._settings.mode
        if linear and mode == "renorm":
            raise ConceptMapsValueError(
                "mode is 'renorm', but attention between frames is linear in this model, without a softmax to take "
                "over fewer tokens; use mode='zero'"
            )
        start = (image.start or 0) + grid.start
        size = grid.height * grid.width
        return within_frames(
            query, key, value, start=start, frames=grid.frames, size=size, mode=mode, mask=mask, linear=linear
        )


class _Guidance(Attachment):
    """Guidance that is attached to transformers until `remove` is called."""

    ends_first: ClassVar[bool] = False

    def __init__(
        self, settings: _Settings, guide: _Guide, backbone: Backbone, sites: Mapping[Any, list[Site]]
    ) -> None:
        self._settings = settings
        self._guide = guide
        self._sites = sites
        self._states: dict[type, Any] = {}  # what the last block of each class in front of the guided layers returned
        self._delta: tuple[int, torch.Tensor] | None = None  # of the conditional pass of a step, for its others
        super().__init__(guide, backbone, sites, deepest=max(settings.layers))
        for own in sites.values():
            last = {type(site.block): site.block for site in own[: min(settings.layers)]}
            self._hooks += [block.register_forward_hook(self._keep) for block in last.values()]

    def _keep(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current = self._guide.current
        if current is not None and "cond" in current.branches:
            self._states[type(block)] = output

    def _end(self, transformer: Any, args: tuple[Any, ...], output: Any) -> Any:
        current, call, states = self._guide.current, dict(self._call), self._states
        self._states = {}
        super()._end(transformer, args, output)
        if output is None or current is None:
            return None
        sample = output[0]
        if "cond" in current.branches:
            delta = self._difference(transformer, current, call, states, sample)
            self._delta = current.step, delta
        elif self._delta is not None and self._delta[0] == current.step:
            delta = self._delta[1]
        else:
            raise ConceptMapsError(
                f"step {current.step} has an unconditional pass without a conditional one before it; guidance needs "
                f"both, in this order"
            )
        guided = sample.to(delta.dtype, copy=True)  # the model's own may have been kept by somebody
        for rows in current.branches.values():
            guided[rows] += delta
        return _with_first(output, guided.to(sample.dtype))

    def _difference(
        self, transformer: Any, current: Pass, call: dict[str, Any], states: Mapping[type, Any], sample: torch.Tensor
    ) -> torch.Tensor:
        """Scale times what the model predicts less the second prediction, of the conditional rows, float32 or more."""
        rows = current.branches["cond"]
        own = {name: value if name in _SHARED else _rows(value, sample.shape[0], rows) for name, value in call.items()}
        kept = {kind: _rows(state, sample.shape[0], rows) for kind, state in states.items()}
        blocks = [site.block for site in self._sites[transformer][: min(self._settings.layers)]]
        if any("forward" in vars(module) for block in blocks for module in block.modules()):
            blocks = []  # whoever has wrapped them or their parts, to load weights, relies on their order
        self._guide.perturbed = Pass(transformer, own, current.step, slice(None), {}, current.grid)
        try:
            with _returning(blocks, kept):
                perturbed = transformer.forward(**own)[0]
        finally:
            self._guide.perturbed = None
        exact = torch.promote_types(sample.dtype, torch.float32)
        difference: torch.Tensor = sample[rows].to(exact) - perturbed.to(exact)
        return self._settings.scale * difference


@contextmanager
def _returning(blocks: list[nn.Module], states: Mapping[type, Any]) -> Iterator[None]:
    """Within the context, blocks return what the last one of their class has returned before, and do not run."""
    try:
        for block in blocks:
            vars(block)["forward"] = _constant(states[type(block)])
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _constant(value: Any) -> Any:
    return lambda *args, **kwargs: value


def _rows(value: Any, batch: int, rows: slice) -> Any:
    """Rows of whatever has the batch as its first dimension."""
    if isinstance(value, torch.Tensor):
        return value[rows] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, tuple | list):
        return type(value)(_rows(item, batch, rows) for item in value)
    return value


def _with_first(output: Any, sample: torch.Tensor) -> Any:
    """The same output with another prediction."""
    if isinstance(output, tuple):
        return (sample, *output[1:])
    return type(output)(**{**output, next(iter(output)): sample})


@contextmanager
def cross_attention_guidance(
    pipe: Any,
    scale: float = 1.0,
    *,
    layers: Iterable[int] | None = None,
    start: float = 0.0,
    stop: float = 1.0,
    mode: str = "zero",
) -> Iterator[None]:
    """Guide generation toward frames that look at one another (DiffTrack, arXiv 2506.17220, section 5).

    Prediction: `e + scale * (e_cond - e_cut)`, for both guidance branches, where `e_cut` is made with the attention
    to other frames cut at some layers. It costs the layers from the first of these on once more, for the conditional
    rows. It can be used together with `trace`, whose maps stay those of the model's own passes.

    Args:
        pipe: a video pipeline whose transformer is one of `supported()`.
        scale: of the difference; at 0 the frames are those of the pipeline alone, bit for bit.
        layers: 0-based layers at which attention is cut; None is the checkpoint's preset.
        start: fraction of the steps at which guidance starts.
        stop: fraction at which it ends.
        mode: "zero" or "renorm", see `MODES`.

    Raises:
        ConceptMapsError: the pipeline cannot be guided, or an argument is wrong; nothing has been changed then.

    Example:
        >>> with dcm.cross_attention_guidance(pipe, 1.0, layers=[13, 17, 21]):
        ...     video = pipe("a dog running on the beach").frames[0]
    """
    transformers = find_transformers(pipe)
    backbone = find_backbone(transformers[0])
    sites = {transformer: find_backbone(transformer).matching_sites(transformer) for transformer in transformers}
    given = {"scale": scale, "layers": layers, "start": start, "stop": stop, "mode": mode}
    settings = _check(pipe, backbone, transformers, sites, given)
    if not settings.scale:
        yield
        return
    guidance = _Guidance(settings, _Guide(settings, backbone, sites, pipe), backbone, sites)
    try:
        yield
    finally:
        guidance.remove()


def _check(
    pipe: Any,
    backbone: Backbone,
    transformers: list[Any],
    sites: Mapping[Any, list[Site]],
    settings: Mapping[str, Any],
) -> _Settings:
    """The settings, checked against the pipeline.

    Raises:
        ConceptMapsError: the pipeline cannot be guided, or an argument is wrong.
    """
    if transformers[0] is pipe:
        raise ConceptMapsError(f"guidance follows a pipeline, not a bare {type(pipe).__name__}; pass the pipeline")
    scale, start, stop, mode = (settings[name] for name in ("scale", "start", "stop", "mode"))
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ConceptMapsValueError(f"scale is {scale!r}; expected a number, such as 1.0")
    if not (isinstance(start, int | float) and isinstance(stop, int | float) and 0 <= start < stop <= 1):
        raise ConceptMapsValueError(f"guidance from {start!r} to {stop!r}; expected fractions 0 <= start < stop <= 1")
    if mode not in MODES:
        raise ConceptMapsValueError(f"unknown mode {mode!r}; expected one of {', '.join(MODES)}")
    check_alike(backbone, sites)
    preset = backbone.preset(transformers[0])
    layers = settings["layers"]
    if layers is None:
        layers = preset.guidance if preset is not None else ()
        if not layers:
            raise ConceptMapsValueError(
                "no layers are known to be good for guiding this checkpoint; name some of the middle in layers="
            )
    for transformer, own in sites.items():
        check_free(transformer, own, _Guide.slot)
        check_without(transformer, "editor", "guidance and edits of the attention")
        if any(is_compiled(module) for module in transformer.modules()):
            raise ConceptMapsError("guidance cannot change what torch.compile has compiled; guide it uncompiled")
    return _Settings(float(scale), check_indices("layer", layers, len(sites[transformers[0]])), start, stop, mode)
