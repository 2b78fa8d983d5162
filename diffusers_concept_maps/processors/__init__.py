"""Drop-in attention processors, one file per attention topology; every module beside this one is loaded."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.processors._base import (
    CONCEPT_PROCESSORS,
    ConceptProcessor,
    carry_over,
    from_stock,
    passive,
)

__all__ = ["ConceptAttnProcessor", "ConceptProcessor", "carry_over", "concept_attn_processors", "concept_processor"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def concept_processor(stock: Any) -> ConceptProcessor | None:
    """The processor of this package that stands in for a stock one, None if there is none that shows its attention."""
    for cls in CONCEPT_PROCESSORS:
        if cls.stock is type(stock):
            return from_stock(cls, stock)
    return None


def concept_attn_processors(transformer: Any) -> dict[str, ConceptProcessor]:
    """Processors to hand to `transformer.set_attn_processor`, one object for every attention module.

    Each is a subclass of the module's own stock processor and carries what that carries (attention backend, parallel
    configuration). While nothing is captured they are bit-equal to the stock ones, so that production code may leave
    them in; `trace` adopts them.

    Args:
        transformer: a diffusers model that can be traced.

    Returns:
        A full dict, as `set_attn_processor` takes it (which empties it: make a new one for every call). For a model
        without that method the names are the same, `"<module>.processor"`; `ConceptMapsMixin.set_attn_processor` takes
        the dict for any model.

    Raises:
        ConceptMapsError: the transformer cannot be traced, or holds processors of this package already.
    """
    from diffusers_concept_maps.backbones import find_backbone

    find_backbone(transformer)
    processors = {}
    for name, stock in installed_processors(transformer).items():
        stock_class: Any = type(stock)
        if isinstance(stock, ConceptProcessor):
            raise ConceptMapsError(
                f"{name} is a {type(stock).__name__} already; put the model's own processors back before making others"
            )
        processors[name] = concept_processor(stock) or from_stock(passive(stock_class), stock)
    return processors


def installed_processors(transformer: Any) -> dict[str, Any]:
    """The attention processors of a model by name, also of one that does not list them itself."""
    if hasattr(transformer, "attn_processors"):
        return dict(transformer.attn_processors)
    modules = transformer.named_modules()
    return {f"{name}.processor": module.processor for name, module in modules if hasattr(module, "processor")}


def install_processors(transformer: Any, processor: Any) -> None:
    """Set one processor or a full dict of them, also in a model without `set_attn_processor`.

    Raises:
        ConceptMapsError: the dict does not have the names of the model's processors.
    """
    if hasattr(transformer, "set_attn_processor"):
        transformer.set_attn_processor(dict(processor) if isinstance(processor, Mapping) else processor)
        return
    names = installed_processors(transformer)
    given = processor if isinstance(processor, Mapping) else dict.fromkeys(names, processor)
    if given.keys() != names.keys():
        raise ConceptMapsError(
            f"{type(transformer).__name__} has {len(names)} attention modules, and {len(given)} processors were given "
            f"or others than its own; pass all that concept_attn_processors() makes"
        )
    for name in names:
        transformer.get_submodule(name.removesuffix(".processor")).processor = given[name]


class ConceptAttnProcessor(ConceptProcessor):
    """One processor for all modules: `transformer.set_attn_processor(ConceptAttnProcessor())`.

    At its first call for a module it finds that module's stock class and from then on delegates to a drop-in for it.
    """

    def __init__(self) -> None:
        """Nothing is known yet about the modules it will serve."""
        self._delegates: WeakKeyDictionary[nn.Module, ConceptProcessor] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[ConceptAttnProcessor], tuple[()]]:
        """Copied and pickled idle: the copy of a model has modules of its own, which the new router gets to know."""
        return type(self), ()

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        temb: torch.Tensor | None = None,
    ) -> Any:
        """As the stock processor of `attn`; arguments that were not given are not passed on."""
        delegate: Any = self.delegate(attn, encoder_hidden_states is not None)
        if image_rotary_emb is not None and encoder_hidden_states is None:
            raise _unknown(attn)  # the plain processor that stands in for text-free attention would drop the positions
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "image_rotary_emb": image_rotary_emb,
            "temb": temb,
        }
        delegate.recorder = self.recorder
        try:
            return delegate(attn, hidden_states, **{name: value for name, value in given.items() if value is not None})
        finally:
            delegate.recorder = None

    def delegate(self, attn: nn.Module, has_text: bool) -> ConceptProcessor:
        """The processor that does the work for a module.

        Raises:
            ConceptMapsError: the module's stock processor is not known.
        """
        known = self._delegates.get(attn)
        if known is not None and (known.stock is None or known.serves(attn, has_text)):
            return known
        for cls in CONCEPT_PROCESSORS:
            if cls.serves(attn, has_text):
                self._delegates[attn] = cls()
                return self._delegates[attn]
        if isinstance(attn, Attention) and not has_text:
            self._delegates[attn] = passive(AttnProcessor2_0)()
            return self._delegates[attn]
        raise _unknown(attn)


def _unknown(attn: nn.Module) -> ConceptMapsError:
    return ConceptMapsError(
        f"the stock processor of this {type(attn).__name__} is not known to ConceptAttnProcessor; use "
        f"set_attn_processor(concept_attn_processors(transformer)) instead"
    )
