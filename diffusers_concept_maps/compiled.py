"""A capture of modules that `torch.compile` has compiled: graphs hold ops that call the capture back.

Bookkeeping is Python and does not belong into a graph. A compiled block or attention module runs its own operations
in the graph and hands its tensors to an op, which PyTorch does not look into; behind the op, at run time, everything
is as without compilation: the recorder is told, and concepts re-enter blocks eagerly. What stands between calls (hooks
of the model, the tracker of runs) stays outside of the graph. A graph guards nothing that differs from one capture to
the next, so that a second capture compiles nothing anew: the numbers that tell captures and layers apart are tensors.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from diffusers_concept_maps.backbones import Backbone, JointBackbone, Site, uncompiled
from diffusers_concept_maps.dispatch import NAMESPACE

if TYPE_CHECKING:
    from diffusers_concept_maps.listener import PassListener

_relays: WeakValueDictionary[int, Relay] = WeakValueDictionary()
_forwards: WeakKeyDictionary[nn.Module, HeldForward] = WeakKeyDictionary()


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module run in a compiled graph."""
    return uncompiled(module) is not module or module._compiled_call_impl is not None


class Relay:
    """What the block and the processor of one layer talk to in place of the recorder; the same methods, for a graph.

    Attributes:
        recorder: the recorder.
    """

    def __init__(
        self,
        recorder: PassListener[Any],
        backbone: Backbone,
        site: Site,
        *,
        call: Mapping[str, Any],
        order: torch.Tensor,
        recorded: bool,
    ) -> None:
        """Make the layer known to the ops.

        Args:
            recorder: of the capture.
            backbone: of the transformer.
            site: the layer.
            call: what the transformer is called with, by name; changes from call to call.
            order: one tensor for all layers of a capture. The ops declare that they change it, so that none of them
                is left out of a graph or changes places with another one. It is on the CPU, and so keeps a graph with
                ops from being replayed as CUDA graph, which would run kernels alone.
            recorded: the capture needs this layer.
        """
        self.recorder = recorder
        self.site = site
        self._backbone = backbone
        self._call = call
        self._order = order
        self._recorded = recorded
        self._arguments: Mapping[str, Any] = {}
        self._number = _number(id(self))
        _relays[id(self)] = self

    def records(self, attention: nn.Module) -> bool:
        """See `PassListener.records`; a graph hands over whatever the run may record, and the op decides."""
        return self._recorded if torch.compiler.is_compiling() else self.recorder.records(attention)

    @property
    def answering(self) -> bool:
        """See `PassListener.answering`; blocks are re-entered outside of graphs."""
        return not torch.compiler.is_compiling() and self.recorder.answering

    @property
    def quirks(self) -> bool:
        """See `PassListener.quirks`."""
        return self.recorder.quirks

    @property
    def restricts(self) -> bool:
        """See `PassListener.restricts`; guidance refuses compiled modules."""
        return False

    @property
    def joined(self) -> None:
        """See `PassListener.joined`; `attention="one_pass"` refuses compiled modules."""
        return None

    def answer(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See `PassListener.answer`."""
        return self.recorder.answer(query, key, value)

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
        """See `PassListener.restrict`."""
        return self.recorder.restrict(query, key, value, text=text, image=image, mask=mask, linear=linear)

    def text_tokens(self, attention: nn.Module) -> int:
        """See `PassListener.text_tokens`."""
        if torch.compiler.is_compiling():
            assert isinstance(self._backbone, JointBackbone)
            return self._backbone.text_tokens(self.site.block, self._arguments, self._call)
        return self.recorder.text_tokens(attention)

    def hold(self, arguments: dict[str, Any]) -> None:
        """See `PassListener.hold`."""
        self._arguments = arguments
        if torch.compiler.is_compiling():
            if self._recorded:
                tensors: list[torch.Tensor] = []
                described = _describe(arguments, tensors)
                _hold(self._order, self._number, tensors, described)
        else:
            self.recorder.hold(self.site, arguments)

    def drop(self) -> None:
        """The block has run: keep nothing of it."""
        self._arguments = {}

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
        """See `PassListener.observe`."""
        if torch.compiler.is_compiling():
            heads = [tensor.detach() for tensor in (query, key, value, output)]
            _observe(self._order, self._number, heads, [*_bounds(text, query), *_bounds(image, query)])
        else:
            self.recorder.observe(attention, query, key, value, output, text=text, image=image)

    def observe_crossing(
        self,
        attention: nn.Module,
        query: torch.Tensor,
        output: torch.Tensor,
        text_key: torch.Tensor,
        project: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """See `PassListener.observe_crossing`."""
        if torch.compiler.is_compiling():
            heads = [tensor.detach() for tensor in (query, output, text_key)]
            _observe_crossing(self._order, self._number, heads)
        else:
            self.recorder.observe_crossing(attention, query, output, text_key, project)


class HeldForward:
    """Stands in for the forward of a block: its arguments are kept, then it runs as it would have."""

    def __init__(self) -> None:
        """Not in use."""
        self._relay: Relay | None = None
        self._forward: Any = None

    def hold(self, relay: Relay, forward: Callable[..., Any]) -> None:
        """Use it for a capture.

        Args:
            relay: of the block's layer.
            forward: what ran before.
        """
        self._relay, self._forward = relay, forward

    def release(self, *, passes_on: bool) -> None:
        """The capture is over.

        Args:
            passes_on: it is still called, because somebody has wrapped it.
        """
        self._relay = None
        if not passes_on:
            self._forward = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        relay = self._relay
        if relay is None:
            return self._forward(*args, **kwargs)
        relay.hold(dict(zip(relay.site.parameters, args, strict=False)) | kwargs)
        output = self._forward(*args, **kwargs)
        relay.drop()
        return output


def held_forward(relay: Relay, forward: Callable[..., Any]) -> HeldForward:
    """What stands in for the forward of a block, the same object in every capture: graphs are bound to it."""
    held = _forwards.setdefault(relay.site.block, HeldForward())
    held.hold(relay, forward)
    return held


class FollowedCall:
    """Stands in for the compiled call of a transformer: hooks of the capture run outside of its graph."""

    def __init__(
        self, transformer: Any, begin: Callable[..., None], call: Callable[..., Any], end: Callable[..., None]
    ) -> None:
        """Assign only.

        Args:
            transformer: the module.
            begin: as a forward pre-hook with keyword arguments.
            call: what ran before.
            end: as a forward hook that is always called.
        """
        self._transformer = transformer
        self._begin = begin
        self._call = call
        self._end = end

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the transformer."""
        self._begin(self._transformer, args, kwargs)
        output = None
        try:
            output = self._call(*args, **kwargs)
            return output
        finally:
            self._end(self._transformer, args, output)


def new_order() -> torch.Tensor:
    """The tensor that keeps the ops of a capture in order; see `Relay`."""
    return _number(0)


def _number(value: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value)


def _bounds(tokens: slice, heads: torch.Tensor) -> tuple[int, int]:
    """First token of a slice and the one behind its last; `slice.indices` would bind the graph to one length."""
    start = 0 if tokens.start is None else tokens.start
    return start, heads.shape[2] if tokens.stop is None else tokens.stop


def _describe(value: Any, tensors: list[torch.Tensor]) -> str:
    """A Python literal with the structure of a block's arguments; tensors are numbers of the list they are added to.

    Whatever is neither a tensor nor a container nor a plain constant is left out: no block is re-entered with it.
    """
    if isinstance(value, torch.Tensor):
        tensors.append(value.detach())
        return f"{len(tensors) - 1}"
    if isinstance(value, dict):
        return "{" + ", ".join([f"'{name}': {_describe(item, tensors)}" for name, item in value.items()]) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join([_describe(item, tensors) for item in value]) + "]"
    return f"('{value}',)" if isinstance(value, str) else f"({value},)"


def _restore(described: Any, tensors: list[torch.Tensor]) -> Any:
    """The inverse of `_describe`; lists are tuples then."""
    if isinstance(described, int):
        return tensors[described]
    if isinstance(described, dict):
        return {name: _restore(item, tensors) for name, item in described.items()}
    if isinstance(described, list):
        return tuple(_restore(item, tensors) for item in described)
    return described[0]


def _nothing(*_: Any) -> None:
    """What the ops compute for a graph."""


@torch.library.custom_op(f"{NAMESPACE}::hold", mutates_args=("order",))
def _hold(order: torch.Tensor, number: torch.Tensor, tensors: list[torch.Tensor], described: str) -> None:
    relay = _relays[int(number)]
    relay.recorder.hold(relay.site, _restore(ast.literal_eval(described), tensors))


@torch.library.custom_op(f"{NAMESPACE}::observe", mutates_args=("order",))
def _observe(order: torch.Tensor, number: torch.Tensor, heads: list[torch.Tensor], tokens: list[int]) -> None:
    recorder, attention = _relays[int(number)].recorder, _relays[int(number)].site.attention
    if recorder.records(attention):
        query, key, value, output = heads
        recorder.observe(attention, query, key, value, output, text=slice(*tokens[:2]), image=slice(*tokens[2:]))


@torch.library.custom_op(f"{NAMESPACE}::observe_crossing", mutates_args=("order",))
def _observe_crossing(order: torch.Tensor, number: torch.Tensor, heads: list[torch.Tensor]) -> None:
    recorder, attention = _relays[int(number)].recorder, _relays[int(number)].site.attention
    if recorder.records(attention):
        query, output, text_key = heads
        project = partial(attention.processor.project_key, attention)
        recorder.observe_crossing(attention, query, output, text_key, project)


for _op in (_hold, _observe, _observe_crossing):
    _op.register_fake(_nothing)
