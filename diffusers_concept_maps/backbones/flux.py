"""FLUX.1 in all its checkpoints: dev, schnell, Krea, Kontext, Fill, Canny and Depth, with or without a ControlNet.

Joint attention over text and image, text first: blocks with projections of their own for text, then blocks with shared
ones, in which attention and feed-forward run side by side. Concepts are carried through both; both are layers. Text is
T5's and has position zero; the pooled vector of CLIP modulates it, and the concepts likewise. The reference image of
Kontext is behind the image that is made, and left out of the maps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import nn

from diffusers_concept_maps.backbones._base import Grid, JointBackbone, Preset, Site
from diffusers_concept_maps.backbones._real import ImageInput, only_frame, put_tokens
from diffusers_concept_maps.parity import CONCEPT_ATTENTION, FLUX_CONCEPT_ATTENTION, Parity
from diffusers_concept_maps.processors._base import ConceptProcessor
from diffusers_concept_maps.tokens import check_encoders, token_spans, undisturbed, word_tokens

_SIZE = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "in_channels": 64}
_LAYERS = {"concept_attention": (15, 16, 17, 18)}
_PUBLISHED = "default layers of the pipeline published with ConceptAttention (arXiv 2502.04320); all steps, as there"


class FluxBackbone(ImageInput, JointBackbone):
    """All pipelines around `FluxTransformer2DModel`.

    The preset of dev is that of Krea and Kontext as well, which have the same config.
    """

    transformer_classes: ClassVar[tuple[str, ...]] = ("FluxTransformer2DModel",)
    batched_guidance: ClassVar[bool] = False
    context_parallel: ClassVar[bool] = True
    parities: ClassVar[Mapping[str, Parity]] = {CONCEPT_ATTENTION.name: FLUX_CONCEPT_ATTENTION}
    prompt_arguments: ClassVar[tuple[str, ...]] = ("prompt_2", "prompt")
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(name="FLUX.1-dev", source=_PUBLISHED, config={**_SIZE, "guidance_embeds": True}, layers=_LAYERS),
        Preset(name="FLUX.1-schnell", source=_PUBLISHED, config={**_SIZE, "guidance_embeds": False}, layers=_LAYERS),
    )

    def sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.sites`."""
        blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
        return [Site(block, block.attn) for block in blocks]

    def heads(self, transformer: Any) -> int:
        """See `Backbone.heads`."""
        return int(transformer.config.num_attention_heads)

    def text_width(self, transformer: Any) -> int:
        """See `Backbone.text_width`."""
        return int(transformer.config.joint_attention_dim)

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`.

        T5 runs without a mask in these pipelines, so that padding shapes every state: concepts are padded to the
        length that the checkpoint was trained with, as prompts are.
        """
        check_encoders(pipe, "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
        length = length or (512 if pipe.transformer.config.guidance_embeds else 256)
        counts = [word_tokens(pipe.tokenizer_2, text, length) for text in texts]
        with undisturbed(pipe.text_encoder, pipe.text_encoder_2):
            states, *_ = pipe.encode_prompt(texts, None, max_sequence_length=length)
        return states, counts

    def token_spans(self, pipe: Any, prompt: str, length: int) -> list[tuple[int, int]]:
        """See `Backbone.token_spans`; the tokens of T5."""
        return token_spans(pipe.tokenizer_2, prompt, length)

    def timesteps(self, scheduled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `Backbone.timesteps`."""
        return scheduled.to(dtype) / 1000

    def insert(self, pipe: Any, call: Mapping[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        """See `RealInput.insert`; control images are channels behind its own, reference images tokens behind them."""
        own = self.grid(pipe.transformer, call).tokens
        return {"hidden_states": put_tokens(call["hidden_states"], self.pack(pipe, only_frame(latents)), own)}

    def pack(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        """Latents `[batch, channel, height, width]` as the pipeline makes tokens of them."""
        return cast(torch.Tensor, pipe._pack_latents(latents, *latents.shape))

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`.

        Latents are packed, and only the positions of the tokens tell their rows: for these a device waits.
        """
        return grid_of(call["img_ids"])

    def enter(
        self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor, call: Mapping[str, Any], rows: slice
    ) -> torch.Tensor:
        """See `JointBackbone.enter`."""
        return cast(torch.Tensor, transformer.context_embedder(embeds.to(like)))

    def unpooled(self, transformer: Any, arguments: Mapping[str, Any], call: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `JointBackbone.unpooled`."""
        given = [call["timestep"], call.get("guidance")]
        scaled = [value.to(arguments["hidden_states"].dtype) * 1000 for value in given if value is not None]
        pooled = torch.zeros_like(call["pooled_projections"])
        return {**arguments, "temb": transformer.time_text_embed(*scaled, pooled)}

    def reentry(
        self, block: nn.Module, arguments: Mapping[str, Any], concepts: torch.Tensor, rows: slice
    ) -> dict[str, Any]:
        """See `JointBackbone.reentry`; concepts have the position of the first text token."""
        batch = arguments["hidden_states"].shape[0]
        return {
            "hidden_states": concepts.new_empty(concepts.shape[0], 0, concepts.shape[2]),
            "encoder_hidden_states": concepts,
            "temb": arguments["temb"].expand(batch, -1)[rows],
            "image_rotary_emb": first_position(arguments["image_rotary_emb"]),
        }

    def text_tokens(self, block: nn.Module, arguments: Mapping[str, Any], call: Mapping[str, Any]) -> int:
        """See `JointBackbone.text_tokens`; a block that is handed text may have a part of it (context parallelism)."""
        text = arguments.get("encoder_hidden_states")
        return super().text_tokens(block, arguments, call) if text is None else int(text.shape[1])

    def leave(self, block: nn.Module, block_output: Any) -> torch.Tensor:
        """See `JointBackbone.leave`; a block returns text, then image, or both as one."""
        return cast(torch.Tensor, block_output if isinstance(block_output, torch.Tensor) else block_output[0])


def grid_of(ids: torch.Tensor, start: int = 0) -> Grid:
    """The grid whose tokens, from `start` on, have positions of the same image.

    Args:
        ids: positions of the image tokens `[token, axis]` or `[batch, token, axis]`: image, row, column.
        start: tokens in front of it.
    """
    image, row = (ids if ids.ndim == 2 else ids[0])[start:, :2].unbind(-1)
    own = image == image[0]
    # Counted: half precision has large positions rounded, but not the first two rows.
    count, width = torch.stack([own.sum(), (own & (row == row[0])).sum()]).tolist()
    return Grid(1, count // width, width, start)


def first_position(rotary: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary embedding `[1, D]` of the first text token, which stands for that of every concept."""
    cos, sin = rotary
    return cos[:1], sin[:1]


Shown = tuple[torch.Tensor, ...]
"""Query, key, value and output of text and image `[batch, token, head, width]`."""

Attend = Callable[[list[torch.Tensor], int], tuple[torch.Tensor, Shown]]
"""From query, key and value, and the number of text tokens in front, to the output and to what the call shows."""


class DispatchProcessor(ConceptProcessor):
    """Drop-in for attention through the host's dispatcher, with heads `[batch, token, head, width]`."""

    _attention_backend: Any
    _parallel_config: Any

    def attend(self, mask: torch.Tensor | None) -> Attend:
        """Attention over all tokens, by the user's backend."""

        def attend(heads: list[torch.Tensor], text: int) -> tuple[torch.Tensor, Shown]:
            output = dispatch_attention_fn(
                *heads, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
            )
            return output, (*heads, output)

        return attend

    def answer(self, heads: list[torch.Tensor]) -> torch.Tensor:
        """Attention output of concepts `[row, concept, width]`, from their query, key and value."""
        assert self.recorder is not None  # it is answering
        output = self.recorder.answer(*(tensor.transpose(1, 2) for tensor in heads))
        return output.transpose(1, 2).flatten(2, 3)

    def show(self, attn: Any, shown: Shown, text: int) -> None:
        """Let the capture observe the call."""
        assert self.recorder is not None  # it records
        heads = (tensor.transpose(1, 2) for tensor in shown)
        self.recorder.observe(attn, *heads, text=slice(0, text), image=slice(text, None))


class StreamsProcessor(DispatchProcessor):
    """Drop-in for attention over `[text | image]`, fused or not, as two streams or as one."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        """Image `[batch, N, width]` and text `[batch, T, width]` in, the same out; without text, both as one."""
        if self.recorder is None or not self.recorder.records(attn):
            stock: Any = super()
            return stock.__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        attend = self.attend(attention_mask)
        return self.trace(attn, hidden_states, encoder_hidden_states, image_rotary_emb, attend)

    def trace(
        self,
        attn: Any,
        image: torch.Tensor,
        text: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        attend: Attend,
    ) -> Any:
        """A call that is recorded, or the nested one of the concepts."""
        assert self.recorder is not None  # it records
        if self.recorder.answering:
            own = _norm(attn, _project(attn, image)) if text is None else _norm_text(attn, _project_text(attn, text))
            states = self.answer(turn_heads(own, rotary))
            return states if text is None else (image, attn.to_add_out(states))
        of_image, of_text = _project(attn, image), None if text is None else _project_text(attn, text)
        joint = _norm(attn, of_image)
        if of_text is not None:
            joint = [torch.cat(pair, dim=1) for pair in zip(_norm_text(attn, of_text), joint, strict=True)]
        heads = turn_heads(joint, rotary)
        count = self.recorder.text_tokens(attn) if text is None else text.shape[1]
        output, shown = attend(heads, count)
        states = output.flatten(2, 3).to(heads[0].dtype)
        result = states if text is None else self.finish(attn, states[:, count:], states[:, :count])
        self.show(attn, shown, count)
        return result

    def finish(self, attn: Any, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output projections of image and text, which are parts of one tensor, in the stock memory layout."""
        image, text = image.contiguous(), text.contiguous()
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


class ConceptFluxAttnProcessor(StreamsProcessor, FluxAttnProcessor):
    """Drop-in for `FluxAttnProcessor`, in its order of operations; also after `fuse_qkv_projections`."""

    stock: ClassVar[type | None] = FluxAttnProcessor


class ConceptFluxIPAdapterAttnProcessor(StreamsProcessor, FluxIPAdapterAttnProcessor):
    """Drop-in for `FluxIPAdapterAttnProcessor`, in whose blocks the image reads another image as well."""

    stock: ClassVar[type | None] = FluxIPAdapterAttnProcessor

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        ip_hidden_states: list[torch.Tensor] | None = None,
        ip_adapter_masks: torch.Tensor | None = None,
    ) -> Any:
        """As `StreamsProcessor`, with what the image has read of the other one as a third result."""
        recorder, given = self.recorder, (hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if recorder is None or not recorder.records(attn):
            return FluxIPAdapterAttnProcessor.__call__(self, attn, *given, ip_hidden_states, ip_adapter_masks)
        result = super().__call__(attn, *given)
        if recorder.answering:
            return result
        assert ip_hidden_states is not None  # the host asks for it
        return *result, self._read(attn, hidden_states, ip_hidden_states)

    def _read(self, attn: Any, image: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
        """Attention of the image, without positions, to the tokens of every adapter `[batch, token, width]`."""
        query, _, _ = _norm(attn, _project(attn, image))
        total = torch.zeros_like(image)
        for other, scale, to_key, to_value in zip(others, self.scale, self.to_k_ip, self.to_v_ip, strict=False):
            shape = (image.shape[0], -1, attn.heads, attn.head_dim)
            output, _ = self.attend(None)([query, to_key(other).view(shape), to_value(other).view(shape)], 0)
            total += scale * output.reshape(image.shape[0], -1, attn.heads * attn.head_dim).to(query.dtype)
        return total


def _project(attn: Any, states: torch.Tensor) -> list[torch.Tensor]:
    """Query, key and value of the image, or of everything in a block with one stream."""
    if attn.fused_projections:
        projected = attn.to_qkv(states).chunk(3, dim=-1)
    else:
        projected = (attn.to_q(states), attn.to_k(states), attn.to_v(states))
    return [tensor.unflatten(-1, (-1, attn.head_dim)) for tensor in projected]


def _project_text(attn: Any, states: torch.Tensor) -> list[torch.Tensor]:
    """Query, key and value of a text stream."""
    if attn.fused_projections:
        projected = attn.to_added_qkv(states).chunk(3, dim=-1)
    else:
        projected = (attn.add_q_proj(states), attn.add_k_proj(states), attn.add_v_proj(states))
    return [tensor.unflatten(-1, (-1, attn.head_dim)) for tensor in projected]


def _norm(attn: Any, heads: list[torch.Tensor]) -> list[torch.Tensor]:
    query, key, value = heads
    return [attn.norm_q(query), attn.norm_k(key), value]


def _norm_text(attn: Any, heads: list[torch.Tensor]) -> list[torch.Tensor]:
    query, key, value = heads
    return [attn.norm_added_q(query), attn.norm_added_k(key), value]


def turn_heads(heads: list[torch.Tensor], rotary: tuple[torch.Tensor, torch.Tensor] | None) -> list[torch.Tensor]:
    """Query, key and value with the rotary embedding in the first two."""
    if rotary is None:
        return heads
    query, key, value = heads
    return [apply_rotary_emb(tensor, rotary, sequence_dim=1) for tensor in (query, key)] + [value]


BACKBONE = FluxBackbone()
