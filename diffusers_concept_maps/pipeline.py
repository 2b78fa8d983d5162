"""A pipeline that returns maps beside its frames: the same components, the same call, one more output."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import field, make_dataclass
from functools import cache
from typing import Any, cast

from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from diffusers_concept_maps.backbones import find_backbone, find_transformers
from diffusers_concept_maps.capture import trace
from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.maps import ConceptMaps
from diffusers_concept_maps.processors import install_processors

_OPTIONS = tuple(
    parameter for parameter in inspect.signature(trace).parameters.values() if parameter.name != "pipe_or_transformer"
)


class ConceptMapsPipelineOutput(BaseOutput):
    """Mixed into the output class of the stock pipeline: its fields first, then `concept_maps`.

    Attributes:
        concept_maps: the maps of this call; with `branch="both"` a dict of the two.
    """

    concept_maps: ConceptMaps | dict[str, ConceptMaps]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickled by its stock class, because the class itself is made at run time."""
        return _output, (type(self).__mro__[2], self.to_tuple())


class ConceptMapsMixin:
    """Mixed into a pipeline class, adds the arguments of `trace` to its call and `concept_maps` to its output.

    `with_concept_maps(pipe)` makes such a pipeline out of an existing one. Without `concepts` and `concept_embeds` a
    call is the stock call.

    Example:
        >>> class Pipeline(ConceptMapsMixin, CogVideoXPipeline):
        ...     pass
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the class a `__call__` with a full signature, as tools that inspect pipelines expect."""
        super().__init_subclass__(**kwargs)
        stock = _stock_class(cls)
        if stock is None or ConceptMapsMixin not in cls.__bases__ or "__call__" in cls.__dict__:
            return

        def __call__(self: Any, *args: Any, **options: Any) -> Any:
            return _call(self, stock, args, options)

        own = inspect.signature(stock.__call__)
        known = set(own.parameters)
        extra = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in _OPTIONS if p.name not in known]
        __call__.__signature__ = own.replace(parameters=[*own.parameters.values(), *extra])  # type: ignore[attr-defined]
        __call__.__doc__ = (
            f"As `{stock.__name__}.__call__`, with the arguments of `diffusers_concept_maps.trace`; its output has "
            f"`concept_maps` as last field, and with `return_dict=False` the maps are the last item of the tuple."
        )
        cls.__call__ = __call__  # type: ignore[method-assign]

    def __reduce__(self) -> Any:
        """A class that was made by `with_concept_maps` is pickled by its stock class."""
        stock: Any = _stock_class(type(self))
        if type(self) is _mixed(stock):
            return _rebuild, (stock, self.__dict__)
        return super().__reduce__()

    def set_attn_processor(self, processor: Any) -> None:
        """Set attention processors in the transformer and, where the pipeline has one, in `transformer_2`.

        Args:
            processor: one processor, or a dict as `concept_attn_processors` makes it; the dict is left as it is.
        """
        for transformer in find_transformers(self):
            install_processors(transformer, processor)

    def to_json_string(self) -> str:
        """The pipeline's config under its stock class name, which `DiffusionPipeline.from_pretrained` knows."""
        text: str = super().to_json_string()  # type: ignore[misc]
        stock = _stock_class(type(self))
        assert stock is not None  # a mixin alone is no pipeline
        return text.replace(f'"_class_name": "{type(self).__name__}"', f'"_class_name": "{stock.__name__}"', 1)


def with_concept_maps(pipe: DiffusionPipeline) -> Any:
    """A pipeline of class `ConceptMapsMixin` + `type(pipe)` around the same components.

    Nothing is copied or converted: components, dtypes, offload hooks and progress-bar settings are those of `pipe`,
    which stays as it is and can go on being used.

    Args:
        pipe: a pipeline whose transformer is one of `supported()`.

    Raises:
        ConceptMapsError: its transformer cannot be traced.
    """
    for transformer in find_transformers(pipe):
        find_backbone(transformer)
    if isinstance(pipe, ConceptMapsMixin):
        raise ConceptMapsError(f"this {type(pipe).__name__} returns concept maps already; use it as it is")
    stock: Any = type(pipe)
    cls = _mixed(stock)
    mixed = cls.__new__(cls)
    mixed.__dict__.update(pipe.__dict__)
    return mixed


def _rebuild(stock: Any, state: dict[str, Any]) -> Any:
    pipe = _mixed(stock).__new__(_mixed(stock))
    pipe.__dict__.update(state)
    return pipe


@cache
def _mixed(stock: Any) -> Any:
    """The mixed class; it has the stock name, which `save_pretrained` writes and host code looks at."""
    return type(stock.__name__, (ConceptMapsMixin, stock), {"__module__": __name__, "__doc__": stock.__doc__})


def _stock_class(cls: type) -> type | None:
    """The first pipeline class behind the mixin in the MRO."""
    for base in cls.__mro__:
        if not issubclass(base, ConceptMapsMixin) and issubclass(base, DiffusionPipeline):
            return base
    return None


def _call(pipe: Any, stock: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run the stock call, under a capture if concepts are given."""
    names = {parameter.name for parameter in _OPTIONS}
    capture = {name: options.pop(name) for name in list(options) if name in names}
    named = any(capture.get(name) is not None for name in ("concepts", "concept_embeds"))
    if not named and capture.get("target") != "prompt":
        if capture.keys() - {"concepts", "concept_embeds"}:
            raise ConceptMapsError(f"{', '.join(sorted(capture))} given without concepts; pass concepts=[...] as well")
        return stock.__call__(pipe, *args, **options)
    bound = inspect.signature(stock.__call__).bind(pipe, *args, **options)
    as_output = bound.arguments.get("return_dict", True)
    bound.arguments["return_dict"] = True
    with trace(pipe, **capture) as maps:
        output = stock.__call__(*bound.args, **bound.kwargs)
    result = _output(type(output), (*output.to_tuple(), maps))
    return result if as_output else result.to_tuple()


def _output(stock: type, values: tuple[Any, ...]) -> ConceptMapsPipelineOutput:
    return cast(ConceptMapsPipelineOutput, _output_class(stock)(*values))


@cache
def _output_class(stock: Any) -> type:
    fields = [("concept_maps", object, field(default=None))]
    return make_dataclass("ConceptMapsPipelineOutput", fields, bases=(ConceptMapsPipelineOutput, stock))
