"""Wan 2.1 and 2.2: text-to-video, image-to-video, video-to-video, VACE, and the model with a timestep per token.

The video reads a text that no block updates, so that a concept is a key beside those of the text and has no state. An
image-to-video model reads the tokens of an image as well, apart from the text: maps are made of what is read from the
text. Where two transformers share the steps (2.2), both are traced. VACE's control blocks, which run before the
others, are no layers, and the latent frames of its reference images are left out of the maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from diffusers_concept_maps.backbones._base import CrossBackbone, Grid, Preset, Site
from diffusers_concept_maps.backbones._real import ClipShape, put_channels, transformer_of
from diffusers_concept_maps.heads import HeadSelection
from diffusers_concept_maps.processors._base import ConceptProcessor
from diffusers_concept_maps.processors.video import attend_video, dispatch, rotate_pairs
from diffusers_concept_maps.tokens import check_encoders, undisturbed, word_tokens

if TYPE_CHECKING:
    from diffusers_concept_maps.compiled import Relay
    from diffusers_concept_maps.listener import PassListener

_TEXT_LENGTH = 512
"""Text tokens that the models were trained with; whatever more their attention is given are tokens of an image."""

_IMAP_SCRIPTS = "layers and number of heads of the scripts published with IMAP (arXiv 2603.02919); all steps, as there"
_TEXT_TO_VIDEO = {"in_channels": 16, "image_dim": None, "vace_layers": None}

_FRAMES = 81


class WanBackbone(CrossBackbone):
    """The transformers with Wan's blocks and their pipelines.

    The presets are those published for text-to-video with Wan 2.1. The 14B one is also found for Wan 2.2, whose two
    transformers have the same config; other weights are not told apart.
    """

    transformer_classes: ClassVar[tuple[str, ...]] = ("WanTransformer3DModel", "WanVACETransformer3DModel")
    editable: ClassVar[bool] = True
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            name="Wan 1.3B",
            source=_IMAP_SCRIPTS,
            config={"num_layers": 30, "num_attention_heads": 12, **_TEXT_TO_VIDEO},
            layers={"imap": tuple(range(5, 20))},
            heads={"imap": HeadSelection(top_k=3)},
        ),
        Preset(
            name="Wan 14B",
            source=_IMAP_SCRIPTS,
            config={"num_layers": 40, "num_attention_heads": 40, **_TEXT_TO_VIDEO},
            layers={"imap": tuple(range(5, 26))},
            heads={"imap": HeadSelection(top_k=5)},
        ),
    )
    batched_guidance: ClassVar[bool] = False
    context_parallel: ClassVar[bool] = True

    def sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.sites`."""
        return [Site(block, block.attn2) for block in transformer.blocks]

    def matching_sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.matching_sites`."""
        return [Site(block, block.attn1) for block in transformer.blocks]

    def heads(self, transformer: Any) -> int:
        """See `Backbone.heads`."""
        return int(transformer.config.num_attention_heads)

    def text_width(self, transformer: Any) -> int:
        """See `Backbone.text_width`."""
        return int(transformer.config.text_dim)

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`; UMT5 runs with a mask, so that a concept needs no more tokens than it has."""
        check_encoders(pipe, "tokenizer", "text_encoder")
        limit = _TEXT_LENGTH if length is None else None
        counts = [word_tokens(pipe.tokenizer, self.clean(text), limit) for text in texts]
        length = length or max(counts) + 1
        with undisturbed(pipe.text_encoder):
            states, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=length)
        return states, [min(count, length - 1) for count in counts]

    def clean(self, prompt: str) -> str:
        """See `Backbone.clean`; mends encodings, and makes one blank of any white space."""
        return cast(str, prompt_clean(prompt))

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`; latents are `[batch, channel, frame, height, width]`."""
        _, _, frames, height, width = call["hidden_states"].shape
        frame, row, column = transformer.config.patch_size
        grid = Grid(frames // frame, height // row, width // column)
        references = _reference_frames(transformer, call) // frame
        return Grid(grid.frames - references, grid.height, grid.width, start=references * grid.height * grid.width)

    def timesteps(self, scheduled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `Backbone.timesteps`; a timestep for every token is a copy, in which given frames have zeros."""
        return scheduled.to(dtype)

    def geometry(self, transformer: Any) -> dict[str, int]:
        """See `Backbone.geometry`; all VAEs of the family have a temporal factor of 4."""
        return {"frames_per_latent": 4, "latents_per_token": int(transformer.config.patch_size[0])}

    def clip_shape(self, pipe: Any) -> ClipShape:
        """See `RealInput.clip_shape`; video-to-video takes as many frames as the video has."""
        shape = super().clip_shape(pipe)
        return shape if shape.frames > 1 else replace(shape, frames=_FRAMES)

    def insert(self, pipe: Any, call: Mapping[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        """See `RealInput.insert`; the reference images of VACE are latent frames in front of it."""
        references = _reference_frames(transformer_of(pipe), call)
        hidden = call["hidden_states"]
        put = put_channels(hidden[:, :, references:], latents, dim=1, given=self.given(pipe, call))
        return {"hidden_states": torch.cat([hidden[:, :, :references], put], dim=2)}

    def given(self, pipe: Any, call: Mapping[str, Any]) -> torch.Tensor | None:
        """See `RealInput.given`; where every token or frame has a timestep, given frames have another than noise."""
        steps: torch.Tensor = call["timestep"]
        if steps.ndim == 1:
            return None
        frames = int(call["hidden_states"].shape[2])
        others = (steps != steps.amax()).unflatten(1, (frames, -1))
        return cast(torch.Tensor, others[:, None, :, :1, None])

    def context(
        self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor, call: Mapping[str, Any], rows: slice
    ) -> torch.Tensor:
        """See `CrossBackbone.context`."""
        return cast(torch.Tensor, transformer.condition_embedder.text_embedder(embeds.to(like)))


def _reference_frames(transformer: Any, call: Mapping[str, Any]) -> int:
    """Number of latent frames in front of the video that VACE makes of reference images.

    Nothing but the control latents tells: their channels are the latents of what is kept, of what is to be replaced,
    and a mask, and the last two are zeros for a reference and for nothing else. The device waits for this.
    """
    control = call.get("control_hidden_states")
    if control is None:
        return 0
    replaced = control[:, transformer.config.in_channels :] != 0
    used = replaced.transpose(0, 2).flatten(1).any(1).tolist()
    return used.index(True) if True in used else 0


class WanConceptProcessor(ConceptProcessor):
    """Both attentions of Wan and its relatives, in the order of operations of their processors."""

    _attention_backend: Any = None
    _parallel_config: Any = None
    splits_video: ClassVar[bool] = False  # whether context parallelism applies to cross-attention

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Video `[batch, N, width]` reads `[image | text]` or, where there is none, itself."""
        recorder = self.listener(attn)
        if recorder is None:
            stock: Any = super()
            return cast(
                torch.Tensor,
                stock.__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb),
            )
        if encoder_hidden_states is None:
            return self._read_video(recorder, attn, hidden_states, attention_mask, rotary_emb)
        image, text = None, encoder_hidden_states
        if attn.add_k_proj is not None:
            count = text.shape[1] - _TEXT_LENGTH
            image, text = text[:, :count], text[:, count:]
        query, (key, value) = attn.to_q(hidden_states), _project(attn, text)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (_split_heads(attn, states) for states in (query, key, value))
        attend = partial(dispatch, self, splits=self.splits_video)
        states_image = None if image is None else attend(query, *_project_image(attn, image), None)
        output = attend(query, key, value, attention_mask).transpose(1, 2)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        whole = slice(0, None)
        output = self.amend(attn, (query, key, value), output, text=whole, image=whole, mask=attention_mask)
        states = output.transpose(1, 2).flatten(2, 3).type_as(query)
        if states_image is not None:
            states = states + states_image.flatten(2, 3).type_as(query)
        states = attn.to_out[1](attn.to_out[0](states))
        recorder.observe_crossing(attn, query, output, key, partial(self.project_key, attn))
        return cast(torch.Tensor, states)

    def project_key(self, attn: Any, text: torch.Tensor) -> torch.Tensor:
        """See `ConceptProcessor.project_key`."""
        return _project_key(attn, text)

    def _read_video(
        self,
        listener: PassListener[Any] | Relay,
        attn: Any,
        video: torch.Tensor,
        mask: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        query, key, value = _project_video(attn, video)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (_split_heads(attn, states) for states in (query, key, value))
        if rotary is not None:
            query, key = rotate_pairs(query, *rotary), rotate_pairs(key, *rotary)
        attend = partial(dispatch, self, mask=mask, splits=True)
        output = attend_video(listener, attn, (query, key, value), mask, attend)
        states = output.flatten(2, 3).type_as(query)
        return cast(torch.Tensor, attn.to_out[1](attn.to_out[0](states)))


class ConceptWanAttnProcessor(WanConceptProcessor, WanAttnProcessor):
    """Drop-in for `WanAttnProcessor`."""

    stock: ClassVar[type | None] = WanAttnProcessor


def _split_heads(attn: Any, states: torch.Tensor) -> torch.Tensor:
    """`[batch, token, width]` to `[batch, token, H, D]`."""
    return cast(torch.Tensor, states.unflatten(2, (attn.heads, -1)))


def _project_video(attn: Any, video: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value of video `[batch, token, width]`, without norms."""
    if attn.fused_projections:
        return cast("tuple[torch.Tensor, ...]", attn.to_qkv(video).chunk(3, dim=-1))
    return attn.to_q(video), attn.to_k(video), attn.to_v(video)


def _project(attn: Any, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value of text `[batch, token, width]`, without norm."""
    key, value = attn.to_kv(text).chunk(2, dim=-1) if attn.fused_projections else (attn.to_k(text), attn.to_v(text))
    return key, value


def _project_key(attn: Any, text: torch.Tensor) -> torch.Tensor:
    """Key of text `[batch, H, token, D]`."""
    key = attn.to_kv(text).chunk(2, dim=-1)[0] if attn.fused_projections else attn.to_k(text)
    return _split_heads(attn, attn.norm_k(key)).transpose(1, 2)


def _project_image(attn: Any, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value of the tokens of an image `[batch, token, H, D]`."""
    if attn.fused_projections:
        key, value = attn.to_added_kv(image).chunk(2, dim=-1)
    else:
        key, value = attn.add_k_proj(image), attn.add_v_proj(image)
    return _split_heads(attn, attn.norm_added_k(key)), _split_heads(attn, value)


BACKBONE = WanBackbone()
