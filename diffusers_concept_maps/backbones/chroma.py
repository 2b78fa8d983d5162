"""Chroma, a FLUX.1 without CLIP: text is T5's alone, and modulation comes from the timestep.

Attention is that of FLUX.1, with its processor. Blocks of one stream are handed text and image as one tensor. The
padding of the prompt is masked but for its first token; concepts see no mask. True guidance is in two passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from diffusers_concept_maps.backbones._base import Preset
from diffusers_concept_maps.backbones.flux import FluxBackbone, first_position
from diffusers_concept_maps.parity import Parity
from diffusers_concept_maps.tokens import check_encoders, token_spans, undisturbed, word_tokens


class ChromaBackbone(FluxBackbone):
    """All pipelines around `ChromaTransformer2DModel`."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("ChromaTransformer2DModel",)
    presets: ClassVar[tuple[Preset, ...]] = ()
    parities: ClassVar[Mapping[str, Parity]] = {}
    prompt_arguments: ClassVar[tuple[str, ...]] = ("prompt",)
    context_parallel: ClassVar[bool] = False

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`; T5 is given a mask in these pipelines, so that padding shapes no state."""
        check_encoders(pipe, "tokenizer", "text_encoder")
        length = length or 512
        counts = [word_tokens(pipe.tokenizer, text, length) for text in texts]
        with undisturbed(pipe.text_encoder):
            states, *_ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=length)
        return states, counts

    def token_spans(self, pipe: Any, prompt: str, length: int) -> list[tuple[int, int]]:
        """See `Backbone.token_spans`."""
        return token_spans(pipe.tokenizer, prompt, length)

    def unpooled(self, transformer: Any, arguments: Mapping[str, Any], call: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `JointBackbone.unpooled`; there is no pooled vector."""
        return arguments

    def reentry(
        self, block: nn.Module, arguments: Mapping[str, Any], concepts: torch.Tensor, rows: slice
    ) -> dict[str, Any]:
        """See `JointBackbone.reentry`; concepts have the position of the first text token."""
        batch = arguments["hidden_states"].shape[0]
        streams = {"hidden_states": concepts}
        if "encoder_hidden_states" in arguments:
            nothing = concepts.new_empty(concepts.shape[0], 0, concepts.shape[2])
            streams = {"hidden_states": nothing, "encoder_hidden_states": concepts}
        return {
            **streams,
            "temb": arguments["temb"].expand(batch, -1, -1)[rows],
            "image_rotary_emb": first_position(arguments["image_rotary_emb"]),
        }


BACKBONE = ChromaBackbone()
