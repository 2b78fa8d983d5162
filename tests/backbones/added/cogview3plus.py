"""CogView3-Plus.

Joint attention over text and image with shared weights, text first and without positions, as in CogVideoX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import nn

from diffusers_concept_maps.backbones._base import Grid, JointBackbone, Site
from diffusers_concept_maps.tokens import word_tokens


class CogView3PlusBackbone(JointBackbone):
    """An image model whose attention processors are those of CogVideoX."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("CogView3PlusTransformer2DModel",)

    def sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.sites`."""
        return [Site(block, block.attn1) for block in transformer.transformer_blocks]

    def heads(self, transformer: Any) -> int:
        """See `Backbone.heads`."""
        return int(transformer.config.num_attention_heads)

    def text_width(self, transformer: Any) -> int:
        """See `Backbone.text_width`."""
        return int(transformer.config.text_embed_dim)

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`."""
        with torch.no_grad(), torch.random.fork_rng(enabled=pipe.text_encoder.training):
            states, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=length or 224)
        return states, [word_tokens(pipe.tokenizer, text, states.shape[1]) for text in texts]

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`; latents are `[batch, channel, height, width]`."""
        _, _, height, width = call["hidden_states"].shape
        patch = int(transformer.config.patch_size)
        return Grid(1, height // patch, width // patch)

    def enter(
        self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor, call: Mapping[str, Any], rows: slice
    ) -> torch.Tensor:
        """See `JointBackbone.enter`."""
        return cast(torch.Tensor, transformer.patch_embed.text_proj(embeds.to(like)))

    def reentry(
        self, block: nn.Module, arguments: Mapping[str, Any], concepts: torch.Tensor, rows: slice
    ) -> dict[str, Any]:
        """See `JointBackbone.reentry`."""
        return {
            "hidden_states": concepts.new_empty(concepts.shape[0], 0, concepts.shape[2]),
            "encoder_hidden_states": concepts,
            "emb": arguments["emb"][rows],
        }

    def leave(self, block: nn.Module, block_output: Any) -> torch.Tensor:
        """See `JointBackbone.leave`; a block returns image, then text."""
        return cast(torch.Tensor, block_output[1])


BACKBONE = CogView3PlusBackbone()
