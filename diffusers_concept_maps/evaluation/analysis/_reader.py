"""Queries and keys of the tokens that attend to one another, layer by layer, for single passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from diffusers_concept_maps.attachment import Attachment, check_alike, check_free
from diffusers_concept_maps.backbones import Backbone, Site, find_backbone, find_transformers
from diffusers_concept_maps.compiled import is_compiled
from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.evaluation.analysis._transition import Transition
from diffusers_concept_maps.listener import Announced, Pass, PassListener
from diffusers_concept_maps.progress import Place

_CLOSE = 0.05  # relative; half precision and other kernels stay far below, another kind of attention far above


class TransitionReader(PassListener[Pass]):
    """Hands the attention of every layer to a consumer, and keeps nothing."""

    def __init__(
        self,
        backbone: Backbone,
        sites: Mapping[nn.Module, list[Site]],
        tokens: str,
        consume: Callable[[int, Transition], None],
    ) -> None:
        """Assign only.

        Args:
            backbone: of the transformers.
            sites: layers of every transformer.
            tokens: "image" leaves the text out, "joint" has it in front.
            consume: is handed the layer and its attention, in float32, of the first row.
        """
        depth = len(next(iter(sites.values())))
        super().__init__(backbone, sites, None, layers=range(depth), branches=("cond",))
        self._tokens = tokens
        self._consume = consume

    def includes(self, place: Place) -> bool:
        """See `PassListener.includes`."""
        return True

    def open(self, announced: Announced, current: Pass, present: Mapping[str, slice], device: torch.device) -> Pass:
        """See `PassListener.open`."""
        return current

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
        """See `PassListener.observe`.

        Raises:
            ConceptMapsError: the attention of the layer is not a softmax of query and key; or there is no text.
        """
        current = self._pass
        assert current is not None  # `records` is True
        layer, row = self._layer[attention], current.rows.start
        q, k, v, done = (tensor[row].float() for tensor in (query, key, value, output))
        seen = None if mask is None else mask.expand(len(query), -1, -1, -1)[row]  # [H or 1, S or 1, S]
        seen = seen.float() if seen is not None and seen.is_floating_point() else seen
        check_softmax(q, k, v, done, seen, layer)
        if self._tokens == "joint":
            if not key[row, :, text].shape[1]:
                raise ConceptMapsError(
                    "image tokens of this model attend to themselves alone, and there is no matrix with the text; "
                    "use tokens='image'"
                )
            self._consume(layer, Transition(q, k, seen))
            return
        part = None if seen is None else seen.expand(-1, q.shape[1], -1)[:, image, image]
        self._consume(layer, Transition(q[:, image], k[:, image], part))


def check_softmax(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    mask: torch.Tensor | None,
    layer: int,
) -> None:
    """Check that the attention of a layer is a softmax of query and key, all float32 `[H, S, D]`.

    Raises:
        ConceptMapsError: its output is another one.
    """
    again = Transition(query, key, mask).apply(value)
    error = float((again - output).norm() / output.norm().clamp(min=1e-12))
    if not error <= _CLOSE:
        raise ConceptMapsError(
            f"layer {layer} does not attend by a softmax of query and key (relative difference {error:.2g}), so it "
            f"has no transition matrix; linear attention is such a case"
        )


def attach_reader(pipe: Any, tokens: str, consume: Callable[[int, Transition], None]) -> Attachment:
    """Attach a reader to a pipeline of single passes, which end behind the last layer.

    Args:
        pipe: that of a `SinglePass`.
        tokens: "image" or "joint".
        consume: is handed the layer and its attention.

    Raises:
        ConceptMapsError: the transformer cannot be listened to; nothing has changed then.
    """
    transformers = find_transformers(pipe)
    backbone = find_backbone(transformers[0])
    sites = {transformer: find_backbone(transformer).matching_sites(transformer) for transformer in transformers}
    for transformer, own in sites.items():
        check_free(transformer, own)
        if any(is_compiled(module) for module in transformer.modules()):
            raise ConceptMapsError("attention cannot be read out of what is compiled; use the pipeline uncompiled")
    check_alike(backbone, sites)
    reader = TransitionReader(backbone, sites, tokens, consume)
    return Attachment(reader, backbone, sites, deepest=len(sites[transformers[0]]) - 1, stops=True)
