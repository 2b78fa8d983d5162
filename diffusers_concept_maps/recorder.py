"""One capture at work: decides what is recorded, moves the concept stream, scores layers and hands on the maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusers_concept_maps.backbones import Backbone, CrossBackbone, JoiningBackbone, JointBackbone, Site
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.listener import Announced, Pass, PassListener
from diffusers_concept_maps.methods import LayerTaps
from diffusers_concept_maps.one_pass import JoinedConcepts, check_call
from diffusers_concept_maps.parallel import gather_tokens
from diffusers_concept_maps.plan import CapturePlan
from diffusers_concept_maps.progress import Place
from diffusers_concept_maps.prompt import TextRows
from diffusers_concept_maps.results import Results
from diffusers_concept_maps.scoring import LayerPlace, score_layer
from diffusers_concept_maps.stream import ConceptStream, FixedConcepts, Heads


@dataclass
class _Recording(Pass):
    """One forward pass that is recorded.

    Attributes:
        stream: the concept tokens that re-enter the blocks; None where there are none or they do otherwise.
        joined: the concept tokens that join the blocks (`attention="one_pass"`), None likewise.
        fixed: the concepts that no block updates (cross-attention), None likewise.
        words: which text rows the words of the prompt are; None where concept tokens are the targets.
        multiplicity: float `[text row]`, how many equal rows each stands for; None is one each.
    """

    stream: ConceptStream | None = None
    joined: JoinedConcepts | None = None
    fixed: FixedConcepts | None = None
    words: TextRows | None = None
    multiplicity: torch.Tensor | None = None

    def place_of(self, layer: int) -> LayerPlace:
        """Where the maps of a layer belong."""
        return LayerPlace(self.step, layer, self.branches)


class Recorder(PassListener[_Recording]):
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
        # Concepts that the blocks update go through all of them up to the deepest that is read.
        layers = plan.layers if isinstance(backbone, CrossBackbone) else range(plan.deepest + 1)
        super().__init__(backbone, sites, pipe, layers=layers, branches=plan.branches)
        self.results = Results(plan)
        self.quirks = plan.parity is not None and plan.parity.quirks
        self._plan = plan
        self._words: TextRows | None = None
        self._moved: dict[torch.device, torch.Tensor] = {}

    def includes(self, place: Place) -> bool:
        """See `PassListener.includes`."""
        return self._plan.includes(place.step, place.steps)

    def start_run(self, place: Place) -> None:
        """See `PassListener.start_run`."""
        self._words = None
        self.results.start_run(place.steps)

    def check(self, transformer: nn.Module) -> None:
        """See `PassListener.check`."""
        super().check(transformer)
        if self._plan.attention == "one_pass":
            check_call(self._backbone, transformer)

    def end(self, *, finished: bool) -> None:
        """See `PassListener.end`."""
        if self._pass is not None and finished:
            self.results.close_step()
        super().end(finished=finished)

    def enter_block(self, current: _Recording, site: Site, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """See `PassListener.enter_block`; the concepts may join the block.

        Raises:
            ConceptMapsError: embeddings of another batch size, or a word that is not in the prompt.
        """
        if current.joined is None:
            return super().enter_block(current, site, arguments)
        return current.joined.join(arguments) if self._serves(site) else None

    def part(self, block_output: Any) -> Any:
        """A block has run; what it returned, less the concepts if they joined it."""
        if self._pass is None or self._pass.joined is None:
            return block_output
        return self._pass.joined.part(block_output)

    def open(
        self, announced: Announced, current: Pass, present: Mapping[str, slice], device: torch.device
    ) -> _Recording:
        """See `PassListener.open`."""
        rows, branches = current.rows, current.branches
        recording = _Recording(current.transformer, current.call, current.step, rows, branches, current.grid)
        if self._plan.prompt is None:
            self._start_concepts(recording, present, announced.text_length, device)
        else:
            videos, length = rows.stop - rows.start, announced.text_length
            if self._words is None or not self._words.fits(videos, length):
                text = announced.call.get("encoder_hidden_states")
                self._words = self._plan.prompt.rows(videos, length, device, text)
                self._plan.check_words()
            recording.words = self._words
        self.results.expect(recording.grid, {name: s.stop - s.start for name, s in branches.items()})
        return recording

    @property
    def answering(self) -> bool:
        """Whether the current attention call is the nested one of the concepts."""
        return self._pass is not None and self._pass.stream is not None and self._pass.stream.answering

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
        mask: torch.Tensor | None = None,
    ) -> None:
        """See `PassListener.observe`: advance the concepts and add the layer to the maps."""
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
            site, arguments = self._sites[current.transformer][layer], current.block_arguments()
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
        """See `PassListener.observe_crossing`: add the layer to the maps."""
        current, layer = self._pass, self._layer[attention]
        assert current is not None  # `records` is True
        if current.words is not None:
            key = current.words.select(current.words.last(text_key[current.rows]))
        else:
            assert current.fixed is not None  # concepts are the targets
            key = current.fixed.keys(self._sites[current.transformer][layer].block, current.block_arguments(), project)
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
        self, current: _Recording, present: Mapping[str, slice], text_length: int, device: torch.device
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
