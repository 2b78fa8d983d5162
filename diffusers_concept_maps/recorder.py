"""One capture at work: decides what is recorded, moves the concept stream, scores layers and hands on the maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging
from torch import nn

from diffusers_concept_maps.backbones import Backbone, CrossBackbone, Grid, JoiningBackbone, JointBackbone, Site
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.methods import LayerTaps
from diffusers_concept_maps.one_pass import JoinedConcepts, check_call
from diffusers_concept_maps.parallel import check_parallel, gather_tokens
from diffusers_concept_maps.plan import CapturePlan
from diffusers_concept_maps.progress import Place, RunTracker
from diffusers_concept_maps.prompt import TextRows
from diffusers_concept_maps.results import Results
from diffusers_concept_maps.scoring import LayerPlace, score_layer
from diffusers_concept_maps.stream import ConceptStream, FixedConcepts, Heads

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class _Announced:
    """A forward pass that will be recorded if its first block has a row to record."""

    transformer: nn.Module
    call: Mapping[str, Any]
    place: Place
    grid: Grid
    text_length: int


@dataclass
class _Pass:
    """One forward pass that is recorded.

    Attributes:
        transformer: the model.
        call: what it was called with, by name.
        step: 0-based denoising step.
        rows: rows of the batch that are recorded.
        branches: rows of the guidance branches within those.
        grid: token grid.
        stream: the concept tokens that re-enter the blocks; None where there are none or they do otherwise.
        joined: the concept tokens that join the blocks (`attention="one_pass"`), None likewise.
        fixed: the concepts that no block updates (cross-attention), None likewise.
        words: which text rows the words of the prompt are; None where concept tokens are the targets.
        multiplicity: float `[text row]`, how many equal rows each stands for; None is one each.
        arguments: what the current block was called with, by name.
    """

    transformer: nn.Module
    call: Mapping[str, Any]
    step: int
    rows: slice
    branches: dict[str, slice]
    grid: Grid
    stream: ConceptStream | None = None
    joined: JoinedConcepts | None = None
    fixed: FixedConcepts | None = None
    words: TextRows | None = None
    multiplicity: torch.Tensor | None = None
    arguments: Mapping[str, Any] | None = None

    def place_of(self, layer: int) -> LayerPlace:
        """Where the maps of a layer belong."""
        return LayerPlace(self.step, layer, self.branches)


class Recorder:
    """What hooks and attention processors of a traced transformer talk to.

    Attributes:
        results: the maps so far.
        quirks: see `Parity.quirks`.
    """

    def __init__(
        self, plan: CapturePlan, backbone: Backbone, sites: Mapping[nn.Module, list[Site]], pipe: Any | None
    ) -> None:
        """Assign only.

        Args:
            plan: what to record.
            backbone: of the transformers.
            sites: layers of every transformer.
            pipe: the pipeline; None for a bare transformer.
        """
        self.results = Results(plan)
        self.quirks = plan.parity is not None and plan.parity.quirks
        self._plan = plan
        self._backbone = backbone
        self._sites = sites
        self._layer = {site.attention: layer for own in sites.values() for layer, site in enumerate(own)}
        # Concepts that the blocks update go through all of them up to the deepest that is read.
        self._recorded = plan.layers if isinstance(backbone, CrossBackbone) else range(plan.deepest + 1)
        self._tracker = RunTracker(pipe, backbone)
        self._announced: _Announced | None = None
        self._words: TextRows | None = None
        self._grid: tuple[Any, Grid] | None = None  # of the last recorded pass of this run, and what it was read from
        self._moved: dict[torch.device, torch.Tensor] = {}
        self._warned = False
        self._pass: _Pass | None = None

    def begin(self, transformer: nn.Module, call: Mapping[str, Any]) -> None:
        """A forward pass of a transformer starts; `call` are its arguments by name.

        Raises:
            ConceptMapsError: a step out of range, or something has come in the way since the attach.
        """
        self._pass = self._announced = None  # a pass that was cut short leaves nothing behind
        place = self._tracker.locate(self._backbone.batch(call), call["timestep"])
        if place is None:
            return
        self._check_processors(transformer)
        check_parallel(self._backbone, transformer)
        if self._plan.attention == "one_pass":
            check_call(self._backbone, transformer)
        if place.starts_run:
            self._words = self._grid = None
            self.results.start_run(place.steps)
        if self._plan.includes(place.step, place.steps):
            grid, text_length = self._read_grid(transformer, call, place), self._backbone.text_length(call)
            self._announced = _Announced(transformer, call, place, grid, text_length)

    def end(self, *, finished: bool) -> None:
        """The forward pass is over; `finished` is False if it raised."""
        if self._pass is not None and finished:
            self.results.close_step()
        self._pass = self._announced = None

    def hold(self, site: Site, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """A block is about to run; keep what its re-entry needs, or let the concepts join it.

        Returns:
            Arguments to call the block with instead; None leaves it the ones it has.

        Raises:
            ConceptMapsError: embeddings of another batch size, or a word that is not in the prompt.
        """
        if self._announced is not None:
            self._start(self._announced, arguments)
            self._announced = None
        if self._pass is None or self.answering or self._layer[site.attention] not in self._recorded:
            return None
        if self._pass.joined is None:
            self._pass.arguments = arguments
            return None
        return self._pass.joined.join(arguments) if self._serves(site) else None

    def part(self, block_output: Any) -> Any:
        """A block has run; what it returned, less the concepts if they joined it."""
        if self._pass is None or self._pass.joined is None:
            return block_output
        return self._pass.joined.part(block_output)

    def _start(self, announced: _Announced, arguments: Mapping[str, Any]) -> None:
        """Start to record, by the batch of the first block: a cache may have left the unconditional half out."""
        present = announced.place.branches(self._backbone.batch(arguments))
        if (chosen := self._choose_rows(present)) is None:
            return
        rows, branches = chosen
        current = _Pass(announced.transformer, announced.call, announced.place.step, rows, branches, announced.grid)
        device = self._backbone.image(arguments).device
        if self._plan.prompt is None:
            self._start_concepts(current, present, announced.text_length, device)
        else:
            videos, length = rows.stop - rows.start, announced.text_length
            if self._words is None or not self._words.fits(videos, length):
                text = announced.call.get("encoder_hidden_states")
                self._words = self._plan.prompt.rows(videos, length, device, text)
                self._plan.check_words()
            current.words = self._words
        self.results.expect(current.grid, {name: s.stop - s.start for name, s in branches.items()})
        self._pass = current

    def records(self, attention: nn.Module) -> bool:
        """Whether this attention call, main or nested, is part of the capture."""
        return self._pass is not None and self._layer.get(attention, -1) in self._recorded

    @property
    def answering(self) -> bool:
        """Whether the current attention call is the nested one of the concepts."""
        return self._pass is not None and self._pass.stream is not None and self._pass.stream.answering

    def text_tokens(self, attention: nn.Module) -> int:
        """Number of text tokens in the joint sequence of the current call, for attention that is not handed text."""
        current = self._pass
        assert current is not None  # `records` is True
        assert isinstance(self._backbone, JointBackbone)
        site = self._sites[current.transformer][self._layer[attention]]
        return self._backbone.text_tokens(site.block, self._arguments(current), current.call)

    @property
    def joined(self) -> JoinedConcepts | None:
        """The concepts that the current attention call has to take along, None where it has the stock tokens alone."""
        joined = None if self._pass is None else self._pass.joined
        return joined if joined is not None and joined.riding else None

    def answer(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Concept attention of the nested call; see `ConceptStream.answer`."""
        assert self._pass is not None  # `answering` is True
        assert self._pass.stream is not None
        return self._pass.stream.answer(query, key, value)

    @torch.no_grad()
    def observe(
        self,
        attention: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        *,
        text: slice,
        image: slice,
        concepts: slice | None = None,
    ) -> None:
        """The main attention call of a layer has run: advance the concepts and add the layer to the maps.

        Args:
            attention: the attention module.
            query: `[batch, H, S, D]` of the tokens of this call, after norms and rotary embedding.
            key: likewise.
            value: likewise.
            output: attention output before the output projection, likewise.
            text: where the text tokens are.
            image: where the image tokens are.
            concepts: where the concepts are that joined the call; None if there are none, or they re-enter the block.
        """
        current, layer = self._pass, self._layer[attention]
        assert current is not None  # `records` is True

        def heads(tokens: slice) -> Heads:
            parts = (tensor[current.rows, :, tokens] for tensor in (query, key, value, output))
            return Heads(*(gather_tokens(current.transformer, part) for part in parts))

        whole = heads(image)
        if current.words is not None:
            targets = Heads(*(current.words.select(tensor) for tensor in heads(text)))
        elif concepts is not None:
            targets = heads(concepts)
        else:
            site, arguments = self._sites[current.transformer][layer], self._arguments(current)
            assert current.stream is not None  # concept tokens are the targets
            targets = current.stream.advance(site, arguments, whole.key, whole.value)
        current.arguments = None
        video = Heads(*(current.grid.select(tensor) for tensor in whole))
        taps = LayerTaps(
            *(video.query, video.key, video.value, video.output),
            *(targets.query, targets.key, targets.value, targets.output),
            frames=current.grid.frames,
            multiplicity=current.multiplicity,
        )
        score_layer(self._plan, self.results, current.place_of(layer), taps, current.words)

    @torch.no_grad()
    def observe_crossing(
        self,
        attention: nn.Module,
        query: torch.Tensor,
        output: torch.Tensor,
        text_key: torch.Tensor,
        project: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """The cross-attention of a layer has run: add the layer to the maps.

        Args:
            attention: the attention module.
            query: `[batch, H, N, D]` of the image tokens, after norms.
            output: attention output before the output projection, likewise.
            text_key: keys of the text tokens `[batch, H, T, D]`, those of the prompt at the end.
            project: from text as this attention takes it `[row, text, width]` to its keys `[row, H, text, D]`.
        """
        current, layer = self._pass, self._layer[attention]
        assert current is not None  # `records` is True
        if current.words is not None:
            key = current.words.select(current.words.last(text_key[current.rows]))
        else:
            assert current.fixed is not None  # concepts are the targets
            key = current.fixed.keys(self._sites[current.transformer][layer].block, self._arguments(current), project)
        current.arguments = None
        whole = (gather_tokens(current.transformer, tensor[current.rows]) for tensor in (query, output))
        image_query, image_output = (current.grid.select(tensor) for tensor in whole)
        taps = LayerTaps(
            *(image_query, None, None, image_output),
            *(None, key, None, None),
            frames=current.grid.frames,
        )
        score_layer(self._plan, self.results, current.place_of(layer), taps, current.words)

    def _start_concepts(
        self, current: _Pass, present: Mapping[str, slice], text_length: int, device: torch.device
    ) -> None:
        """Set the concepts off, in the recorded rows or, where they join the blocks, in every row of the batch."""
        joins = self._plan.attention == "one_pass"
        embeds = self._embeds(present if joins else current.branches, device)
        if self._plan.parity is not None and self._plan.parity.padded:
            padding = text_length - embeds.shape[1]
            if padding < 0:
                raise ConceptMapsValueError(
                    f"parity={self._plan.parity.name!r} pads {embeds.shape[1]} concepts to the {text_length} tokens "
                    f"of the prompt; name fewer concepts"
                )
            if padding > 0:  # all padding rows stay equal: one, with their number as weight, stands for all
                embeds = torch.cat([embeds, embeds.new_zeros(embeds.shape[0], 1, embeds.shape[2])], dim=1)
                current.multiplicity = torch.ones(embeds.shape[1], device=embeds.device)
                current.multiplicity[-1] = padding
        weights, reads, backbone = current.multiplicity, self._plan.reads, self._backbone
        model, call, rows = current.transformer, current.call, current.rows
        if isinstance(backbone, CrossBackbone):
            current.fixed = FixedConcepts(backbone, model, embeds, rows, call=call)
        elif joins:
            assert isinstance(backbone, JoiningBackbone)  # `check_one_pass` has looked
            current.joined = JoinedConcepts(backbone, model, embeds, call=call, multiplicity=weights, reads=reads)
        else:
            assert isinstance(backbone, JointBackbone)
            current.stream = ConceptStream(
                backbone, model, embeds, rows, call=call, multiplicity=weights, reads=reads, parity=self._plan.parity
            )

    @staticmethod
    def _arguments(current: _Pass) -> Mapping[str, Any]:
        """What the current block was called with."""
        if current.arguments is None:
            raise ConceptMapsError(
                "an attention module ran outside of its block, so that its layer cannot be traced; call the "
                "transformer itself"
            )
        return current.arguments

    def _read_grid(self, transformer: nn.Module, call: Mapping[str, Any], place: Place) -> Grid:
        """The grid of a forward pass, read once for those of a run that are alike: a device may wait for it."""
        plain = {name: value for name, value in call.items() if isinstance(value, torch.Tensor | int | str)}
        source = (transformer, {name: getattr(value, "shape", value) for name, value in plain.items()})
        if self._grid is None or self._grid[0] != source or place.steps is None:
            self._grid = source, self._backbone.grid(transformer, call)
        return self._grid[1]

    def _choose_rows(self, present: Mapping[str, slice]) -> tuple[slice, dict[str, slice]] | None:
        """Rows of the batch to record, and the wanted branches as slices of those rows."""
        wanted = {name: present[name] for name in self._plan.branches if name in present}
        if not wanted:
            return None
        start, stop = min(s.start for s in wanted.values()), max(s.stop for s in wanted.values())
        return slice(start, stop), {name: slice(s.start - start, s.stop - start) for name, s in wanted.items()}

    def _check_processors(self, transformer: nn.Module) -> None:
        """Say so, once, when processors were replaced since the capture began: their layers cannot be recorded."""
        replaced = {
            layer: type(site.attention.processor).__name__
            for layer, site in enumerate(self._sites[transformer])
            if not self._serves(site)
        }
        if replaced and not self._warned:
            self._warned = True
            logger.warning(
                f"The attention processors of layers {list(replaced)} were replaced during the capture by "
                f"{', '.join(sorted(set(replaced.values())))}, which shows it nothing: it records nothing of them, "
                f"and concept tokens go past their blocks, which changes the maps of deeper layers. "
                f"Fuse projections, set processors or enable xformers before the `with` block."
            )

    def _serves(self, site: Site) -> bool:
        """Whether the processor of a layer is still the one that talks to this capture."""
        told = getattr(site.attention.processor, "recorder", None)
        return told is self or getattr(told, "recorder", None) is self

    def _embeds(self, branches: Mapping[str, slice], device: torch.device) -> torch.Tensor:
        """Concept embeddings of every row of these branches; those of one video get the same."""
        if device not in self._moved:  # once, because a copy from the host makes the device wait
            assert self._plan.embeds is not None  # concept tokens are the targets
            self._moved[device] = self._plan.embeds.to(device)
        embeds = self._moved[device]
        count = sum(rows.stop - rows.start for rows in branches.values())
        if embeds.ndim == 2:
            return embeds.expand(count, -1, -1)
        videos = count // len(branches)
        if embeds.shape[0] != videos:
            raise ConceptMapsValueError(
                f"concept_embeds has batch size {embeds.shape[0]}, but {videos} videos are generated; expected "
                f"[{videos}, concept, {embeds.shape[2]}] or [concept, {embeds.shape[2]}]"
            )
        return torch.cat([embeds] * len(branches))
