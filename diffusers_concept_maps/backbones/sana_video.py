"""Sana-Video: text to video and image to video.

Self-attention of the video is linear; its cross-attention to text is where maps come from. Text is Gemma's states
behind the model's caption projection and norm, which no block updates, without positions. Concepts go through
projection and norm as well and have keys in every block; the prompt's mask does not touch them. Gemma reads concepts,
like prompts, behind the instruction that is the pipeline's default.

What is shown of self-attention are keys behind ReLU and rotary embedding and queries likewise, divided by the sum that
normalizes their weights, in float32: query times key is the weight itself, without scale and softmax, and may be
negative. To match tokens is to look for the largest of these; a softmax of them is almost flat, and no probability.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from math import lcm
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_sana_video import SanaAttnProcessor2_0, SanaLinearAttnProcessor3_0
from torch.nn import functional

from diffusers_concept_maps.backbones._base import CrossBackbone, Grid, Site
from diffusers_concept_maps.backbones._real import ClipShape, default_shape, normalize_latents, posterior_mean
from diffusers_concept_maps.processors._base import ConceptProcessor
from diffusers_concept_maps.processors.video import rotate_pairs
from diffusers_concept_maps.tokens import check_encoders, token_spans, undisturbed, word_tokens, words_first

if TYPE_CHECKING:
    from diffusers_concept_maps.compiled import Relay
    from diffusers_concept_maps.listener import PassListener

_TEXT_TOKENS = 300
_LTX2_CHANNELS = 128


class SanaVideoBackbone(CrossBackbone):
    """Sana-Video with any of its three autoencoders."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("SanaVideoTransformer3DModel",)

    def sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.sites`."""
        return [Site(block, block.attn2) for block in transformer.transformer_blocks]

    def matching_sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.matching_sites`."""
        return [Site(block, block.attn1) for block in transformer.transformer_blocks]

    def heads(self, transformer: Any) -> int:
        """See `Backbone.heads`."""
        return int(transformer.config.num_cross_attention_heads)

    def text_width(self, transformer: Any) -> int:
        """See `Backbone.text_width`."""
        return int(transformer.config.caption_channels)

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`."""
        check_encoders(pipe, "tokenizer", "text_encoder")
        length = length or _TEXT_TOKENS
        for text in texts:
            word_tokens(pipe.tokenizer, text.lower(), length - 1)  # beside an end mark, a start mark
        with undisturbed(pipe.text_encoder):
            states, *_ = pipe.encode_prompt(
                texts, False, max_sequence_length=length, complex_human_instruction=_instruction(pipe)
            )
        return words_first(states, [self.token_spans(pipe, text, length) for text in texts])

    def token_spans(self, pipe: Any, prompt: str, length: int) -> list[tuple[int, int]]:
        """See `Backbone.token_spans`.

        The tokens of the default instruction and the prompt, in lower case and without blanks around it, of which the
        pipelines take the first and the last.
        """
        instruction = "\n".join(_instruction(pipe) or ())
        marked = len(pipe.tokenizer.encode(instruction)) - 2 if instruction else 0
        text = instruction + prompt.lower().strip()
        spans = token_spans(pipe.tokenizer, text, marked + length)
        spans += [(0, 0)] * (marked + length - len(spans))
        # Lower case may have more characters than the prompt: which of those each one comes from.
        source = [place for place, letter in enumerate(prompt) for _ in letter.lower()]
        blanks = len(prompt.lower()) - len(prompt.lower().lstrip())
        found = []
        for start, stop in (spans[0], *spans[marked + 1 :]):
            start, stop = (max(place - len(instruction), 0) + blanks for place in (start, stop))
            found.append((source[start], source[stop - 1] + 1) if stop > start else (0, 0))
        return found

    def misleading(self, pipe: Any, arguments: Mapping[str, Any]) -> str | None:
        """See `Backbone.misleading`; another instruction than the default one, or none."""
        name = "complex_human_instruction"
        return name if (arguments.get(name) or None) != (_instruction(pipe) or None) else None

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`; latents are `[batch, channel, frame, height, width]`."""
        _, _, frames, height, width = call["hidden_states"].shape
        patch = transformer.config.patch_size
        return Grid(frames // patch[0], height // patch[1], width // patch[2])

    def clip_shape(self, pipe: Any) -> ClipShape:
        """See `RealInput.clip_shape`; the pipelines ask for multiples of 32."""
        multiple = int(pipe.vae_scale_factor_spatial) * int(pipe.transformer.config.patch_size[-1])
        return default_shape(pipe, lcm(multiple, 32), int(pipe.vae_scale_factor_temporal))

    def latents(self, pipe: Any, clip: torch.Tensor) -> torch.Tensor:
        """See `RealInput.latents`; the VAE of LTX-2 has mean and deviation as buffers, that of Sana has none."""
        latents, buffers = posterior_mean(pipe.vae.encode(clip)), dict(pipe.vae.named_buffers(recurse=False))
        mean, std = (buffers.get(name, pipe.vae.config.get(name)) for name in ("latents_mean", "latents_std"))
        return latents if mean is None or std is None else normalize_latents(latents, mean, std)

    def real_arguments(self, pipe: Any, frames: int) -> dict[str, Any]:
        """See `RealInput.real_arguments`; sizes are not put into bins."""
        return super().real_arguments(pipe, frames) | {"use_resolution_binning": False}

    def given(self, pipe: Any, call: Mapping[str, Any]) -> torch.Tensor | None:
        """See `RealInput.given`; image-to-video has a timestep for every token, the same in a frame."""
        steps: torch.Tensor = call["timestep"]
        return None if steps.ndim == 1 else (steps != steps.amax())[..., :1, :1]

    def timesteps(self, scheduled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `Backbone.timesteps`; the frame that is given has one of its own."""
        return scheduled.to(dtype)

    def geometry(self, transformer: Any) -> dict[str, int]:
        """See `Backbone.geometry`; of the autoencoders LTX-2's is told by its channels."""
        config = transformer.config
        return {
            "frames_per_latent": 8 if config.in_channels == _LTX2_CHANNELS else 4,
            "latents_per_token": int(config.patch_size[0]),
        }

    def context(
        self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor, call: Mapping[str, Any], rows: slice
    ) -> torch.Tensor:
        """See `CrossBackbone.context`."""
        return cast(torch.Tensor, transformer.caption_norm(transformer.caption_projection(embeds.to(like))))


def _instruction(pipe: Any) -> list[str] | None:
    """What the pipeline puts in front of every prompt unless it is told otherwise."""
    return cast("list[str] | None", inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default)


class ConceptSanaVideoAttnProcessor2_0(ConceptProcessor, SanaAttnProcessor2_0):
    """Drop-in for Sana-Video's `SanaAttnProcessor2_0`, in its order of operations."""

    stock: ClassVar[type | None] = SanaAttnProcessor2_0

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of video `[batch, N, width]` to text `[batch, T, width]`."""
        recorder = self.listener(attn)
        if recorder is None or encoder_hidden_states is None:
            stock: Any = super()
            return cast(torch.Tensor, stock.__call__(attn, hidden_states, encoder_hidden_states, attention_mask))
        if attention_mask is not None:
            batch, count, _ = encoder_hidden_states.shape
            attention_mask = attn.prepare_attention_mask(attention_mask, count, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        query, key = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
        value = _split_heads(attn, attn.to_v(encoder_hidden_states))
        query = _split_heads(attn, query if attn.norm_q is None else attn.norm_q(query))
        key = self._finish_key(attn, key)
        output = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        result = attn.to_out[1](attn.to_out[0](output.flatten(2, 3).type_as(query)))
        recorder.observe_crossing(
            attn,
            query.transpose(1, 2),
            output.transpose(1, 2),
            key.transpose(1, 2),
            partial(self.project_key, attn),
        )
        return cast(torch.Tensor, result / attn.rescale_output_factor)

    def project_key(self, attn: Attention, text: torch.Tensor) -> torch.Tensor:
        """See `ConceptProcessor.project_key`."""
        return self._finish_key(attn, attn.to_k(text)).transpose(1, 2)

    @staticmethod
    def _finish_key(attn: Attention, key: torch.Tensor) -> torch.Tensor:
        return _split_heads(attn, key if attn.norm_k is None else attn.norm_k(key))


class ConceptSanaLinearAttnProcessor3_0(ConceptProcessor, SanaLinearAttnProcessor3_0):
    """Drop-in for Sana-Video's `SanaLinearAttnProcessor3_0`, in its order of operations."""

    stock: ClassVar[type | None] = SanaLinearAttnProcessor3_0

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Any = None,
    ) -> torch.Tensor:
        """Linear attention of video `[batch, N, width]` to itself."""
        listener = self.listener(attn)
        if listener is None:
            stock: Any = super()
            return cast(
                torch.Tensor,
                stock.__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb),
            )
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        query, key, value = (states.unflatten(2, (attn.heads, -1)) for states in (query, key, value))
        query, key = functional.relu(query), functional.relu(key)
        turned = (rotate_pairs(query, *rotary_emb), rotate_pairs(key, *rotary_emb), value)
        query, key = query.permute(0, 2, 3, 1), key.permute(0, 2, 3, 1)
        shares = 1 / (key.sum(dim=-1, keepdim=True).transpose(-2, -1) @ query + 1e-15)
        query, key, value = (states.permute(0, 2, 3, 1).float() for states in turned)
        output = _attend_linearly(listener, attn, query, key, value, shares)
        states = output.flatten(1, 2).transpose(1, 2).to(hidden_states.dtype)
        return cast(torch.Tensor, attn.to_out[1](attn.to_out[0](states)))


def _attend_linearly(
    listener: PassListener[Any] | Relay,
    attn: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shares: torch.Tensor,
) -> torch.Tensor:
    """Attention output `[batch, H, D, N]` of queries, keys and values alike, and shown, or what is put in its place.

    Args:
        listener: who is to be told of the call.
        attn: the attention module.
        query: `[batch, H, D, N]`.
        key: likewise.
        value: likewise.
        shares: what normalizes the weights of every query `[batch, H, 1, N]`.
    """
    heads = ((query * shares).mT, key.mT, value.mT)
    text, image = slice(0, 0), slice(0, None)
    if listener.restricts:
        output = listener.restrict(*heads, text=text, image=image, linear=True).mT
    else:
        output = torch.matmul(torch.matmul(value, key.transpose(-1, -2)), query) * shares
    listener.observe(attn, *heads, output.mT, text=text, image=image)
    return output


def _split_heads(attn: Attention, states: torch.Tensor) -> torch.Tensor:
    return states.view(states.shape[0], -1, attn.heads, states.shape[-1] // attn.heads)


BACKBONE = SanaVideoBackbone()
