"""CogVideoX: joint attention over text and video with shared weights, text first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch

from diffusers_concept_maps.backbones._base import Backbone, Grid, Preset, Site
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.heads import HeadSelection

_IMAP_SCRIPTS = (
    "motion layers and top-5 heads of the scripts published with IMAP (arXiv 2603.02919); all steps, as there"
)


class CogVideoXBackbone(Backbone):
    """CogVideoX text-to-video with rotary (5B) or sin-cos (2B) positions; text is the first part of the sequence."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("CogVideoXTransformer3DModel",)
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            name="CogVideoX-2b",
            source=_IMAP_SCRIPTS,
            config={"num_layers": 30, "num_attention_heads": 30, "use_rotary_positional_embeddings": False},
            layers={"imap": (4, 6, 7, *range(10, 24))},
            heads={"imap": HeadSelection(top_k=5)},
        ),
        Preset(
            name="CogVideoX-5b",
            source=_IMAP_SCRIPTS,
            config={"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True},
            layers={"imap": (*range(1, 6), *range(7, 22), 23)},
            heads={"imap": HeadSelection(top_k=5)},
        ),
    )

    def check(self, transformer: Any) -> None:
        """See `Backbone.check`: image-to-video (learned positions) and CogVideoX 1.5 (patches in time) are refused."""
        config = transformer.config
        if config.use_learned_positional_embeddings or config.patch_size_t is not None:
            raise ConceptMapsError(
                f"this {type(transformer).__name__} has use_learned_positional_embeddings="
                f"{config.use_learned_positional_embeddings} and patch_size_t={config.patch_size_t}; only CogVideoX "
                f"text-to-video checkpoints with neither (2B, 5B) can be traced"
            )

    def sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.sites`."""
        return [Site(block, block.attn1) for block in transformer.transformer_blocks]

    def heads(self, transformer: Any) -> int:
        """See `Backbone.heads`."""
        return int(transformer.config.num_attention_heads)

    def text_width(self, transformer: Any) -> int:
        """See `Backbone.text_width`."""
        return int(transformer.config.text_embed_dim)

    def encode(self, pipe: Any, texts: list[str]) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`.

        T5 runs without a mask in this pipeline, so that padding shapes every state: concepts are padded to the
        length the transformer was trained with, as prompts are.
        """
        if getattr(pipe, "tokenizer", None) is None or getattr(pipe, "text_encoder", None) is None:
            raise ConceptMapsError(
                f"this {type(pipe).__name__} has no tokenizer or text encoder to encode the concepts with; "
                f"pass concept_embeds instead"
            )
        length = int(pipe.transformer.config.max_text_seq_length)
        counts = [self._word_tokens(pipe.tokenizer, text, length) for text in texts]
        with torch.no_grad():
            states, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=length)
        return states, counts

    @staticmethod
    def _word_tokens(tokenizer: Any, text: str, length: int) -> int:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        if len(tokens) > length - 1:
            raise ConceptMapsValueError(
                f"concept {text!r} has {len(tokens)} tokens; expected at most {length - 1}. Shorten it."
            )
        if all(token == tokenizer.unk_token_id for token in tokens):
            raise ConceptMapsValueError(
                f"concept {text!r} has no word that the tokenizer knows; use words the model was trained with"
            )
        return len(tokens)

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`; latents are `[batch, frame, channel, height, width]`."""
        _, frames, _, height, width = call["hidden_states"].shape
        patch = int(transformer.config.patch_size)
        return Grid(frames, height // patch, width // patch)

    def batch(self, call: Mapping[str, Any]) -> int:
        """See `Backbone.batch`."""
        return int(call["hidden_states"].shape[0])

    def enter(self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """See `Backbone.enter`; the text rows of the position table are zero, so nothing positional is added."""
        return cast(torch.Tensor, transformer.patch_embed.text_proj(embeds.to(like)))

    def reentry(self, arguments: Mapping[str, Any], concepts: torch.Tensor, rows: slice) -> dict[str, Any]:
        """See `Backbone.reentry`; text has no rotary embedding."""
        return {
            "hidden_states": concepts.new_empty(concepts.shape[0], 0, concepts.shape[2]),
            "encoder_hidden_states": concepts,
            "temb": arguments["temb"][rows],
        }

    def leave(self, block_output: Any) -> torch.Tensor:
        """See `Backbone.leave`; a block returns video, then text."""
        return cast(torch.Tensor, block_output[1])


BACKBONE = CogVideoXBackbone()
