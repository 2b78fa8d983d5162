"""Kandinsky 5: video from text or an image, and images, by one class of transformer.

The video reads a text that its blocks do not update. Before them text blocks do, by self-attention with positions and
the timestep: every concept goes through these in every step, as a text of its own at the first position, so that
concepts see neither the prompt nor one another. Sparse models take the tokens of a frame in squares of eight by eight;
maps are put in order again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from inspect import signature
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5AttnProcessor, nablaT_v2
from diffusers.pipelines.kandinsky5.pipeline_kandinsky import prompt_clean
from torch.nn.utils.rnn import pad_sequence

from diffusers_concept_maps.backbones._base import CrossBackbone, Grid, Site, unpatched
from diffusers_concept_maps.backbones._real import (
    ClipShape,
    by_frame,
    default_shape,
    posterior_mean,
    put_channels,
    scale_latents,
)
from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.processors._base import ConceptProcessor
from diffusers_concept_maps.processors.video import attend_video, dispatch
from diffusers_concept_maps.tokens import (
    check_encoders,
    spans_inside,
    token_spans,
    tokenizer_of,
    undisturbed,
    word_tokens,
)

if TYPE_CHECKING:
    from diffusers_concept_maps.compiled import Relay
    from diffusers_concept_maps.listener import PassListener

_TEXT_LENGTH = 512
"""Text tokens that the pipelines take where they are told no other number."""

_SQUARE = 8


class _AnySize(list[tuple[int, int]]):
    """Sizes of images, none of which is unlike them."""

    def __contains__(self, size: object) -> bool:
        return True


class Kandinsky5Backbone(CrossBackbone):
    """Kandinsky 5 Lite and Pro; nothing is published on which of their layers or heads to use."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("Kandinsky5Transformer3DModel",)
    editable: ClassVar[bool] = True
    batched_guidance: ClassVar[bool] = False

    def sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.sites`."""
        return [Site(block, block.cross_attention) for block in transformer.visual_transformer_blocks]

    def matching_sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.matching_sites`."""
        return [Site(block, block.self_attention) for block in transformer.visual_transformer_blocks]

    def heads(self, transformer: Any) -> int:
        """See `Backbone.heads`."""
        return int(transformer.config.model_dim // sum(transformer.config.axes_dims))

    def text_width(self, transformer: Any) -> int:
        """See `Backbone.text_width`."""
        return int(transformer.config.in_text_dim)

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`.

        The states are those that Qwen has behind the words of the pipeline's template. It runs without a mask, so
        that texts are encoded one by one, without padding.
        """
        check_encoders(pipe, "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
        if "image" in signature(pipe.encode_prompt).parameters:
            raise ConceptMapsError(
                f"{type(pipe).__name__} encodes a text together with an image, which concepts do not have; pass "
                f"concept_embeds instead"
            )
        limit = _TEXT_LENGTH if length is None else None
        length = length or _TEXT_LENGTH
        counts = [word_tokens(tokenizer_of(pipe), self.clean(text), limit) for text in texts]
        with undisturbed(pipe.text_encoder, pipe.text_encoder_2):
            states = [pipe.encode_prompt([text], max_sequence_length=length)[0][0] for text in texts]
        counts = [min(count, state.shape[0]) for count, state in zip(counts, states, strict=True)]
        return pad_sequence(states, batch_first=True), counts

    def clean(self, prompt: str) -> str:
        """See `Backbone.clean`; mends encodings, and makes one blank of any white space."""
        return cast(str, prompt_clean(prompt))

    def token_spans(self, pipe: Any, prompt: str, length: int) -> list[tuple[int, int]]:
        """See `Backbone.token_spans`; the prompt stands in a template, whose first tokens are cut off."""
        cut, before = int(pipe.prompt_template_encode_start_idx), pipe.prompt_template.index("{}")
        spans = token_spans(tokenizer_of(pipe), pipe.prompt_template.format(prompt), cut + length)[cut:]
        return spans_inside(spans, before, prompt)

    def image(self, call: Mapping[str, Any]) -> torch.Tensor:
        """See `Backbone.image`; a block has another name for it."""
        return cast(torch.Tensor, call["visual_embed"] if "visual_embed" in call else call["hidden_states"])

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`; latents are `[batch, frame, height, width, channel]`."""
        _, frames, height, width, _ = call["hidden_states"].shape
        frame, row, column = transformer.config.patch_size
        sparse = call.get("sparse_params")
        square = _SQUARE if sparse is not None and sparse["to_fractal"] else 1
        return Grid(frames // frame, height // row, width // column, square=square)

    def clip_shape(self, pipe: Any) -> ClipShape:
        """See `RealInput.clip_shape`; some pipelines make images, and sparse models take tokens by squares."""
        config, step = pipe.transformer.config, int(getattr(pipe, "vae_scale_factor_temporal", 1))
        square = _SQUARE if config.attention_type == "nabla" else 1
        multiple = int(pipe.vae_scale_factor_spatial) * int(config.patch_size[-1]) * square
        sizes = getattr(pipe, "resolutions", None)
        return default_shape(pipe, multiple, step, **({"area": prod(sizes[0])} if sizes else {}))

    def prepare(self, pipe: Any) -> None:
        """See `RealInput.prepare`; images are brought to sizes of a list."""
        if hasattr(pipe, "resolutions"):
            pipe.resolutions = _AnySize(pipe.resolutions)

    def latents(self, pipe: Any, clip: torch.Tensor) -> torch.Tensor:
        """See `RealInput.latents`; a VAE is one of videos or of images."""
        if "num_frames" in signature(type(pipe).__call__).parameters:
            return super().latents(pipe, clip)
        return by_frame(lambda images: scale_latents(pipe.vae, posterior_mean(pipe.vae.encode(images))), clip)

    def insert(self, pipe: Any, call: Mapping[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        """See `RealInput.insert`; channels are last, and what an image is started from follows a frame's own."""
        hidden, given = call["hidden_states"], self.given(pipe, call)
        return {"hidden_states": put_channels(hidden, latents.movedim(1, -1), dim=4, given=given)}

    def given(self, pipe: Any, call: Mapping[str, Any]) -> torch.Tensor | None:
        """See `RealInput.given`; image-to-video has the image in place of the first latent frame."""
        if not {"image", "num_frames"} <= signature(type(pipe).__call__).parameters.keys():
            return None
        hidden = call["hidden_states"]
        return (torch.arange(hidden.shape[1], device=hidden.device) == 0).view(1, -1, 1, 1, 1)

    def timesteps(self, scheduled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `Backbone.timesteps`; rounded to the dtype of the latents."""
        return scheduled.to(dtype)

    def passes(self, pipe: Any) -> int:
        """See `Backbone.passes`; the guidance scale alone decides."""
        return 2 if pipe.guidance_scale > 1 else 1

    def geometry(self, transformer: Any) -> dict[str, int]:
        """See `Backbone.geometry`; the VAE is that of HunyuanVideo, with a temporal factor of 4."""
        return {"frames_per_latent": 4, "latents_per_token": int(transformer.config.patch_size[0])}

    def context(
        self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor, call: Mapping[str, Any], rows: slice
    ) -> torch.Tensor:
        """See `CrossBackbone.context`."""
        count = embeds.shape[1]
        text = transformer.text_embeddings(embeds.to(like)).flatten(0, 1)[:, None]
        time = transformer.time_embeddings(call["timestep"])
        time = time + transformer.pooled_text_embeddings(call["pooled_projections"])
        time = time[rows].repeat_interleave(count, 0)
        rotary = transformer.text_rope_embeddings(call["text_rope_pos"][:1])[None]
        blocks = transformer.text_transformer_blocks
        with unpatched([block.self_attention for block in blocks]):
            for block in blocks:
                text = block(text, time, rotary)
        return cast(torch.Tensor, text[:, 0].unflatten(0, (-1, count)))


class ConceptKandinsky5AttnProcessor(ConceptProcessor, Kandinsky5AttnProcessor):
    """Drop-in for `Kandinsky5AttnProcessor`, in its order of operations."""

    stock: ClassVar[type | None] = Kandinsky5AttnProcessor

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        rotary_emb: torch.Tensor | None = None,
        sparse_params: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Video `[batch, N, width]` reads text `[batch, T, width]` or, where there is none, itself."""
        recorder = self.listener(attn)
        if recorder is None:
            stock: Any = super()
            return cast(
                torch.Tensor,
                stock.__call__(attn, hidden_states, encoder_hidden_states, rotary_emb, sparse_params),
            )
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = _split_heads(attn, attn.to_query(hidden_states))
        key, value = _split_heads(attn, attn.to_key(context)), _split_heads(attn, attn.to_value(context))
        query, key = _norm(attn.query_norm, query), _norm(attn.key_norm, key)
        if encoder_hidden_states is None:
            query, key = (states if rotary_emb is None else _rotate(states, rotary_emb) for states in (query, key))
            blocks = None if sparse_params is None else _sparse_mask(recorder, query, key, sparse_params)
            attend = partial(dispatch, self, mask=blocks)
            output = attend_video(recorder, attn, (query, key, value), None, attend)
            return cast(torch.Tensor, attn.out_layer(output.flatten(-2, -1)))
        output = dispatch(self, query, key, value, None)  # of text it is dense, without positions
        query, output, key, value = (tensor.transpose(1, 2) for tensor in (query, output, key, value))
        whole = slice(0, None)
        output = self.amend(attn, (query, key, value), output, text=whole, image=whole)
        states = attn.out_layer(output.transpose(1, 2).flatten(-2, -1))
        recorder.observe_crossing(attn, query, output, key, partial(self.project_key, attn))
        return cast(torch.Tensor, states)

    def project_key(self, attn: Any, text: torch.Tensor) -> torch.Tensor:
        """See `ConceptProcessor.project_key`."""
        return _norm(attn.key_norm, _split_heads(attn, attn.to_key(text))).transpose(1, 2)


def _split_heads(attn: Any, states: torch.Tensor) -> torch.Tensor:
    """`[batch, token, width]` to `[batch, token, H, D]`."""
    return states.reshape(*states.shape[:-1], attn.num_heads, -1)


def _norm(norm: Any, states: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, norm(states.float()).type_as(states))


def _rotate(states: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Neighboring channels of `[batch, S, H, D]`, turned by matrices `[batch, S, 1, D / 2, 2, 2]`.

    The host rounds them to bfloat16, whatever they were.
    """
    turned: torch.Tensor = (rotary * states.unflatten(-1, (-1, 1, 2)).to(torch.float32)).sum(dim=-1)
    return turned.flatten(-2).to(torch.bfloat16).type_as(states)


def _sparse_mask(
    listener: PassListener[Any] | Relay, query: torch.Tensor, key: torch.Tensor, sparse: Mapping[str, Any]
) -> Any:
    """The blocks of tokens that see one another, which the host takes from means of queries and keys.

    Raises:
        ConceptMapsError: the attention is to be replaced, which goes with a mask of tokens alone.
    """
    if listener.restricts:
        raise ConceptMapsError(
            "this Kandinsky 5 has sparse attention, whose pattern is made anew in every layer and is too large as a "
            "mask of tokens, so that guidance cannot replace it; use a checkpoint with dense attention"
        )
    return nablaT_v2(query, key, sparse["sta_mask"], thr=sparse["P"])


BACKBONE = Kandinsky5Backbone()
