"""The video of LTX-2 and LTX-2.3, which are made with their sound.

A block has six attentions; maps are made of the one in which video tokens read the text, before its gates. No block
updates the text: Gemma's states behind the pipeline's connectors and, in LTX-2, the model's caption projection. In
LTX-2.3 every block modulates it by the timestep, and concepts alike; the prompt's mask does not touch them. Images of
image-to-video are part of the grid; conditions and references behind it are left out, and so are the further forward
passes of guidance that perturbs the model or silences the sound.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2Attention,
    LTX2AudioVideoAttnProcessor,
    LTX2PerturbedAttnProcessor,
    apply_interleaved_rotary_emb,
    apply_split_rotary_emb,
)

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
from diffusers_concept_maps.tokens import check_encoders, token_spans, undisturbed, word_tokens, words_first

if TYPE_CHECKING:
    from diffusers_concept_maps.compiled import Relay
    from diffusers_concept_maps.listener import PassListener

_TEXT_TOKENS = 1024
_FRAMES = 121


class LTX2Backbone(CrossBackbone):
    """All transformers of LTX-2.

    The connectors let tokens of a text attend to one another, to start marks and to learned registers: every concept
    goes through them as a text of its own.
    """

    transformer_classes: ClassVar[tuple[str, ...]] = ("LTX2VideoTransformer3DModel",)
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
        config = transformer.config
        return int(config.caption_channels if config.use_prompt_embeddings else config.cross_attention_dim)

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`; what the connectors make of the states of the words."""
        check_encoders(pipe, "tokenizer", "text_encoder")
        length = length or _TEXT_TOKENS
        for text in texts:
            word_tokens(pipe.tokenizer, text, length)  # beside a start mark
        with undisturbed(pipe.text_encoder, pipe.connectors):
            states, mask, *_ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=length)
            states, *_ = pipe.connectors(states, mask, padding_side=pipe.tokenizer.padding_side)
        return words_first(states, [self.token_spans(pipe, text, length) for text in texts])

    def token_spans(self, pipe: Any, prompt: str, length: int) -> list[tuple[int, int]]:
        """See `Backbone.token_spans`; connectors with registers put these where the padding was, behind the words."""
        blanks = len(prompt) - len(prompt.lstrip())
        spans = [
            (start + blanks, stop + blanks) if stop > start else (0, 0)
            for start, stop in token_spans(pipe.tokenizer, prompt.strip(), length)
        ]
        padding = [(0, 0)] * (length - len(spans))
        moved = pipe.connectors.config.video_connector_num_learnable_registers is not None
        return spans + padding if moved else padding + spans

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`.

        Raises:
            ConceptMapsError: the grid is not told.
        """
        tokens, sizes = call["hidden_states"].shape[1], [call.get(name) for name in ("num_frames", "height", "width")]
        if None in sizes:
            raise ConceptMapsError(
                f"the transformer was given {tokens} tokens without num_frames, height and width: where they are in "
                f"the video is not known (pipelines that make it in tiles cannot be traced)"
            )
        return Grid(*(int(cast(int, size)) for size in sizes))

    def clip_shape(self, pipe: Any) -> ClipShape:
        """See `RealInput.clip_shape`."""
        multiple = int(pipe.vae_spatial_compression_ratio) * int(pipe.transformer_spatial_patch_size)
        return default_shape(pipe, multiple, int(pipe.vae_temporal_compression_ratio), frames=_FRAMES)

    def latents(self, pipe: Any, clip: torch.Tensor) -> torch.Tensor:
        """See `RealInput.latents`; mean and deviation are buffers."""
        vae = pipe.vae
        latents = normalize_latents(posterior_mean(vae.encode(clip)), vae.latents_mean, vae.latents_std)
        return latents * float(vae.config.scaling_factor)

    def real_arguments(self, pipe: Any, frames: int) -> dict[str, Any]:
        """See `RealInput.real_arguments`; the sound, of which nothing is known, is noise."""
        ones = dict.fromkeys(("audio_guidance_scale", "modality_scale", "audio_modality_scale"), 1.0)
        unguided = {**ones, "stg_scale": 0.0, "audio_stg_scale": 0.0}
        known = signature(type(pipe).__call__).parameters
        wanted = super().real_arguments(pipe, frames)
        return wanted | {name: value for name, value in unguided.items() if name in known}

    def insert(self, pipe: Any, call: Mapping[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        """See `RealInput.insert`; conditions stay, in the grid and behind it."""
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
        config = transformer.config
        return {
            "frames_per_latent": int(config.vae_scale_factors[0]),
            "latents_per_token": int(config.patch_size_t),
        }

    def context(
        self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor, call: Mapping[str, Any], rows: slice
    ) -> torch.Tensor:
        """See `CrossBackbone.context`."""
        embeds = embeds.to(like)
        if transformer.config.use_prompt_embeddings:
            embeds = transformer.caption_projection(embeds)
        return embeds

    def modulate(self, block: Any, arguments: Mapping[str, Any], context: torch.Tensor, rows: slice) -> torch.Tensor:
        """See `CrossBackbone.modulate`."""
        if not block.cross_attn_adaln:
            return context
        table, temb = block.prompt_scale_shift_table, arguments["temb_prompt"]
        if temb is None:
            shift, scale = table[None, None].to(context).unbind(dim=2)
        else:
            temb = temb[rows]
            shift, scale = block.get_mod_params(table, temb, temb.shape[0])
        return cast(torch.Tensor, context * (1 + scale) + shift)


class _LTX2Processor(ConceptProcessor):
    _attention_backend: Any
    _parallel_config: Any

    def _show(
        self,
        listener: PassListener[Any] | Relay,
        attn: Any,
        video: torch.Tensor,
        text: torch.Tensor | None,
        mask: torch.Tensor | None,
        rotary: tuple[Any, Any],
        perturbation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of video `[batch, N, width]` to text `[batch, T, width]` or, where there is none, to itself."""
        context = video if text is None else text
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, context.shape[1], context.shape[0])
            mask = mask.view(context.shape[0], attn.heads, -1, mask.shape[-1])
        gates = None if attn.to_gate_logits is None else attn.to_gate_logits(video)
        query, key, value = self._project(attn, video, context)
        query, key = _rotate(attn, attn.norm_q(query), attn.norm_k(key), *rotary)
        query, key, value = (_split_heads(attn, states) for states in (query, key, value))
        if text is None:
            output = attend_video(listener, attn, (query, key, value), mask, partial(dispatch, self, mask=mask))
        else:
            output = dispatch(self, query, key, value, mask)
            heads = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            whole, output = slice(0, None), output.transpose(1, 2)
            output = self.amend(attn, heads, output, text=whole, image=whole, mask=mask).transpose(1, 2)
        states = output.flatten(2, 3).to(query.dtype)
        if perturbation is not None:
            states = torch.lerp(value.flatten(2, 3), states, perturbation)
        if gates is not None:
            states = (_split_heads(attn, states) * (2.0 * torch.sigmoid(gates)).unsqueeze(-1)).flatten(2, 3)
        states = attn.to_out[1](attn.to_out[0](states))
        if text is not None:
            query, output, key = (tensor.transpose(1, 2) for tensor in (query, output, key))
            listener.observe_crossing(attn, query, output, key, partial(self.project_key, attn))
        return cast(torch.Tensor, states)

    def _project(self, attn: Any, video: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query, key and value `[batch, token, width]`."""
        return attn.to_q(video), attn.to_k(context), attn.to_v(context)

    def project_key(self, attn: LTX2Attention, text: torch.Tensor) -> torch.Tensor:
        """See `ConceptProcessor.project_key`."""
        return _split_heads(attn, attn.norm_k(attn.to_k(text))).transpose(1, 2)


class ConceptLTX2AudioVideoAttnProcessor(_LTX2Processor, LTX2AudioVideoAttnProcessor):
    """Drop-in for `LTX2AudioVideoAttnProcessor`."""

    stock: ClassVar[type | None] = LTX2AudioVideoAttnProcessor

    def __call__(
        self,
        attn: LTX2Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: Any = None,
        key_rotary_emb: Any = None,
    ) -> torch.Tensor:
        """As the stock processor; where video reads the text or itself, for those who listen to see."""
        listener, rotary = self.listener(attn), (query_rotary_emb, key_rotary_emb)
        if listener is not None:
            return self._show(listener, attn, hidden_states, encoder_hidden_states, attention_mask, rotary)
        stock: Any = super()
        result = stock.__call__(attn, hidden_states, encoder_hidden_states, attention_mask, *rotary)
        return cast(torch.Tensor, result)


class ConceptLTX2PerturbedAttnProcessor(_LTX2Processor, LTX2PerturbedAttnProcessor):
    """Drop-in for `LTX2PerturbedAttnProcessor`, which perturbs self-attention alone.

    Where all of it is perturbed, there is no attention to show; where some of it is, what is shown is before that.
    """

    stock: ClassVar[type | None] = LTX2PerturbedAttnProcessor

    def __call__(
        self,
        attn: LTX2Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: Any = None,
        key_rotary_emb: Any = None,
        perturbation_mask: torch.Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> torch.Tensor:
        """As the stock processor; where video reads the text or itself, for those who listen to see."""
        listener, rotary = self.listener(attn), (query_rotary_emb, key_rotary_emb)
        given = (attn, hidden_states, encoder_hidden_states, attention_mask)
        if all_perturbed is None and listener is not None:
            all_perturbed = perturbation_mask is not None and bool((perturbation_mask == 0).all())
        if listener is not None and not all_perturbed:
            return self._show(listener, *given, rotary, perturbation_mask)
        stock: Any = super()
        return cast(torch.Tensor, stock.__call__(*given, *rotary, perturbation_mask, all_perturbed))

    def _project(self, attn: Any, video: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value = attn.to_v(context)  # first, as in the stock class: checkpointing goes by the order
        return attn.to_q(video), attn.to_k(context), value


def _rotate(
    attn: Any, query: torch.Tensor, key: torch.Tensor, query_rotary: Any, key_rotary: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key `[batch, token, width]` turned by their positions, where they have some."""
    if query_rotary is None:
        return query, key
    turn = apply_interleaved_rotary_emb if attn.rope_type == "interleaved" else apply_split_rotary_emb
    return turn(query, query_rotary), turn(key, query_rotary if key_rotary is None else key_rotary)


def _split_heads(attn: Any, states: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, states.unflatten(2, (attn.heads, -1)))


BACKBONE = LTX2Backbone()
