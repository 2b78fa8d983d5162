"""Cosmos 1, Cosmos Predict 2 and 2.5, and Transfer 2.5.

Self-attention of the video, then cross-attention to a text that no block updates and that has no positions: states of
T5 as they are, or, in 2.5, those of all layers of Qwen behind the model's projection. Concepts are projected alike and
have keys in every block. The image context of 2.5 has an attention of its own, of which maps say nothing; frames that
are given are part of the grid. Transfers in chunks that continue one another are refused: each has maps of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0, CosmosAttnProcessor2_5

from diffusers_concept_maps.backbones._base import CrossBackbone, Grid, Site
from diffusers_concept_maps.backbones._real import ClipShape, default_shape, posterior_mean
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.noising import one_step
from diffusers_concept_maps.processors._base import ConceptProcessor
from diffusers_concept_maps.processors.video import attend_video
from diffusers_concept_maps.tokens import (
    check_encoders,
    spans_inside,
    token_spans,
    undisturbed,
    word_tokens,
    words_first,
)

if TYPE_CHECKING:
    from diffusers_concept_maps.compiled import Relay
    from diffusers_concept_maps.listener import PassListener

_TEXT_TOKENS = 512
_SYSTEM_PROMPT = "You are a helpful assistant who will provide prompts to an image generator."
"""What the pipelines of Cosmos 2.5 put in front of every prompt."""

_AREA = 704 * 1280


class CosmosBackbone(CrossBackbone):
    """All of them; 2.5 is told by its text projection, 1 by its learned positions."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("CosmosTransformer3DModel",)
    editable: ClassVar[bool] = True
    batched_guidance: ClassVar[bool] = False

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
        return int(config.crossattn_proj_in_channels if config.use_crossattn_projection else config.text_embed_dim)

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`; Qwen reads every concept where a prompt would be in its conversation."""
        check_encoders(pipe, "tokenizer", "text_encoder")
        length = length or _TEXT_TOKENS
        converses = pipe.transformer.config.use_crossattn_projection
        counts = [word_tokens(pipe.tokenizer, text, None if converses else length) for text in texts]
        spans = [self.token_spans(pipe, text, length) for text in texts]
        for text, own in zip(texts, spans, strict=True):
            if max(stop for _, stop in own) < len(text):
                raise ConceptMapsValueError(f"concept {text!r} does not fit into {length} tokens; shorten it")
        with undisturbed(pipe.text_encoder):
            states, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=length)
        return words_first(states, spans) if converses else (states, counts)

    def token_spans(self, pipe: Any, prompt: str, length: int) -> list[tuple[int, int]]:
        """See `Backbone.token_spans`; in 2.5 the tokens of a conversation, the prompt among them."""
        if not pipe.transformer.config.use_crossattn_projection:
            return token_spans(pipe.tokenizer, prompt, length)
        place = _conversation(pipe.tokenizer, "\0").index("\0")
        encoded = pipe.tokenizer(
            _conversation(pipe.tokenizer, prompt),
            add_special_tokens=False,
            max_length=length,
            truncation=True,
            padding="max_length",
            return_offsets_mapping=True,
        )
        return spans_inside(encoded.offset_mapping, place, prompt)

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`; latents are `[batch, channel, frame, height, width]`.

        Raises:
            ConceptMapsError: a transfer goes on behind its first chunk, the only one without frames that are given.
        """
        if call.get("block_controlnet_hidden_states") is not None and bool(call["condition_mask"][:, :, 0].any()):
            raise ConceptMapsError(
                "the pipeline makes this video in chunks, and each would have maps of its own; transfer no more "
                "frames than num_frames_per_chunk"
            )
        _, _, frames, height, width = call["hidden_states"].shape
        patch = transformer.config.patch_size
        return Grid(frames // patch[0], height // patch[1], width // patch[2])

    def text_length(self, call: Mapping[str, Any]) -> int:
        """See `Backbone.text_length`; text comes with an image context or alone."""
        return int(_text_of(call["encoder_hidden_states"]).shape[1])

    def handed_timesteps(self, pipe: Any, scheduled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `Backbone.handed_timesteps`.

        The timestep (1), what the sigma is as one of a flow (2), the sigma (2.5), and the sigma in the dtype of the
        transformer (Transfer 2.5).
        """
        sigmas = pipe.scheduler.sigmas[: len(scheduled)].to(scheduled.device)
        ways = (scheduled, sigmas / (sigmas + 1), sigmas, sigmas.to(pipe.transformer.dtype))
        return torch.stack([way.to(dtype) for way in ways])

    def clip_shape(self, pipe: Any) -> ClipShape:
        """See `RealInput.clip_shape`; a transfer takes size and length from its controls, and makes chunks."""
        multiple = int(pipe.vae_scale_factor_spatial) * int(pipe.transformer.config.patch_size[-1])
        chunk = signature(type(pipe).__call__).parameters.get("num_frames_per_chunk")
        known = {} if chunk is None else {"area": _AREA, "frames": int(chunk.default)}
        return default_shape(pipe, multiple, int(pipe.vae_scale_factor_temporal), **known)

    def real_arguments(self, pipe: Any, frames: int) -> dict[str, Any]:
        """See `RealInput.real_arguments`; a transfer takes the clip whole."""
        wanted, known = super().real_arguments(pipe, frames), signature(type(pipe).__call__).parameters
        return wanted | ({"num_frames_per_chunk": frames} if "num_frames_per_chunk" in known else {})

    def latents(self, pipe: Any, clip: torch.Tensor) -> torch.Tensor:
        """See `RealInput.latents`; the VAE of Cosmos 1 has mean and deviation for every latent frame."""
        latents, config = posterior_mean(pipe.vae.encode(clip)), pipe.vae.config
        if config.latents_mean is not None:
            shape = (1, latents.shape[1], -1, 1, 1)
            known = (latents.new_tensor(own).view(shape) for own in (config.latents_mean, config.latents_std))
            mean, std = (own[:, :, : latents.shape[2]] for own in known)
            latents = (latents - mean) / std
        return latents * _deviation(pipe)

    def insert(self, pipe: Any, call: Mapping[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        """See `RealInput.insert`; what the transformer is given has deviation 1."""
        return super().insert(pipe, call, latents / _deviation(pipe))

    def given(self, pipe: Any, call: Mapping[str, Any]) -> torch.Tensor | None:
        """See `RealInput.given`."""
        mask = call.get("condition_mask")
        return None if mask is None else cast(torch.Tensor, mask != 0)

    def add_noise(self, pipe: Any, clean: torch.Tensor, noise: torch.Tensor, level: float) -> torch.Tensor:
        """See `RealInput.add_noise`.

        Cosmos 1 and 2 add it at deviation 1 of the clip without taking from the clip, and scale the sum: at the ratio
        of noise to clip that flow matching has at this level, as far as their schedule goes.
        """
        scheduler = pipe.scheduler
        if not _adds(scheduler):
            return super().add_noise(pipe, clean, noise, level)
        deviation, sigma = _deviation(pipe), _sigma(scheduler, level)
        noisy = clean + sigma * noise
        if hasattr(scheduler, "precondition_inputs"):
            return cast(torch.Tensor, scheduler.precondition_inputs(noisy, sigma) * deviation)
        return noisy / (1 + sigma) * deviation

    def scheduler_at(self, pipe: Any, level: float) -> Any:
        """See `RealInput.scheduler_at` and `add_noise`."""
        scheduler = pipe.scheduler
        if not _adds(scheduler):
            return super().scheduler_at(pipe, level)
        sigma = _sigma(scheduler, level)
        if hasattr(scheduler, "precondition_noise"):
            return one_step(scheduler, float(scheduler.precondition_noise(sigma)), sigma)
        return one_step(scheduler, sigma * scheduler.config.num_train_timesteps, sigma)

    def geometry(self, transformer: Any) -> dict[str, int]:
        """See `Backbone.geometry`; Cosmos 1 has an autoencoder of its own."""
        config = transformer.config
        return {
            "frames_per_latent": 8 if config.extra_pos_embed_type == "learnable" else 4,
            "latents_per_token": int(config.patch_size[0]),
        }

    def context(
        self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor, call: Mapping[str, Any], rows: slice
    ) -> torch.Tensor:
        """See `CrossBackbone.context`."""
        embeds = embeds.to(like)
        if transformer.config.use_crossattn_projection:
            embeds = transformer.crossattn_proj(embeds)
        return embeds


def _adds(scheduler: Any) -> bool:
    """Whether noise is added to a clip that stays as large as it is; the pipelines of Cosmos 1 and 2 say how large."""
    return getattr(scheduler.config, "sigma_data", None) is not None


def _deviation(pipe: Any) -> float:
    return float(getattr(pipe.scheduler.config, "sigma_data", None) or 1.0)


def _sigma(scheduler: Any, level: float) -> float:
    config = scheduler.config
    largest, smallest = float(config.sigma_max), float(config.sigma_min)
    return max(min(level / (1 - level) * config.sigma_data, largest), smallest) if level < 1 else largest


def _text_of(context: Any) -> torch.Tensor:
    return cast(torch.Tensor, context[0] if isinstance(context, tuple) else context)


def _conversation(tokenizer: Any, prompt: str) -> str:
    """What Qwen is given to read."""
    said = {"system": _SYSTEM_PROMPT, "user": prompt}
    turns = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said.items()]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False, add_vision_id=False)
    return cast(str, rendered)


class _CosmosProcessor(ConceptProcessor):
    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor:
        """Attention of video `[batch, N, width]` to text `[batch, T, width]` and, beside it, to an image context.

        Where there is no text, to itself.
        """
        recorder = self.listener(attn)
        if recorder is None:
            stock: Any = super()
            return cast(
                torch.Tensor,
                stock.__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb),
            )
        if encoder_hidden_states is None:
            return _read_video(recorder, attn, hidden_states, attention_mask, image_rotary_emb)
        text, image, mask, image_mask = self._contexts(encoder_hidden_states, attention_mask)
        linears = (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        query, key, value = (_split_heads(attn, states) for states in linears)
        query, key = attn.norm_q(query), attn.norm_k(key)
        output, whole = _attend(query, key, value, mask).transpose(1, 2), slice(0, None)
        output = self.amend(attn, (query, key, value), output, text=whole, image=whole, mask=mask).transpose(1, 2)
        states = output.flatten(2, 3).type_as(query)
        if image is not None:
            states = states + _read_image(attn, hidden_states, image, image_mask)
        states = attn.to_out[1](attn.to_out[0](states))
        recorder.observe_crossing(attn, query, output.transpose(1, 2), key, partial(self.project_key, attn))
        return cast(torch.Tensor, states)

    def project_key(self, attn: Attention, text: torch.Tensor) -> torch.Tensor:
        """See `ConceptProcessor.project_key`."""
        return cast(torch.Tensor, attn.norm_k(_split_heads(attn, attn.to_k(text))))

    def _contexts(self, context: Any, mask: Any) -> tuple[Any, Any, Any, Any]:
        """Text, image context and their masks."""
        return context, None, mask, None


class ConceptCosmosAttnProcessor2_0(_CosmosProcessor, CosmosAttnProcessor2_0):
    """Drop-in for `CosmosAttnProcessor2_0`, in its order of operations."""

    stock: ClassVar[type | None] = CosmosAttnProcessor2_0


class ConceptCosmosAttnProcessor2_5(_CosmosProcessor, CosmosAttnProcessor2_5):
    """Drop-in for `CosmosAttnProcessor2_5`, in its order of operations."""

    stock: ClassVar[type | None] = CosmosAttnProcessor2_5

    def _contexts(self, context: Any, mask: Any) -> tuple[Any, Any, Any, Any]:
        return (*context, *(mask or (None, None)))


def _split_heads(attn: Attention, states: torch.Tensor) -> torch.Tensor:
    """`[batch, token, width]` to `[batch, H, token, D]`."""
    return cast(torch.Tensor, states.unflatten(2, (attn.heads, -1))).transpose(1, 2)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
    """Attention output `[batch, N, H, D]` of `[batch, H, token, D]`; the host's way for fewer heads of text."""
    key = key.repeat_interleave(query.size(3) // key.size(3), dim=3)
    value = value.repeat_interleave(query.size(3) // value.size(3), dim=3)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return _dispatch(query, key, value, mask)


def _dispatch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
    """Attention output `[batch, N, H, D]` of `[batch, token, H, D]`."""
    return cast(torch.Tensor, dispatch_attention_fn(query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False))


def _read_video(
    listener: PassListener[Any] | Relay, attn: Attention, video: torch.Tensor, mask: Any, rotary: Any
) -> torch.Tensor:
    """Attention of the video `[batch, N, width]` to itself, the same out."""
    query, key, value = (_split_heads(attn, linear(video)) for linear in (attn.to_q, attn.to_k, attn.to_v))
    query, key = attn.norm_q(query), attn.norm_k(key)
    if rotary is not None:
        query, key = (
            apply_rotary_emb(states, rotary, use_real=True, use_real_unbind_dim=-2) for states in (query, key)
        )
    heads = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    states = attend_video(listener, attn, heads, mask, partial(_dispatch, mask=mask)).flatten(2, 3).type_as(query)
    return cast(torch.Tensor, attn.to_out[1](attn.to_out[0](states)))


def _read_image(attn: Any, hidden_states: torch.Tensor, image: torch.Tensor, mask: Any) -> torch.Tensor:
    """What the video reads in the image context `[batch, N, width]`."""
    linears = (attn.q_img(hidden_states), attn.k_img(image), attn.v_img(image))
    query, key, value = (_split_heads(attn, states) for states in linears)
    query = attn.q_img_norm(query)
    output = _attend(query, attn.k_img_norm(key), value, mask)
    return output.flatten(2, 3).type_as(query)


BACKBONE = CosmosBackbone()
