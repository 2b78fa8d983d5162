"""Qwen-Image, its editing, image-to-image, inpainting and control pipelines, and Qwen-Image-Layered.

Joint attention over text and image, text first, with projections of its own for text. Text has rotary positions behind
those of the image: every concept gets that of the first text token, so that their order is of no matter. The mask of
the prompt does not touch them, and they take the modulation of the timestep also where images that are given
(`zero_cond_t`) are modulated as clean. Given images are behind the grid and left out, but concepts read them as text
does. The frames of a layered image are its layers; the whole image, which is made beside them, is left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    apply_rotary_emb_qwen,
)
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from diffusers_concept_maps.backbones._base import Grid, JointBackbone, Site
from diffusers_concept_maps.backbones._real import (
    ImageInput,
    only_frame,
    posterior_mean,
    put_tokens,
    scale_latents,
)
from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.processors._base import ConceptProcessor
from diffusers_concept_maps.tokens import check_encoders, spans_inside, token_spans, undisturbed, word_tokens

_IMAGE_MARK = "<|vision_start|><|image_pad|><|vision_end|>"


class QwenImageBackbone(ImageInput, JointBackbone):
    """Qwen-Image; its pipelines write a prompt into a template, of which the transformer sees the end."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("QwenImageTransformer2DModel",)
    batched_guidance: ClassVar[bool] = False

    def sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.sites`."""
        return [Site(block, block.attn) for block in transformer.transformer_blocks]

    def heads(self, transformer: Any) -> int:
        """See `Backbone.heads`."""
        return int(transformer.config.num_attention_heads)

    def text_width(self, transformer: Any) -> int:
        """See `Backbone.text_width`."""
        return int(transformer.config.joint_attention_dim)

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`; concepts are written into the pipeline's template, without images."""
        check_encoders(pipe, "tokenizer", "text_encoder")
        limit = int(pipe.tokenizer_max_length) if length is None else None
        counts = [word_tokens(pipe.tokenizer, text, limit) for text in texts]
        counts = counts if length is None else [min(count, length) for count in counts]
        template, start = pipe.prompt_template_encode.replace(_IMAGE_MARK, ""), pipe.prompt_template_encode_start_idx
        written = [template.format(text) for text in texts]
        tokens = pipe.tokenizer(written, padding=True, return_tensors="pt").to(pipe._execution_device)
        with undisturbed(pipe.text_encoder):
            states = pipe.text_encoder(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
            ).hidden_states[-1]
        rows = zip(states, tokens.attention_mask.bool(), counts, strict=True)
        words = [state[mask][start : start + count] for state, mask, count in rows]
        return pad_sequence(words, batch_first=True), counts

    def token_spans(self, pipe: Any, prompt: str, length: int) -> list[tuple[int, int]]:
        """See `Backbone.token_spans`; the tokens of the template behind the prompt cover none of it."""
        if "image" in inspect.signature(pipe.encode_prompt).parameters:
            raise ConceptMapsError(
                f"the text tokens of {type(pipe).__name__} begin with those of images, whose number only a run tells; "
                f"pass prompt_tokens={{word: positions}}"
            )
        template, start = pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx
        spans = token_spans(pipe.tokenizer, template.format(prompt), start + length)[start:]
        return spans_inside(spans, template.index("{}"), prompt)

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`; the image that is made comes first, given ones follow it.

        Of a layered image the whole comes first, which its pipeline throws away; its layers are the frames.
        """
        shapes = call["img_shapes"][0]
        frames, height, width = map(int, shapes[0] if isinstance(shapes, list) else shapes)
        if transformer.config.use_layer3d_rope:
            return Grid(len(shapes) - 2, height, width, start=height * width)
        return Grid(frames, height, width)

    def image_latents(self, pipe: Any, images: torch.Tensor) -> torch.Tensor:
        """See `ImageInput.image_latents`; the VAE is one of videos, which takes every frame by itself here."""
        return scale_latents(pipe.vae, posterior_mean(pipe.vae.encode(images.unsqueeze(2)))).squeeze(2)

    def real_arguments(self, pipe: Any, frames: int) -> dict[str, Any]:
        """See `RealInput.real_arguments`.

        Raises:
            ConceptMapsError: the pipeline takes an image apart.
        """
        if pipe.transformer.config.use_layer3d_rope:
            raise ConceptMapsError(
                f"{type(pipe).__name__} makes the layers of an image, which an image alone does not have; use "
                f"another pipeline of Qwen-Image"
            )
        wanted = super().real_arguments(pipe, frames)
        wanted.pop("guidance_scale", None)  # of models that none of these is
        return wanted | {"true_cfg_scale": 1.0}

    def insert(self, pipe: Any, call: Mapping[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        """See `RealInput.insert`; given images stay behind it."""
        image, own = only_frame(latents), self.grid(pipe.transformer, call).tokens
        return {"hidden_states": put_tokens(call["hidden_states"], pipe._pack_latents(image, *image.shape), own)}

    def timesteps(self, scheduled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `Backbone.timesteps`; a thousandth."""
        return scheduled.to(dtype) / 1000

    def enter(
        self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor, call: Mapping[str, Any], rows: slice
    ) -> torch.Tensor:
        """See `JointBackbone.enter`."""
        return cast(torch.Tensor, transformer.txt_in(transformer.txt_norm(embeds.to(like))))

    def reentry(
        self, block: nn.Module, arguments: Mapping[str, Any], concepts: torch.Tensor, rows: slice
    ) -> dict[str, Any]:
        """See `JointBackbone.reentry`; all concepts have the position of the first text token."""
        image_positions, text_positions = arguments["image_rotary_emb"]
        index, temb = arguments["modulate_index"], arguments["temb"]
        if index is not None:  # two time embeddings per row: of the timestep, then of clean images
            temb = torch.cat([part[rows] for part in temb.chunk(2)])
            index = index[rows, :0]
        else:
            temb = temb[rows]
        return {
            "hidden_states": concepts.new_empty(concepts.shape[0], 0, concepts.shape[2]),
            "encoder_hidden_states": concepts,
            "encoder_hidden_states_mask": None,
            "temb": temb,
            "image_rotary_emb": (image_positions[:0], text_positions[:1].expand(concepts.shape[1], -1)),
            "modulate_index": index,
        }

    def leave(self, block: nn.Module, block_output: Any) -> torch.Tensor:
        """See `JointBackbone.leave`; a block returns text, then image."""
        return cast(torch.Tensor, block_output[0])


class ConceptQwenDoubleStreamAttnProcessor2_0(ConceptProcessor, QwenDoubleStreamAttnProcessor2_0):
    """Drop-in for `QwenDoubleStreamAttnProcessor2_0`, in its order of operations."""

    stock: ClassVar[type | None] = QwenDoubleStreamAttnProcessor2_0

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        """Attention of `[text | image]`; image `[batch, N, width]` and text `[batch, T, width]` in, the same out."""
        recorder, text_states = self.recorder, encoder_hidden_states
        if recorder is None or text_states is None or attention_mask is not None or not recorder.records(attn):
            stock: Any = super()
            return stock.__call__(
                attn, hidden_states, text_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
            )
        image_positions, text_positions = (None, None) if image_rotary_emb is None else image_rotary_emb
        if recorder.answering:
            heads = _rotate(_norm_text(attn, _project_text(attn, text_states)), text_positions)
            output = recorder.answer(*(tensor.transpose(1, 2) for tensor in heads))
            return hidden_states, attn.to_add_out(output.transpose(1, 2).flatten(2, 3))
        image_heads, text_heads = _project_image(attn, hidden_states), _project_text(attn, text_states)
        image_heads, text_heads = _norm_image(attn, image_heads), _norm_text(attn, text_heads)
        image_heads, text_heads = _rotate(image_heads, image_positions), _rotate(text_heads, text_positions)
        joint = [torch.cat(parts, dim=1) for parts in zip(text_heads, image_heads, strict=True)]
        output = dispatch_attention_fn(
            *joint,
            attn_mask=_joint_mask(encoder_hidden_states_mask, hidden_states),
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        states, count = output.flatten(2, 3).to(joint[0].dtype), text_states.shape[1]
        image = attn.to_out[0](states[:, count:].contiguous())
        if len(attn.to_out) > 1:
            image = attn.to_out[1](image)
        text = attn.to_add_out(states[:, :count].contiguous())
        query, key, value, output = (tensor.transpose(1, 2) for tensor in (*joint, output))
        recorder.observe(attn, query, key, value, output, text=slice(0, count), image=slice(count, None))
        return image, text


_Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _project_image(attn: Attention, states: torch.Tensor) -> _Heads:
    """Query, key and value `[batch, N, H, D]`."""
    return _split_heads(attn, attn.to_q(states), attn.to_k(states), attn.to_v(states))


def _project_text(attn: Attention, states: torch.Tensor) -> _Heads:
    """The same of text."""
    return _split_heads(attn, attn.add_q_proj(states), attn.add_k_proj(states), attn.add_v_proj(states))


def _split_heads(attn: Attention, *linear: torch.Tensor) -> _Heads:
    query, key, value = (states.unflatten(-1, (-1, attn.inner_dim // attn.heads)) for states in linear)
    return query, key, value


def _norm_image(attn: Attention, heads: _Heads) -> _Heads:
    """Where the model does so."""
    query, key, value = heads
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, value


def _norm_text(attn: Attention, heads: _Heads) -> _Heads:
    """Likewise."""
    query, key, value = heads
    if attn.norm_added_q is not None:
        query = attn.norm_added_q(query)
    if attn.norm_added_k is not None:
        key = attn.norm_added_k(key)
    return query, key, value


def _rotate(heads: _Heads, positions: torch.Tensor | None) -> _Heads:
    if positions is None:
        return heads
    query, key = (apply_rotary_emb_qwen(tensor, positions, use_real=False) for tensor in heads[:2])
    return query, key, heads[2]


def _joint_mask(mask: torch.Tensor | None, image: torch.Tensor) -> torch.Tensor | None:
    """Mask of the keys `[batch, 1, 1, T + N]`, from that of the text."""
    if mask is None:
        return None
    everywhere = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
    return torch.cat([mask, everywhere], dim=1)[:, None, None, :]


BACKBONE = QwenImageBackbone()
