"""What every attention processor of this package shares."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, cast

from diffusers_concept_maps.errors import ConceptMapsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from diffusers_concept_maps.compiled import Relay
    from diffusers_concept_maps.listener import PassListener

CONCEPT_PROCESSORS: list[type[ConceptProcessor]] = []


class ConceptProcessor:
    """Mixed into a stock processor class; idle, and then nothing but the stock class, while `recorder` is None.

    Attributes:
        recorder: the capture that reads this processor, set for its duration.
        guide: the guidance that this processor serves, set for its duration.
        editor: what edits the attention to words of the prompt, set for its duration.
        stock: the class it is a drop-in for; None in the router and in processors that have nothing to show.
        fused: it is for modules whose projections are fused, or for others; None is for both.
    """

    recorder: PassListener[Any] | Relay | None = None
    guide: PassListener[Any] | None = None
    editor: PassListener[Any] | None = None
    stock: ClassVar[type | None] = None
    fused: ClassVar[bool | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__dict__.get("stock") is not None:
            CONCEPT_PROCESSORS.append(cls)

    @classmethod
    def serves(cls, attention: nn.Module, given: Mapping[str, Any]) -> bool:
        """Whether `stock` is the stock processor of a module, as far as its class, or structure and arguments, tell.

        Args:
            attention: the module.
            given: what it is called with beside its hidden states, by the names of the router's arguments.
        """
        return getattr(type(attention), "_default_processor_cls", None) is cls.stock

    def listener(self, attention: Any) -> PassListener[Any] | Relay | None:
        """Who is to be told of an attention call: the capture, the guidance while a pass of its own runs, or edits."""
        for listener in (self.recorder, self.guide, self.editor):
            if listener is not None and listener.records(attention):
                return listener
        return None

    def amend(
        self,
        attention: Any,
        heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        output: torch.Tensor,
        *,
        text: slice,
        image: slice,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output of an attention call over text, with what is edited of it; see `PassListener.amend`."""
        if self.editor is None or not self.editor.records(attention):
            return output
        return self.editor.amend(heads, output, text=text, image=image, mask=mask)

    def project_key(self, attn: Any, text: torch.Tensor) -> torch.Tensor:
        """Keys `[row, H, text, D]` of text as a cross-attention takes it `[row, text, width]`; in graphs needed alone.

        Raises:
            ConceptMapsError: the processor does not say.
        """
        raise ConceptMapsError(
            f"{type(self).__name__} has no `project_key`, so that a compiled model cannot be traced; trace it "
            f"without torch.compile"
        )


@cache
def passive(stock: Any) -> type[ConceptProcessor]:
    """A subclass of a stock processor that only stands in for it, for attention that carries no text."""
    members = {"__reduce__": _reduce_passive}
    return cast("type[ConceptProcessor]", type(f"Concept{stock.__name__}", (ConceptProcessor, stock), members))


def _reduce_passive(processor: Any) -> tuple[Any, ...]:
    """A class that is made at run time is pickled by its stock class."""
    return _new_passive, (type(processor).__mro__[2],), processor.__dict__


def _new_passive(stock: Any) -> ConceptProcessor:
    cls = passive(stock)
    return cls.__new__(cls)


def from_stock(cls: type[ConceptProcessor], stock: Any) -> ConceptProcessor:
    """A processor of that class with everything the stock object carries, such as its attention backend."""
    processor = cls.__new__(cls)
    processor.__dict__.update(stock.__dict__)
    return processor


def carry_over(processor: Any, stock: Any) -> None:
    """What `set_attention_backend` and `enable_parallelism` have told the processor, the stock one has to know too."""
    for name in ("_attention_backend", "_parallel_config"):
        if hasattr(stock, name) and getattr(processor, name, None) is not getattr(stock, name):
            setattr(stock, name, getattr(processor, name, None))
