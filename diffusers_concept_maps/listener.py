"""What listens to the forward passes of a transformer: which of them, which rows, on which grid."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from diffusers.utils import logging
from torch import nn

from diffusers_concept_maps.backbones import Backbone, Grid, JointBackbone, Site
from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.parallel import check_parallel
from diffusers_concept_maps.progress import Place, RunTracker

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Announced:
    """A forward pass that will be listened to if its first block has a row that is wanted.

    Attributes:
        transformer: the model.
        call: what it was called with, by name.
        place: where it is in the run.
        grid: token grid.
        text_length: number of text tokens.
    """

    transformer: nn.Module
    call: Mapping[str, Any]
    place: Place
    grid: Grid
    text_length: int


@dataclass
class Pass:
    """One forward pass that is listened to.

    Attributes:
        transformer: the model.
        call: what it was called with, by name.
        step: 0-based denoising step.
        rows: rows of the batch that are wanted.
        branches: rows of the guidance branches within those.
        grid: token grid.
        arguments: what the current block was called with, by name.
    """

    transformer: nn.Module
    call: Mapping[str, Any]
    step: int
    rows: slice
    branches: dict[str, slice]
    grid: Grid
    arguments: Mapping[str, Any] | None = None

    def block_arguments(self) -> Mapping[str, Any]:
        """What the current block was called with.

        Raises:
            ConceptMapsError: none is running.
        """
        if self.arguments is None:
            raise ConceptMapsError(
                "an attention module ran outside of its block, so that its layer cannot be traced; call the "
                "transformer itself"
            )
        return self.arguments


PassKind = TypeVar("PassKind", bound=Pass)


class PassListener(Generic[PassKind]):
    """What hooks and attention processors of a transformer talk to while something is attached to it.

    Attributes:
        quirks: see `Parity.quirks`.
        slot: attribute of attention processors that holds the listener.
        joined: concepts that the current attention call has to take along, None where it has the stock tokens alone.
        restricts: attention between image tokens stays within their frames in the current call.
    """

    slot: ClassVar[str] = "recorder"
    quirks: bool = False
    joined: Any = None
    restricts: bool = False

    def __init__(
        self,
        backbone: Backbone,
        sites: Mapping[nn.Module, list[Site]],
        pipe: Any | None,
        *,
        layers: Container[int],
        branches: tuple[str, ...],
    ) -> None:
        """Assign only.

        Args:
            backbone: of the transformers.
            sites: layers of every transformer.
            pipe: the pipeline; None for a bare transformer.
            layers: which are listened to.
            branches: guidance branches that are wanted.
        """
        self._backbone = backbone
        self._sites = sites
        self._layer = {site.attention: layer for own in sites.values() for layer, site in enumerate(own)}
        self._layers = layers
        self._branches = branches
        self._tracker = RunTracker(pipe, backbone)
        self._announced: Announced | None = None
        self._grid: tuple[Any, Grid] | None = None  # of the last pass of this run, and what it was read from
        self._warned = False
        self._pass: PassKind | None = None

    @property
    def answering(self) -> bool:
        """Whether the current attention call is a nested one."""
        return False

    def includes(self, place: Place) -> bool:
        """Whether a forward pass is wanted."""
        raise NotImplementedError

    def start_run(self, place: Place) -> None:
        """The pipeline has started anew."""

    def check(self, transformer: nn.Module) -> None:
        """Raise where something has come in the way since the attach."""
        check_parallel(self._backbone, transformer)

    def open(
        self, announced: Announced, current: Pass, present: Mapping[str, slice], device: torch.device
    ) -> PassKind:
        """A forward pass that is wanted has reached its first block.

        Args:
            announced: what is known of it.
            current: the same with the rows that are wanted.
            present: rows of the batch per guidance branch.
            device: of its image stream.
        """
        raise NotImplementedError

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
        self.check(transformer)
        if place.starts_run:
            self._grid = None
            self.start_run(place)
        if self.includes(place):
            grid, text_length = self._read_grid(transformer, call, place), self._backbone.text_length(call)
            self._announced = Announced(transformer, call, place, grid, text_length)

    def end(self, *, finished: bool) -> None:
        """The forward pass is over; `finished` is False if it raised."""
        self._pass = self._announced = None

    def hold(self, site: Site, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """A block is about to run; keep what is needed of its arguments.

        Returns:
            Arguments to call the block with instead; None leaves it the ones it has.
        """
        if self._announced is not None:
            self._start(self._announced, arguments)
            self._announced = None
        if self._pass is None or self.answering or self._layer[site.attention] not in self._layers:
            return None
        return self.enter_block(self._pass, site, arguments)

    def enter_block(self, current: PassKind, site: Site, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
        """A block that is listened to is about to run; see `hold`."""
        current.arguments = arguments
        return None

    def part(self, block_output: Any) -> Any:
        """A block has run; what it returned, less what had joined it."""
        return block_output

    def _start(self, announced: Announced, arguments: Mapping[str, Any]) -> None:
        """Start to listen, by the batch of the first block: a cache may have left the unconditional half out."""
        present = announced.place.branches(self._backbone.batch(arguments))
        wanted = {name: present[name] for name in self._branches if name in present}
        if not wanted:
            return
        start, stop = min(s.start for s in wanted.values()), max(s.stop for s in wanted.values())
        branches = {name: slice(s.start - start, s.stop - start) for name, s in wanted.items()}
        current = Pass(
            announced.transformer, announced.call, announced.place.step, slice(start, stop), branches, announced.grid
        )
        self._pass = self.open(announced, current, present, self._backbone.image(arguments).device)

    def records(self, attention: nn.Module) -> bool:
        """Whether this attention call, main or nested, is listened to."""
        return self._pass is not None and self._layer.get(attention, -1) in self._layers

    @property
    def listening(self) -> bool:
        """Whether a forward pass is listened to now."""
        return self._pass is not None

    def text_tokens(self, attention: nn.Module) -> int:
        """Number of text tokens in the joint sequence of the current call, for attention that is not handed text."""
        current = self._pass
        assert current is not None  # `records` is True
        assert isinstance(self._backbone, JointBackbone)
        site = self._sites[current.transformer][self._layer[attention]]
        return self._backbone.text_tokens(site.block, current.block_arguments(), current.call)

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
        """The attention call of a layer, joint or among image tokens alone, has run.

        Args:
            attention: the attention module.
            query: `[batch, H, S, D]` of the tokens of this call, after norms and rotary embedding.
            key: likewise.
            value: likewise.
            output: attention output before the output projection, likewise.
            text: where the text tokens are; empty where there are none.
            image: where the image tokens are.
            concepts: where the concepts are that joined the call; None if there are none, or they re-enter the block.
            mask: as for `restrict`.
        """
        raise NotImplementedError

    def observe_crossing(
        self,
        attention: nn.Module,
        query: torch.Tensor,
        output: torch.Tensor,
        text_key: torch.Tensor,
        project: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """The cross-attention of a layer has run.

        Args:
            attention: the attention module.
            query: `[batch, H, N, D]` of the image tokens, after norms.
            output: attention output before the output projection, likewise.
            text_key: keys of the text tokens `[batch, H, T, D]`, those of the prompt at the end.
            project: from text as this attention takes it `[row, text, width]` to its keys `[row, H, text, D]`.
        """
        raise NotImplementedError

    def answer(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of a nested call of concepts, in place of the stock one; all `[row, H, concept, D]`."""
        raise NotImplementedError

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
        """Attention in place of the stock one while `restricts`.

        Args:
            query: `[batch, H, S, D]` of the tokens of this call, after norms and rotary embedding.
            key: likewise.
            value: likewise.
            text: where the text tokens are; empty where there are none.
            image: where the image tokens are.
            mask: what the stock attention is given, broadcastable to `[batch, H, S, S]`: bool, True where a query
                (row) sees a key, or a number to add to the logit. It hides padding of the text and, in some families,
                image tokens from one another. None hides nothing.
            linear: the attention is linear: its weights are the products of query and key, without scale and softmax.

        Returns:
            `[batch, H, S, D]`.
        """
        raise NotImplementedError

    def amend(
        self,
        heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        output: torch.Tensor,
        *,
        text: slice,
        image: slice,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The attention output of image tokens that read text, as it is to be.

        Args:
            heads: query `[batch, H, S, D]` of the tokens of this call, after norms and rotary embedding, and likewise
                key and value; where text is only read, key and value are those of the text tokens alone.
            output: of the stock attention, before the output projection, in the shape of the query.
            text: where the text tokens are among the keys.
            image: where the image tokens are among the queries.
            mask: as for `restrict`.

        Returns:
            In the shape of `output`, which is not written to.
        """
        raise NotImplementedError

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
        """Whether the processor of a layer is still the one that talks to this listener."""
        told = getattr(site.attention.processor, self.slot, None)
        return told is self or getattr(told, "recorder", None) is self  # the latter is a `Relay`

    def _read_grid(self, transformer: nn.Module, call: Mapping[str, Any], place: Place) -> Grid:
        """The grid of a forward pass, read once for those of a run that are alike: a device may wait for it."""
        plain = {name: value for name, value in call.items() if isinstance(value, torch.Tensor | int | str)}
        source = (transformer, {name: getattr(value, "shape", value) for name, value in plain.items()})
        if self._grid is None or self._grid[0] != source or place.steps is None:
            self._grid = source, self._backbone.grid(transformer, call)
        return self._grid[1]
