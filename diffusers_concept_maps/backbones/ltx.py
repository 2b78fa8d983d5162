"""LTX-Video: text to video, image to video, and video from conditions.

Self-attention over packed video tokens, then cross-attention to a text that no block updates: T5's states behind the
model's caption projection, the same for every block, without positions. Concepts go through that projection too and
have keys in every block; the prompt's mask does not touch them. Images of image-to-video and conditions at the first
frame are part of the grid; conditions at later frames are tokens in front of it, which maps leave out.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
from diffusers.models.transformers.transformer_ltx import LTXAttention, LTXVideoAttnProcessor, apply_rotary_emb

from diffusers_concept_maps.backbones._base import CrossBackbone, Grid, Site
from diffusers_concept_maps.backbones._real import (
    ClipShape,
    default_shape,
    normalize_latents,
    posterior_mean,
    put_tokens,
)
from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.processors._base import ConceptProcessor
from diffusers_concept_maps.processors.video import attend_video, dispatch
from diffusers_concept_maps.tokens import check_encoders, undisturbed, word_tokens

_TEXT_TOKENS = 128
_FRAMES_PER_LATENT = 8


class LTXBackbone(CrossBackbone):
    """LTX-Video in all its sizes.

    Pipelines say the token grid, but for that of conditions: it gives every token its coordinates, from which the grid
    is read, for which a device waits.
    """

    transformer_classes: ClassVar[tuple[str, ...]] = ("LTXVideoTransformer3DModel",)
    editable: ClassVar[bool] = True

    def sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.sites`."""
        return [Site(block, block.attn2) for block in transformer.transformer_blocks]

    def matching_sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.matching_sites`."""
        return [Site(block, block.attn1) for block in transformer.transformer_blocks]

    def heads(self, transformer: Any) -> int:
        """See `Backbone.heads`."""
        return int(transformer.config.num_attention_heads)

    def text_width(self, transformer: Any) -> int:
        """See `Backbone.text_width`."""
        return int(transformer.config.caption_channels)

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`; states of T5, which attends to the padding as it does for the pipelines."""
        check_encoders(pipe, "tokenizer", "text_encoder")
        length = length or _TEXT_TOKENS
        counts = [word_tokens(pipe.tokenizer, text, length) for text in texts]
        with undisturbed(pipe.text_encoder):
            states, *_ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=length)
        return states, counts

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`.

        Raises:
            ConceptMapsError: there are other tokens than those of one grid and its conditions.
        """
        tokens = call["hidden_states"].shape[1]
        if call.get("num_frames") is None:
            grid = _grid_of(call["video_coords"])
        else:
            grid = Grid(int(call["num_frames"]), int(call["height"]), int(call["width"]))
        if grid.tokens.stop != tokens:
            raise ConceptMapsError(
                f"the transformer was given {tokens} tokens, but its other arguments tell of {grid.tokens.stop}: "
                f"where they are in the video is not known (LTXI2VLongMultiPromptPipeline makes it in windows, which "
                f"cannot be traced)"
            )
        return grid

    def clip_shape(self, pipe: Any) -> ClipShape:
        """See `RealInput.clip_shape`."""
        multiple = int(pipe.vae_spatial_compression_ratio) * int(pipe.transformer_spatial_patch_size)
        return default_shape(pipe, multiple, int(pipe.vae_temporal_compression_ratio))

    def latents(self, pipe: Any, clip: torch.Tensor) -> torch.Tensor:
        """See `RealInput.latents`; mean and deviation are buffers."""
        vae = pipe.vae
        latents = normalize_latents(posterior_mean(vae.encode(clip)), vae.latents_mean, vae.latents_std)
        return latents * float(vae.config.scaling_factor)

    def insert(self, pipe: Any, call: Mapping[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        """See `RealInput.insert`; conditions stay, in the grid and in front of it."""
        hidden, own = call["hidden_states"], self.grid(pipe.transformer, call).tokens
        patches = pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
        tokens = pipe._pack_latents(latents, *patches)
        return {"hidden_states": put_tokens(hidden, tokens, own, self.given(pipe, call))}

    def given(self, pipe: Any, call: Mapping[str, Any]) -> torch.Tensor | None:
        """See `RealInput.given`; where every token has a timestep, given ones have another than noise."""
        steps, own = call["timestep"], self.grid(pipe.transformer, call).tokens
        if steps.ndim == 1 or steps.shape[1] == 1:
            return None
        return cast(torch.Tensor, steps != steps.amax())[:, own]

    def timesteps(self, scheduled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `Backbone.timesteps`; tokens that are given have timesteps of their own."""
        return scheduled.to(dtype)

    def geometry(self, transformer: Any) -> dict[str, int]:
        """See `Backbone.geometry`."""
        return {
            "frames_per_latent": _FRAMES_PER_LATENT,
            "latents_per_token": int(transformer.config.patch_size_t),
        }

    def context(
        self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor, call: Mapping[str, Any], rows: slice
    ) -> torch.Tensor:
        """See `CrossBackbone.context`."""
        return cast(torch.Tensor, transformer.caption_projection(embeds.to(like)))


def _grid_of(coordinates: torch.Tensor) -> Grid:
    """The grid behind its conditions, from `[batch, 3, token]`: the grid begins at time zero, conditions later."""
    times, rows, columns = coordinates[0]
    height, width = rows.unique().numel(), columns.unique().numel()
    frames = times[:: height * width].tolist()
    start = max((place for place, time in enumerate(frames) if time == 0), default=0)
    return Grid(len(frames) - start, height, width, start * height * width)


class ConceptLTXVideoAttnProcessor(ConceptProcessor, LTXVideoAttnProcessor):
    """Drop-in for `LTXVideoAttnProcessor`, in its order of operations."""

    stock: ClassVar[type | None] = LTXVideoAttnProcessor

    def __call__(
        self,
        attn: LTXAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor:
        """Attention of video `[batch, N, width]` to text `[batch, T, width]` or, where there is none, to itself."""
        recorder = self.listener(attn)
        if recorder is None:
            stock: Any = super()
            return cast(
                torch.Tensor,
                stock.__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb),
            )
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            batch, count, _ = context.shape
            attention_mask = attn.prepare_attention_mask(attention_mask, count, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = apply_rotary_emb(query, image_rotary_emb), apply_rotary_emb(key, image_rotary_emb)
        query, key, value = (_split_heads(attn, states) for states in (query, key, value))
        if encoder_hidden_states is None:
            attend = partial(dispatch, self, mask=attention_mask)
            output = attend_video(recorder, attn, (query, key, value), attention_mask, attend)
        else:
            output = dispatch(self, query, key, value, attention_mask)
            heads = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            whole, output = slice(0, None), output.transpose(1, 2)
            output = self.amend(attn, heads, output, text=whole, image=whole, mask=attention_mask).transpose(1, 2)
        result = attn.to_out[1](attn.to_out[0](output.flatten(2, 3).to(query.dtype)))
        if encoder_hidden_states is not None:
            query, output, key = (tensor.transpose(1, 2) for tensor in (query, output, key))
            recorder.observe_crossing(attn, query, output, key, partial(self.project_key, attn))
        return cast(torch.Tensor, result)

    def project_key(self, attn: LTXAttention, text: torch.Tensor) -> torch.Tensor:
        """See `ConceptProcessor.project_key`."""
        return _project_key(attn, text).transpose(1, 2)


def _split_heads(attn: LTXAttention, states: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, states.unflatten(2, (attn.heads, -1)))


def _project_key(attn: LTXAttention, text: torch.Tensor) -> torch.Tensor:
    return _split_heads(attn, attn.norm_k(attn.to_k(text)))


BACKBONE = LTXBackbone()
