"""Hooks and processors that are put into a transformer and taken out again, exactly; nothing else touches a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from diffusers_concept_maps.backbones import Backbone, Site, uncompiled
from diffusers_concept_maps.compiled import FollowedCall, HeldForward, Relay, held_forward, is_compiled, new_order
from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.listener import PassListener
from diffusers_concept_maps.processors import ConceptAttnProcessor, ConceptProcessor, carry_over, concept_processor


class DeepestLayerReached(Exception):
    """Raised through a forward pass whose remaining layers nobody needs."""


class Attachment:
    """A listener that is attached to transformers until `remove` is called.

    Attributes:
        ends_first: a pass is over for it before it is for what was attached earlier, such as guidance, which runs
            the blocks once more then.
    """

    ends_first: ClassVar[bool] = True

    def __init__(
        self,
        listener: PassListener[Any],
        backbone: Backbone,
        sites: Mapping[Any, list[Site]],
        *,
        deepest: int,
        joins: bool = False,
        stops: bool = False,
    ) -> None:
        """Attach to every transformer; whatever fails on the way, everything done so far is undone.

        Args:
            listener: to whom calls are told.
            backbone: of the transformers.
            sites: layers of every transformer.
            deepest: the deepest layer that is listened to.
            joins: something joins the blocks.
            stops: passes that are listened to end behind the deepest layer, with `DeepestLayerReached`; those of
                compiled modules go on.
        """
        self._listener = listener
        self._backbone = backbone
        self._hooks: list[RemovableHandle] = []
        self._swapped: list[tuple[Any, Any, ConceptProcessor]] = []
        self._adopted: list[ConceptProcessor] = []
        self._call: dict[str, Any] = {}
        self._patched: list[tuple[Any, str, Any, Any]] = []
        try:
            for transformer, own in sites.items():
                self._follow(transformer)
                if any(is_compiled(module) for module in transformer.modules()):
                    self._attach_compiled(own, deepest)
                else:
                    self._attach(own, joins=joins)
                    if stops:
                        self._hooks.append(own[deepest].block.register_forward_hook(self._stop))
        except BaseException:
            self.remove(failed=True)
            raise

    def _follow(self, transformer: Any) -> None:
        """Notice when a transformer, compiled or not, is called and when it is done."""
        if transformer._compiled_call_impl is None:
            self._hooks.append(transformer.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._hooks.append(transformer.register_forward_hook(self._end, always_call=True, prepend=self.ends_first))
        else:
            call = FollowedCall(transformer, self._begin, transformer._compiled_call_impl, self._end)
            self._patch(transformer, "_compiled_call_impl", call)

    def _attach(self, sites: list[Site], *, joins: bool) -> None:
        for attention in (attention for site in sites for attention in (site.attention, *site.others)):
            self._install(attention, self._listener)
        for site in sites:
            self._hooks.append(site.block.register_forward_pre_hook(partial(self._hold, site), with_kwargs=True))
            if joins:  # before the hooks of the user, which then see the outputs that they saw
                self._hooks.append(site.block.register_forward_hook(self._part, prepend=True))

    def _attach_compiled(self, sites: list[Site], deepest: int) -> None:
        """Calls are replaced, because hooks would be compiled along with the module that they are of."""
        order = new_order()
        for layer, site in enumerate(sites):
            relay = Relay(
                self._listener, self._backbone, site, call=self._call, order=order, recorded=layer <= deepest
            )
            for attention in (site.attention, *site.others):
                self._install(attention, relay)
            self._patch(site.block, "forward", held_forward(relay, site.block.forward))

    def _patch(self, module: Any, name: str, wrapper: Callable[..., Any]) -> None:
        self._patched.append((module, name, wrapper, module.__dict__.get(name)))
        module.__dict__[name] = wrapper

    def _install(self, attention: Any, listener: PassListener[Any] | Relay) -> None:
        installed: Any = attention.processor
        if isinstance(installed, ConceptProcessor):
            processor = installed
            self._adopted.append(processor)
        else:
            made = concept_processor(installed)
            assert made is not None  # `check_free` has looked
            processor = made
            self._swapped.append((attention, installed, processor))
            attention.processor = processor
        setattr(processor, self._listener.slot, listener)

    def remove(self, *, failed: bool = False) -> None:
        """Put the very processors back that were there, and take every hook out; a second call does nothing.

        Args:
            failed: the run was cut short.
        """
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
            # It may live on, where the user or `fuse_qkv_projections` has kept it.
            setattr(processor, self._listener.slot, None)
        for processor in self._adopted:
            processor.__dict__.pop(self._listener.slot, None)
        self._hooks, self._patched, self._swapped, self._adopted = [], [], [], []

    def _stop(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._listener.listening:
            self._listener.end(finished=True)
            raise DeepestLayerReached

    def _begin(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _expect_eager()
        whole = uncompiled(transformer)
        self._call.clear()
        self._call.update(by_name(whole, args, kwargs))
        self._listener.begin(whole, dict(self._call))

    def _end(self, transformer: Any, args: tuple[Any, ...], output: Any) -> None:
        self._call.clear()
        self._listener.end(finished=output is not None)

    def _hold(
        self, site: Site, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        _expect_eager()
        joined = self._listener.hold(site, by_name(block, args, kwargs))
        return None if joined is None else ((), joined)

    def _part(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._listener.part(output)


def check_alike(backbone: Backbone, sites: Mapping[Any, list[Site]]) -> None:
    """Raise unless the transformers of a pipeline have the same layers and heads, of which the maps are made."""
    first, *others = sites
    for other in others:
        if (len(sites[other]), backbone.heads(other)) != (len(sites[first]), backbone.heads(first)):
            raise ConceptMapsError(
                f"transformer_2 has {len(sites[other])} layers of {backbone.heads(other)} heads, transformer has "
                f"{len(sites[first])} of {backbone.heads(first)}; expected two that are alike. Trace one of them"
            )


def check_free(transformer: Any, sites: list[Site], slot: str = "recorder") -> None:
    """Raise unless every attention module can be listened to and none is already.

    Args:
        transformer: the model.
        sites: its layers.
        slot: of the listener, see `PassListener.slot`.

    Raises:
        ConceptMapsError: something else is attached, or a processor cannot be replaced.
    """
    for layer, site in enumerate(sites):
        for attention in (site.attention, *site.others):
            _check_processor(transformer, layer, attention.processor, slot)


def _check_processor(transformer: Any, layer: int, installed: Any, slot: str) -> None:
    if isinstance(installed, ConceptProcessor):
        if getattr(installed, slot) is not None:
            what = {"recorder": "traced", "guide": "guided", "editor": "edited"}[slot]
            raise ConceptMapsError(
                f"this {type(transformer).__name__} is being {what} already; leave the other `with` block first"
            )
        if installed.stock is None and not isinstance(installed, ConceptAttnProcessor):
            raise ConceptMapsError(f"layer {layer} holds {type(installed).__name__}, which shows no attention")
    elif concept_processor(installed) is None:
        raise ConceptMapsError(
            f"layer {layer} has the attention processor {type(installed).__name__}, which cannot be traced; put "
            f"the model's own processor or one of concept_attn_processors() back first"
        )


def check_without(transformer: Any, slot: str, what: str) -> None:
    """Raise if something is attached that another attachment does not go with.

    Args:
        transformer: the model.
        slot: of the former, see `PassListener.slot`.
        what: the two, for the error.
    """
    processors = (getattr(module, "processor", None) for module in transformer.modules())
    if any(getattr(processor, slot, None) is not None for processor in processors):
        raise ConceptMapsError(f"{what} do not go together; leave the other `with` block first")


def _expect_eager() -> None:
    if torch.compiler.is_compiling():
        raise ConceptMapsError("the transformer was compiled during the capture; compile it before the `with` block")


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a module's forward by name."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | dict(kwargs)
