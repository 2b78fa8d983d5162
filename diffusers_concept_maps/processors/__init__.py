"""Drop-in attention processors, one file per attention topology; every module beside this one is loaded."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models.attention import AttentionModuleMixin
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

    At its first call for a module it finds that module's stock class and from then on delegates to a drop-in for it:
    most families have attention modules of a class of their own, that names it; of CogVideoX, HunyuanVideo and SD3 the
    structure of the module and what it is called with tell. Whatever else is in doubt is an error at the first call.
    """

    _attention_backend: Any = None  # what the host tells its processors
    _parallel_config: Any = None

    def __init__(self) -> None:
        """Nothing is known yet about the modules it will serve."""
        importlib.import_module("diffusers_concept_maps.backbones")  # most drop-ins are there
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
        arguments = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "image_rotary_emb": image_rotary_emb,
            "temb": temb,
        }
        given = {name: value for name, value in arguments.items() if value is not None}
        delegate: Any = self.delegate(attn, given)
        carry_over(self, delegate)
        delegate.recorder, delegate.guide, delegate.editor = self.recorder, self.guide, self.editor
        try:
            if isinstance(attn, AttentionModuleMixin):  # called by position, in the order of its own processor
                count = max((place for place, name in enumerate(arguments, 1) if name in given), default=0)
                return delegate(attn, hidden_states, *list(arguments.values())[:count])
            return delegate(attn, hidden_states, **given)
        finally:
            delegate.recorder = delegate.guide = delegate.editor = None

    def project_key(self, attn: nn.Module, text: torch.Tensor) -> torch.Tensor:
        """See `ConceptProcessor.project_key`."""
        return self._delegates[attn].project_key(attn, text)

    def delegate(self, attn: nn.Module, given: Mapping[str, Any]) -> ConceptProcessor:
        """The processor that does the work for a module.

        Args:
            attn: the module.
            given: what it is called with beside its hidden states, by name.

        Raises:
            ConceptMapsError: the module's stock processor is not known.
        """
        known = self._delegates.get(attn)
        if known is None or known.fused not in (None, getattr(attn, "fused_projections", False)):
            known = self._delegates[attn] = _drop_in(attn, given)
        if type(known) is passive(AttnProcessor2_0) and "image_rotary_emb" in given:
            raise _unknown(attn)  # which that class would drop
        return known


def _drop_in(attn: nn.Module, given: Mapping[str, Any]) -> ConceptProcessor:
    for cls in CONCEPT_PROCESSORS:
        if cls.serves(attn, given):
            return cls()
    if isinstance(attn, AttentionModuleMixin) and attn._default_processor_cls is not None:
        return passive(attn._default_processor_cls)()
    if isinstance(attn, Attention) and "encoder_hidden_states" not in given:
        weight = getattr(attn.norm_q, "weight", None)
        alone = weight is not None and weight.shape[-1] == attn.inner_dim // attn.heads
        if attn.norm_q is None or alone:  # what norms all heads together has a processor of its own
            return passive(AttnProcessor2_0)()
    raise _unknown(attn)


def _unknown(attn: nn.Module) -> ConceptMapsError:
    return ConceptMapsError(
        f"the stock processor of this {type(attn).__name__} is not known to ConceptAttnProcessor; use "
        f"set_attn_processor(concept_attn_processors(transformer)) instead"
    )
