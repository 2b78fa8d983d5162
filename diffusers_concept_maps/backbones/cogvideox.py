"""CogVideoX 1.0 and 1.5, its image-to-video and control variants, and ConsisID, which adds faces between its blocks.

Joint attention over text and video with shared weights, text first. Images, control videos and faces join the video
stream, by its channels or between blocks; the offset of image-to-video (`ofs`) is part of the time embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from typing import Any, ClassVar, cast

import torch
from torch import nn

from diffusers_concept_maps.backbones._base import Grid, JoiningBackbone, Preset, Site
from diffusers_concept_maps.backbones._real import ClipShape, put_channels
from diffusers_concept_maps.heads import HeadSelection
from diffusers_concept_maps.tokens import check_encoders, undisturbed, word_tokens

_IMAP_SCRIPTS = (
    "motion layers and top-5 heads of the scripts published with IMAP (arXiv 2603.02919); all steps, as there; layers "
    "of matching and guidance of those published with DiffTrack (arXiv 2506.17220)"
)


class CogVideoXBackbone(JoiningBackbone):
    """All transformers with CogVideoX blocks.

    Positions are rotary (5B and 1.5) or sin-cos (2B). 5B image-to-video and ConsisID have a learned table beside the
    rotary ones, in which text has positions too. The presets of published checkpoints are for text-to-video alone,
    which video-to-video shares: the others have the same depth but other weights, and nothing is published for them.
    """

    transformer_classes: ClassVar[tuple[str, ...]] = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
    editable: ClassVar[bool] = True
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            name="CogVideoX-2b",
            source=_IMAP_SCRIPTS,
            config={
                "num_layers": 30,
                "num_attention_heads": 30,
                "in_channels": 16,
                "patch_size_t": None,
                "use_rotary_positional_embeddings": False,
            },
            layers={"imap": (4, 6, 7, *range(10, 24))},
            heads={"imap": HeadSelection(top_k=5)},
            matching=(17, 0.02),
            guidance=(13, 17, 21),
        ),
        Preset(
            name="CogVideoX-5b",
            source=_IMAP_SCRIPTS,
            config={
                "num_layers": 42,
                "num_attention_heads": 48,
                "in_channels": 16,
                "patch_size_t": None,
                "use_rotary_positional_embeddings": True,
                "use_learned_positional_embeddings": False,
            },
            layers={"imap": (*range(1, 6), *range(7, 22), 23)},
            heads={"imap": HeadSelection(top_k=5)},
            matching=(17, 0.02),
            guidance=(15, 17, 18),
        ),
        Preset(
            name="the embedded model",
            source=(
                "contrast accuracy of its heads on clips of the development seed (docs/shapes_model.md); layer of "
                "matching by points followed through such clips (docs/tracking.md), and of guidance by how many clips "
                "move as asked with noise of that seed (docs/guidance.md)"
            ),
            config={"num_layers": 5, "num_attention_heads": 4, "in_channels": 3, "text_embed_dim": 64},
            layers=dict.fromkeys(("concept_attention", "cross_attention", "gramcol", "imap"), (2, 3, 4)),
            heads={"imap": HeadSelection(top_k=2)},
            matching=(3, 0.2),
            guidance=(1,),
        ),
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

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`.

        T5 runs without a mask in this pipeline, so that padding shapes every state: concepts are padded to the
        length the transformer was trained with, as prompts are.
        """
        check_encoders(pipe, "tokenizer", "text_encoder")
        limit = int(pipe.transformer.config.max_text_seq_length) if length is None else None
        length = length or int(pipe.transformer.config.max_text_seq_length)
        counts = [min(word_tokens(pipe.tokenizer, text, limit), length - 1) for text in texts]
        with undisturbed(pipe.text_encoder):
            states, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=length)
        return states, counts

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`; latents are `[batch, frame, channel, height, width]`.

        CogVideoX 1.5 puts two latent frames into a token frame. The pipeline pads an odd number of them in front, so
        that the first token frame is the padding and the first latent frame; none is padding alone.
        """
        _, frames, _, height, width = call["hidden_states"].shape
        patch = int(transformer.config.patch_size)
        return Grid(frames // _latents_per_token(transformer), height // patch, width // patch)

    def geometry(self, transformer: Any) -> dict[str, int]:
        """See `Backbone.geometry`."""
        return {
            "frames_per_latent": int(transformer.config.temporal_compression_ratio),
            "latents_per_token": _latents_per_token(transformer),
        }

    def clip_shape(self, pipe: Any) -> ClipShape:
        """See `RealInput.clip_shape`; whatever the model, its pipelines want multiples of 8."""
        config, factor = pipe.transformer.config, int(pipe.vae_scale_factor_spatial)
        step, area = int(pipe.vae_scale_factor_temporal), config.sample_height * config.sample_width * factor**2
        # Whatever the model was trained with, `sample_frames` is the number of frames; the pipelines take it so, too.
        return ClipShape(lcm(8, factor * int(config.patch_size)), area, int(config.sample_frames), step)

    def real_arguments(self, pipe: Any, frames: int) -> dict[str, Any]:
        """See `RealInput.real_arguments`; the sin-cos positions of a model are for one text length."""
        length = int(pipe.transformer.config.max_text_seq_length)
        return super().real_arguments(pipe, frames) | {"max_sequence_length": length}

    def insert(self, pipe: Any, call: Mapping[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        """See `RealInput.insert`; 1.5 has an odd number of latent frames padded in front."""
        hidden = call["hidden_states"]
        frames = latents.transpose(1, 2)
        padding = hidden.shape[1] - frames.shape[1]
        if 0 < padding < _latents_per_token(pipe.transformer):
            frames = torch.cat([frames[:, :1]] * padding + [frames], dim=1)
        return {"hidden_states": put_channels(hidden, frames, dim=2)}

    def enter(
        self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor, call: Mapping[str, Any], rows: slice
    ) -> torch.Tensor:
        """See `JointBackbone.enter`.

        Text has no position where positions are rotary or sin-cos (the table's text rows are zero). In a learned
        table it may have: every concept then gets that of the first text token, so that their order is of no matter.
        The official ConceptAttention code gives concept i that of text token i; no parity switch reproduces this.
        """
        patch_embed, config = transformer.patch_embed, transformer.config
        concepts = patch_embed.text_proj(embeds.to(like))
        # For another number of frames the model leaves the learned table for a sin-cos one.
        if (
            config.use_learned_positional_embeddings
            and patch_embed.pos_embedding.shape[1] == config.max_text_seq_length + like.shape[1]
        ):
            concepts = concepts + patch_embed.pos_embedding[:, :1].to(concepts)
        return cast(torch.Tensor, concepts)

    def reentry(
        self, block: nn.Module, arguments: Mapping[str, Any], concepts: torch.Tensor, rows: slice
    ) -> dict[str, Any]:
        """See `JointBackbone.reentry`; text has no rotary embedding, and one time embedding may serve all rows."""
        return {
            "hidden_states": concepts.new_empty(concepts.shape[0], 0, concepts.shape[2]),
            "encoder_hidden_states": concepts,
            "temb": arguments["temb"].expand(arguments["hidden_states"].shape[0], -1)[rows],
        }

    def leave(self, block: nn.Module, block_output: Any) -> torch.Tensor:
        """See `JointBackbone.leave`; a block returns video, then text."""
        return cast(torch.Tensor, block_output[1])

    def join(self, arguments: Mapping[str, Any], concepts: torch.Tensor) -> dict[str, Any]:
        """See `JoiningBackbone.join`; text and video share norms, projections and feed-forward."""
        text = arguments["encoder_hidden_states"]
        return {**arguments, "encoder_hidden_states": torch.cat([text, concepts.to(text)], 1)}

    def part(self, block_output: Any, count: int) -> tuple[Any, torch.Tensor]:
        """See `JoiningBackbone.part`; the next block gets its text in the memory layout it would have had."""
        video, text = block_output
        return (video, text[:, :-count].contiguous()), text[:, -count:]


def _latents_per_token(transformer: Any) -> int:
    return int(getattr(transformer.config, "patch_size_t", None) or 1)


BACKBONE = CogVideoXBackbone()
