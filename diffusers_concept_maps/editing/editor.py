"""Edits of the attention at work: which tokens, in which passes, and what is put in place of the model's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from diffusers_concept_maps.backbones import Backbone, CrossBackbone, Grid, Site
from diffusers_concept_maps.editing.amending import AmendedAttention, share_bias
from diffusers_concept_maps.editing.edits import AttentionEdit, Region, find_region
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.listener import Announced, Pass, PassListener
from diffusers_concept_maps.progress import Place
from diffusers_concept_maps.prompt import PromptTokens, TextRows


@dataclass
class _Editing(Pass):
    """One forward pass that is edited."""

    words: TextRows | None = None
    region: Region | None = None


class Editor(PassListener[_Editing]):
    """Follows the model's own passes, and changes what image tokens read of some words."""

    slot: ClassVar[str] = "editor"

    def __init__(
        self,
        edits: Sequence[AttentionEdit],
        prompt: PromptTokens,
        backbone: Backbone,
        sites: Mapping[nn.Module, list[Site]],
        pipe: Any | None,
        *,
        layers: frozenset[int],
        steps: frozenset[int] | None,
        geometry: Mapping[str, int],
    ) -> None:
        """Assign only.

        Args:
            edits: what to do, in this order.
            prompt: where the words are.
            backbone: of the transformers.
            sites: layers of every transformer.
            pipe: the pipeline; None for a bare transformer.
            layers: which are edited.
            steps: which are; None is all.
            geometry: how frames of the video become those of the grid, see `Backbone.geometry`.
        """
        super().__init__(backbone, sites, pipe, layers=layers, branches=("cond",))
        self._edits = edits
        self._prompt = prompt
        self._steps = steps
        self._geometry = geometry
        self._words: TextRows | None = None
        self._regions: dict[tuple[Grid, torch.device], Region] = {}

    def includes(self, place: Place) -> bool:
        """See `PassListener.includes`.

        Raises:
            ConceptMapsValueError: a step was asked for that the run does not have.
        """
        if self._steps is None:
            return True
        if place.steps is not None and max(self._steps, default=0) >= place.steps:
            raise ConceptMapsValueError(
                f"step {max(self._steps)} is out of range; this run has {place.steps} steps, 0 to {place.steps - 1}"
            )
        return place.step in self._steps

    def start_run(self, place: Place) -> None:
        """See `PassListener.start_run`."""
        self._words = None

    def check(self, transformer: Any) -> None:
        """See `PassListener.check`.

        Raises:
            ConceptMapsError: a cache or context parallelism is on.
        """
        if getattr(transformer, "is_cache_enabled", False):
            raise ConceptMapsError(
                "a cache would keep edited states for steps that are not edited; call disable_cache() on the "
                "transformer to edit its attention"
            )
        if getattr(transformer, "_parallel_config", None) is not None:
            raise ConceptMapsError("edits do not work with context parallelism; disable it on the transformer")

    def open(
        self, announced: Announced, current: Pass, present: Mapping[str, slice], device: torch.device
    ) -> _Editing:
        """See `PassListener.open`."""
        videos, length = current.rows.stop - current.rows.start, announced.text_length
        if self._words is None or not self._words.fits(videos, length):
            text = announced.call.get("encoder_hidden_states")
            self._words = self._prompt.rows(videos, length, device, text)
        spot = current.grid, device
        if spot not in self._regions:
            self._regions = {spot: find_region(self._edits, current.grid, device, self._geometry)}
        own = current.transformer, current.call, current.step, current.rows, current.branches, current.grid
        return _Editing(*own, words=self._words, region=self._regions[spot])

    def observe(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is looked at."""

    def observe_crossing(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is looked at."""

    def amend(
        self,
        heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        output: torch.Tensor,
        *,
        text: slice,
        image: slice,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `PassListener.amend`; only tokens that an edit reaches are computed anew."""
        current = self._pass
        assert current is not None  # `records` is True
        assert current.region is not None
        region, rows = current.region, current.rows
        query, key, value = (tensor[rows] for tensor in heads)
        stop = key.shape[2]
        if not isinstance(self._backbone, CrossBackbone):  # concepts that have joined the call come last
            stop = max(part.indices(stop)[1] for part in (text, image))
        key, value = key[:, :, :stop], value[:, :, :stop]
        places = region.places + (image.start or 0)
        own = _rows_of(mask, rows, output.shape[0], places)
        attention = AmendedAttention(query.index_select(2, places), key, value, own)
        members = self._members(current, key, text)
        for edit, weight, share in zip(self._edits, region.weights, region.shares, strict=True):
            tokens = members[:, [self._prompt.names.index(name) for name in edit.names]].any(1)
            attention.add(self._bias(edit, attention, tokens, weight, share, current.grid), tokens)
        amended = output.clone()
        amended[rows, :, places[region.inside]] = attention.attend(region.inside).to(output.dtype)
        return amended

    def _members(self, current: _Editing, key: torch.Tensor, text: slice) -> torch.Tensor:
        """Which keys are tokens of which word, bool `[R, word, S]`."""
        words = current.words
        assert words is not None  # `open` has found them
        assert words.indices is not None  # of all rows, those of the words
        crossing = isinstance(self._backbone, CrossBackbone)
        start = key.shape[2] - words.last(key).shape[2] if crossing else text.indices(key.shape[2])[0]
        members = torch.zeros(*words.weights.shape[:2], key.shape[2], dtype=torch.bool, device=key.device)
        return members.index_copy(2, words.indices + start, words.weights > 0)

    def _bias(
        self,
        edit: AttentionEdit,
        attention: AmendedAttention,
        tokens: torch.Tensor,
        weight: torch.Tensor,
        share: torch.Tensor | None,
        grid: Grid,
    ) -> torch.Tensor:
        """What an edit adds to the logits of its words, broadcastable to `[R, H, Q]`."""
        if edit.scale is not None:
            return (1 + weight * (edit.scale - 1)).log()
        log_odds = attention.log_odds(tokens)
        present = log_odds.sigmoid()
        if share is None:
            assert edit.transform is not None  # the only other edit
            share = _transformed(edit.transform, present, grid)
        share, weight = share.to(present), weight.to(present)
        wanted = torch.where(weight == 1, share, torch.lerp(present, share, weight))
        return share_bias(present, wanted, log_odds)


def _transformed(transform: Callable[[torch.Tensor], torch.Tensor], present: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The shares `[R, H, Q]` of all tokens of the grid, each video's changed by a function of `[H, F, h, w]`."""
    shape = (present.shape[1], grid.frames, grid.height, grid.width)
    made = []
    for video in present:
        changed = transform(video.reshape(shape).clone())
        if not isinstance(changed, torch.Tensor) or changed.shape != shape:
            got = list(changed.shape) if isinstance(changed, torch.Tensor) else type(changed).__name__
            raise ConceptMapsValueError(
                f"transform has returned {got}; expected a tensor of the shape it was given, {list(shape)} (head, "
                f"frame, height, width)"
            )
        if bool(changed.isnan().any()) and not bool(video.isnan().any()):
            raise ConceptMapsValueError(
                "transform has returned shares that are not a number; expected numbers in 0..1"
            )
        made.append(changed.to(present).clamp(0, 1).flatten(1))
    return torch.stack(made)


def _rows_of(mask: torch.Tensor | None, rows: slice, batch: int, places: torch.Tensor) -> torch.Tensor | None:
    """The mask of some rows of the batch and some queries; one may stand for all of either."""
    if mask is None:
        return None
    own = mask[rows] if mask.ndim == 4 and mask.shape[0] == batch else mask
    return own if own.shape[-2] == 1 else own.index_select(-2, places)
