"""FLUX.2: dev, klein, and klein with its references' keys and values kept from the first step on.

Joint attention over text and image, text first: blocks with projections of their own for text, then blocks with one
stream, whose attention and feed-forward share their linear layers. Concepts are carried through both; both are layers.
Text is the states of a language model in a chat, a concept those of its words there. Text has positions one after
another, and every concept has the first. Reference images stand beside the image that is made, and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
    Flux2ParallelSelfAttnProcessor,
)
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from diffusers_concept_maps.backbones._base import Grid, Preset
from diffusers_concept_maps.backbones._real import normalize_latents, posterior_mean
from diffusers_concept_maps.backbones.flux import (
    Attend,
    DispatchProcessor,
    FluxBackbone,
    Shown,
    StreamsProcessor,
    first_position,
    grid_of,
    turn_heads,
)
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.parity import Parity
from diffusers_concept_maps.tokens import (
    check_encoders,
    spans_inside,
    token_spans,
    tokenizer_of,
    undisturbed,
    word_tokens,
)

_NOBODYS = "\ue000"  # a character that is left to private use


class Flux2Backbone(FluxBackbone):
    """All pipelines around `Flux2Transformer2DModel`."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("Flux2Transformer2DModel",)
    parities: ClassVar[Mapping[str, Parity]] = {}
    prompt_arguments: ClassVar[tuple[str, ...]] = ("prompt",)
    context_parallel: ClassVar[bool] = False
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            name="FLUX.2-dev",
            source=(
                "default layers and steps of the pipeline published with ConceptAttention (arXiv 2502.04320): "
                "the last 30 % of the steps without the very last"
            ),
            config={"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48},
            layers={"concept_attention": (5, 6, 7)},
            steps=(0.7, 0.98),
        ),
    )

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`; every text is what the user says in a chat of its own, as prompts are."""
        check_encoders(pipe, "tokenizer", "text_encoder")
        length = length or 512
        rows = []
        for text in texts:
            word_tokens(tokenizer_of(pipe), text, None)
            spans = self.token_spans(pipe, text, length)
            if max(stop for _, stop in spans) < len(text):
                raise ConceptMapsValueError(
                    f"concept {text!r} does not fit into the {length} tokens of a chat; shorten it"
                )
            rows.append([row for row, (start, stop) in enumerate(spans) if start < stop])
        with undisturbed(pipe.text_encoder):
            states, _ = pipe.encode_prompt(texts, max_sequence_length=length)
        words = [state[own] for state, own in zip(states, rows, strict=True)]
        return pad_sequence(words, batch_first=True), [len(own) for own in rows]

    def token_spans(self, pipe: Any, prompt: str, length: int) -> list[tuple[int, int]]:
        """See `Backbone.token_spans`; the chat around the prompt covers none of it."""
        chat, tokenizer = _chat(pipe, prompt), tokenizer_of(pipe)
        # The chat may have the words of the prompt itself: they are looked for where another prompt begins.
        begin = _chat(pipe, _NOBODYS).find(_NOBODYS)
        if begin < 0 or not chat.startswith(prompt, begin):
            raise ConceptMapsError(
                f"the prompt {prompt!r} is changed by the chat template of {type(pipe).__name__}, so that its words "
                f"cannot be found; pass prompt_tokens={{word: positions}}"
            )
        marks = _adds_marks(pipe, chat)
        spans = token_spans(tokenizer, chat, length, padding="max_length", add_special_tokens=marks)
        return spans_inside(spans, begin, prompt)

    def image_latents(self, pipe: Any, images: torch.Tensor) -> torch.Tensor:
        """See `ImageInput.image_latents`; twos of latents are channels, which the VAE has a batch norm for."""
        vae, latents = pipe.vae, pipe._patchify_latents(posterior_mean(pipe.vae.encode(images)))
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        return normalize_latents(latents, vae.bn.running_mean, std)

    def pack(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        """See `FluxBackbone.pack`."""
        return cast(torch.Tensor, pipe._pack_latents(latents))

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`; kept references are in front of the image, others behind it."""
        mode = call.get("kv_cache_mode")
        if mode == "cached":  # references are no tokens of the call, but shown as such
            return replace(grid_of(call["img_ids"]), start=call["kv_cache"].num_ref_tokens)
        return grid_of(call["img_ids"], call["num_ref_tokens"] if mode == "extract" else 0)

    def unpooled(self, transformer: Any, arguments: Mapping[str, Any], call: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `JointBackbone.unpooled`; there is no pooled vector."""
        return arguments

    def reentry(
        self, block: nn.Module, arguments: Mapping[str, Any], concepts: torch.Tensor, rows: slice
    ) -> dict[str, Any]:
        """See `JointBackbone.reentry`; concepts have the position of the first text token."""
        rotary = first_position(arguments["image_rotary_emb"])
        batch = arguments["hidden_states"].shape[0]
        if "temb_mod" in arguments:
            modulation = arguments["temb_mod"]
            if modulation.ndim == 3:  # every token has its own where references are kept: text is in front
                modulation = modulation[:, 0]
            return {
                "hidden_states": concepts,
                "encoder_hidden_states": None,
                "temb_mod": modulation.expand(batch, -1)[rows],
                "image_rotary_emb": rotary,
            }
        modulation = arguments["temb_mod_txt"].expand(batch, -1)[rows]
        return {
            "hidden_states": concepts.new_empty(concepts.shape[0], 0, concepts.shape[2]),
            "encoder_hidden_states": concepts,
            "temb_mod_img": modulation,  # of an image that is empty
            "temb_mod_txt": modulation,
            "image_rotary_emb": rotary,
        }


def _chat(pipe: Any, prompt: str) -> str:
    """The chat whose states are the text of a prompt."""
    if hasattr(pipe, "system_message"):  # dev's
        chats = pipe.tokenizer.apply_chat_template(
            format_input([prompt], pipe.system_message), add_generation_prompt=False, tokenize=False
        )
        return str(chats[0])
    said = [{"role": "user", "content": prompt}]
    chat = pipe.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return str(chat)


def _adds_marks(pipe: Any, chat: str) -> bool:
    """Whether the tokenizer is to add marks to a chat."""
    if not hasattr(pipe, "system_message"):
        return True  # the pipeline hands the chat to its tokenizer as any text
    tokenizer = tokenizer_of(pipe)
    return tokenizer is not pipe.tokenizer and not (tokenizer.bos_token and chat.startswith(tokenizer.bos_token))


@dataclass(frozen=True)
class _References:
    """Keys and values of reference images, which the first step keeps for the others.

    Attributes:
        cache: of the layer.
        mode: "extract" in the first step, whose image stream begins with the references; "cached" in the others.
        count: number of tokens.
    """

    cache: Any
    mode: str | None
    count: int

    def attend(self, processor: DispatchProcessor, mask: torch.Tensor | None) -> Attend:
        """Attention in which references see themselves alone, and are seen by all; they are shown in both modes."""
        backend = processor._attention_backend
        if self.mode == "extract" and self.count > 0:
            return partial(self._extract, backend)
        if self.mode == "cached" and self.cache is not None:
            return partial(self._recall, backend)
        return processor.attend(mask)

    def _extract(self, backend: Any, heads: list[torch.Tensor], text: int) -> tuple[torch.Tensor, Shown]:
        parts = [text, self.count, heads[0].shape[1] - text - self.count]
        queries, keys, values = (tensor.split(parts, dim=1) for tensor in heads)
        if self.cache is not None:
            self.cache.store(keys[1].clone(), values[1].clone())
        whole = (torch.cat(tensors, dim=1) for tensors in (keys, values))
        seeing = dispatch_attention_fn(torch.cat([queries[0], queries[2]], dim=1), *whole, backend=backend)
        apart = dispatch_attention_fn(queries[1], keys[1], values[1], backend=backend)
        output = torch.cat([seeing[:, :text], apart, seeing[:, text:]], dim=1)
        return output, (*heads, output)

    def _recall(self, backend: Any, heads: list[torch.Tensor], text: int) -> tuple[torch.Tensor, Shown]:
        query, kept = heads[0], self.cache.get()
        key, value = (_insert(tensor, own, text) for tensor, own in zip(heads[1:], kept, strict=True))
        output = dispatch_attention_fn(query, key, value, backend=backend)
        nothing = torch.zeros_like(kept[0])  # references ask nothing now
        return output, (_insert(query, nothing, text), key, value, _insert(output, nothing, text))


def _insert(states: torch.Tensor, between: torch.Tensor, place: int) -> torch.Tensor:
    return torch.cat([states[:, :place], between, states[:, place:]], dim=1)


class _Flux2Streams(StreamsProcessor):
    def finish(self, attn: Any, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `StreamsProcessor.finish`; text is first here."""
        text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text


class ConceptFlux2AttnProcessor(_Flux2Streams, Flux2AttnProcessor):
    """Drop-in for `Flux2AttnProcessor`, in its order of operations; also after `fuse_qkv_projections`."""

    stock: ClassVar[type | None] = Flux2AttnProcessor


class ConceptFlux2KVAttnProcessor(_Flux2Streams, Flux2KVAttnProcessor):
    """Drop-in for `Flux2KVAttnProcessor`, likewise."""

    stock: ClassVar[type | None] = Flux2KVAttnProcessor

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
        num_ref_tokens: int = 0,
    ) -> Any:
        """See `StreamsProcessor`."""
        if self.recorder is None or not self.recorder.records(attn):
            return Flux2KVAttnProcessor.__call__(
                self,
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                image_rotary_emb,
                kv_cache,
                kv_cache_mode,
                num_ref_tokens,
            )
        attend = _References(kv_cache, kv_cache_mode, num_ref_tokens).attend(self, attention_mask)
        return self.trace(attn, hidden_states, encoder_hidden_states, image_rotary_emb, attend)


class _ParallelProcessor(DispatchProcessor):
    """Attention over `[text | image]` as one stream, which shares its linear layers with a feed-forward."""

    def trace(
        self,
        attn: Any,
        joint: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        attend: Attend,
    ) -> torch.Tensor:
        """A call that is recorded, or the nested one of the concepts."""
        assert self.recorder is not None  # it records
        projected = attn.to_qkv_mlp_proj(joint)
        width = 3 * attn.inner_dim
        # By their ratio, as tensor parallelism leaves only a part of both.
        local = projected.shape[-1] * width // (width + attn.mlp_hidden_dim * attn.mlp_mult_factor)
        attending, feeding = torch.split(projected, [local, projected.shape[-1] - local], dim=-1)
        query, key, value = (tensor.unflatten(-1, (-1, attn.head_dim)) for tensor in attending.chunk(3, dim=-1))
        heads = turn_heads([attn.norm_q(query), attn.norm_k(key), value], rotary)
        if self.recorder.answering:
            return _finish_parallel(attn, self.answer(heads), feeding)
        count = self.recorder.text_tokens(attn)
        output, shown = attend(heads, count)
        result = _finish_parallel(attn, output.flatten(2, 3).to(heads[0].dtype), feeding)
        self.show(attn, shown, count)
        return result


def _finish_parallel(attn: Any, states: torch.Tensor, feeding: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, attn.to_out(torch.cat([states, attn.mlp_act_fn(feeding)], dim=-1)))


class ConceptFlux2ParallelSelfAttnProcessor(_ParallelProcessor, Flux2ParallelSelfAttnProcessor):
    """Drop-in for `Flux2ParallelSelfAttnProcessor`, in its order of operations."""

    stock: ClassVar[type | None] = Flux2ParallelSelfAttnProcessor

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        """Text and image as one `[batch, T + N, width]` in, the same out."""
        if self.recorder is None or not self.recorder.records(attn):
            return Flux2ParallelSelfAttnProcessor.__call__(self, attn, hidden_states, attention_mask, image_rotary_emb)
        return self.trace(attn, hidden_states, image_rotary_emb, self.attend(attention_mask))


class ConceptFlux2KVParallelSelfAttnProcessor(_ParallelProcessor, Flux2KVParallelSelfAttnProcessor):
    """Drop-in for `Flux2KVParallelSelfAttnProcessor`, likewise."""

    stock: ClassVar[type | None] = Flux2KVParallelSelfAttnProcessor

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
        num_txt_tokens: int = 0,
        num_ref_tokens: int = 0,
    ) -> Any:
        """Text and image as one `[batch, T + N, width]` in, the same out."""
        if self.recorder is None or not self.recorder.records(attn):
            return Flux2KVParallelSelfAttnProcessor.__call__(
                self,
                attn,
                hidden_states,
                attention_mask,
                image_rotary_emb,
                kv_cache,
                kv_cache_mode,
                num_txt_tokens,
                num_ref_tokens,
            )
        attend = _References(kv_cache, kv_cache_mode, num_ref_tokens).attend(self, attention_mask)
        return self.trace(attn, hidden_states, image_rotary_emb, attend)


BACKBONE = Flux2Backbone()
