"""HunyuanVideo text-to-video, its image-to-video variants (frame or channel conditioning) and SkyReels-V1.

Joint attention over video and text, video first: dual-stream blocks with projections of their own for text, then
single-stream blocks that share all weights. Concepts are carried through both kinds. Text has no position. A token
refiner that depends on the timestep makes the text states anew in every step; there every concept is a sequence of its
own. Padding of the prompt is hidden by a key mask, which concepts have no part in. Given first frames are part of the
grid. Guidance is distilled (one pass per step) or true (a second, unconditional pass).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from PIL import Image
from torch import nn

from diffusers_concept_maps.backbones._base import Grid, JointBackbone, Preset, Site, unpatched
from diffusers_concept_maps.heads import HeadSelection
from diffusers_concept_maps.processors._base import ConceptProcessor
from diffusers_concept_maps.tokens import check_encoders, spans_inside, token_spans, undisturbed, word_tokens

_FRAMES_PER_LATENT = 4
_ASSISTANT_MARKS = 4
"""Tokens behind the prompt that the image-to-video pipeline takes out of its text."""


class HunyuanVideoBackbone(JointBackbone):
    """All transformers with HunyuanVideo blocks whose video stream is the grid alone.

    The preset is for text-to-video alone: the image-to-video transformers have other weights, and nothing is published
    for them. Concepts in single-stream blocks are what no published code does; its layers are the dual-stream ones.
    """

    transformer_classes: ClassVar[tuple[str, ...]] = ("HunyuanVideoTransformer3DModel",)
    editable: ClassVar[bool] = True
    batched_guidance: ClassVar[bool] = False
    presets: ClassVar[tuple[Preset, ...]] = (
        Preset(
            name="HunyuanVideo",
            source=(
                "motion layers and top-5 heads of the scripts published with IMAP (arXiv 2603.02919), and their "
                "layers for the other maps, all that have two streams; all steps, as there; layer of matching of "
                "those published with DiffTrack (arXiv 2506.17220), the last of whose 30 steps is about this level"
            ),
            config={
                "num_layers": 20,
                "num_single_layers": 40,
                "num_attention_heads": 24,
                "in_channels": 16,
                "image_condition_type": None,
            },
            layers={
                **dict.fromkeys(("concept_attention", "cross_attention", "gramcol"), tuple(range(20))),
                "imap": (1, 2, 4, 5, 6, 9, 10, 13, *range(15, 20)),
            },
            heads={"imap": HeadSelection(top_k=5)},
            matching=(16, 0.19),
        ),
    )

    def sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.sites`; the dual-stream blocks, then the single-stream ones."""
        blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
        return [Site(block, block.attn) for block in blocks]

    def heads(self, transformer: Any) -> int:
        """See `Backbone.heads`."""
        return int(transformer.config.num_attention_heads)

    def text_width(self, transformer: Any) -> int:
        """See `Backbone.text_width`."""
        return int(transformer.config.text_embed_dim)

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`; states of LLaMA within the pipeline's own prompt template.

        Where that has an image, the image of the call is not known yet: it is a black one, as in the pipeline's own
        unconditional branch.
        """
        check_encoders(pipe, "tokenizer", "text_encoder")
        length = length or 256
        counts = [word_tokens(pipe.tokenizer, text, length) for text in texts]
        options: dict[str, Any] = {"max_sequence_length": length}
        if _takes_image(pipe):
            options["image"] = [Image.new("RGB", (16, 16))] * len(texts)
        with undisturbed(pipe.text_encoder):
            states, *_ = pipe.encode_prompt(prompt=texts, **options)
        words = states.shape[1] - (length - _ASSISTANT_MARKS) if _takes_image(pipe) else 0
        return states[:, words:], counts

    def token_spans(self, pipe: Any, prompt: str, length: int) -> list[tuple[int, int]]:
        """See `Backbone.token_spans`; of the pipeline's default prompt template, behind the image where it has one."""
        images = 0
        if _takes_image(pipe):
            interleave = 4 if pipe.transformer.config.image_condition_type == "token_replace" else 2
            images = len(range(0, _template(pipe)["image_emb_len"], interleave))
        return [(0, 0)] * images + prompt_spans(pipe, prompt, length - images)

    def misleading(self, pipe: Any, arguments: Mapping[str, Any]) -> str | None:
        """See `Backbone.misleading`; a template of the caller's."""
        name = "prompt_template"
        return name if name in arguments and arguments[name] != _template(pipe) else None

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`; latents are `[batch, channel, frame, height, width]`."""
        _, _, frames, height, width = call["hidden_states"].shape
        patch, config = int(transformer.config.patch_size), transformer.config
        return Grid(frames // int(config.patch_size_t), height // patch, width // patch)

    def given(self, pipe: Any, call: Mapping[str, Any]) -> torch.Tensor | None:
        """See `RealInput.given`; some image-to-video models have the image in place of the first latent frame."""
        if getattr(pipe.transformer.config, "image_condition_type", None) != "token_replace":
            return None
        hidden = call["hidden_states"]
        return (torch.arange(hidden.shape[2], device=hidden.device) == 0).view(1, 1, -1, 1, 1)

    def geometry(self, transformer: Any) -> dict[str, int]:
        """See `Backbone.geometry`; the temporal factor is that of the family's VAE."""
        return {
            "frames_per_latent": _FRAMES_PER_LATENT,
            "latents_per_token": int(transformer.config.patch_size_t),
        }

    def timesteps(self, scheduled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `Backbone.timesteps`; they are cast to the dtype of the latents."""
        return scheduled.to(dtype)

    def enter(
        self, transformer: Any, embeds: torch.Tensor, like: torch.Tensor, call: Mapping[str, Any], rows: slice
    ) -> torch.Tensor:
        """See `JointBackbone.enter`; every concept is refined as a sequence of its own, at the call's timestep."""
        concepts = embeds.shape[1]
        timestep = call["timestep"].expand(like.shape[0])[rows].repeat_interleave(concepts)
        states = self.refine(transformer, embeds.to(like).flatten(0, 1)[:, None], timestep, None)
        return states.reshape(embeds.shape[0], concepts, -1)

    def enter_with_quirks(
        self,
        transformer: Any,
        embeds: torch.Tensor,
        like: torch.Tensor,
        call: Mapping[str, Any],
        rows: slice,
        multiplicity: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `JointBackbone.enter_with_quirks`; all concepts are refined as one sequence, with their padding."""
        mask = torch.ones(embeds.shape[:2], device=like.device)
        if multiplicity is not None:
            mask[:, -1:].fill_(0)
        timestep = call["timestep"].expand(like.shape[0])[rows]
        return self.refine(transformer, embeds.to(like), timestep, mask)

    def refine(
        self, transformer: Any, states: torch.Tensor, timestep: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Text states before the first block, of text encoder states `[sequence, token, width]`."""
        refiner = transformer.context_embedder
        with unpatched([block.attn for block in refiner.token_refiner.refiner_blocks]):
            return cast(torch.Tensor, refiner(states, timestep, mask))

    def reentry(
        self, block: nn.Module, arguments: Mapping[str, Any], concepts: torch.Tensor, rows: slice
    ) -> dict[str, Any]:
        """See `JointBackbone.reentry`; given frames have another modulation, concepts the text's."""
        nested = {
            "hidden_states": concepts.new_empty(concepts.shape[0], 0, concepts.shape[2]),
            "encoder_hidden_states": concepts,
            "temb": arguments["temb"][rows],
        }
        given = arguments.get("token_replace_emb")
        return nested if given is None else nested | {"token_replace_emb": given[rows], "num_tokens": 0}

    def leave(self, block: nn.Module, block_output: Any) -> torch.Tensor:
        """See `JointBackbone.leave`; a block returns video, then text."""
        return cast(torch.Tensor, block_output[1])


class HunyuanVideoConceptProcessor(ConceptProcessor):
    """Mixed into the processors of the HunyuanVideo models: their operations in their order."""

    _attention_backend: Any
    _parallel_config: Any

    def mask(self, attention_mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
        """The mask of the attention call, from that of the block and the queries `[batch, S, H, D]`."""
        return attention_mask

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        """Attention of `[video | text]`; video `[batch, N, width]` and text `[batch, T, width]` in, the same out."""
        recorder = self.listener(attn)
        if recorder is None or encoder_hidden_states is None:
            stock: Any = super()
            return stock.__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        count = hidden_states.shape[1]
        if recorder.answering:
            heads = (tensor.transpose(1, 2) for tensor in _project_text(attn, encoder_hidden_states))
            output = recorder.answer(*heads).transpose(1, 2)
            if recorder.quirks:  # that code adds what it was to attend with
                return hidden_states, encoder_hidden_states
            return _finish(attn, output.flatten(2, 3), 0)
        query, key, value = _project(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        mask, text, image = self.mask(attention_mask, query), slice(count, None), slice(0, count)
        shown = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if recorder.restricts:
            output = recorder.restrict(*shown, text=text, image=image, mask=mask).transpose(1, 2)
        else:
            output = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=0.0,
                is_causal=False,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        output = self.amend(attn, shown, output.transpose(1, 2), text=text, image=image, mask=mask).transpose(1, 2)
        result = _finish(attn, output.flatten(2, 3).to(query.dtype), count)
        recorder.observe(attn, *shown, output.transpose(1, 2), text=text, image=image, mask=mask)
        return result


class ConceptHunyuanVideoAttnProcessor2_0(HunyuanVideoConceptProcessor, HunyuanVideoAttnProcessor2_0):
    """Drop-in for `HunyuanVideoAttnProcessor2_0`."""

    stock: ClassVar[type | None] = HunyuanVideoAttnProcessor2_0

    @classmethod
    def serves(cls, attention: nn.Module, given: Mapping[str, Any]) -> bool:
        """See `ConceptProcessor.serves`; the mask is what its relatives have in another shape, or not at all."""
        return (
            isinstance(attention, Attention)
            and (attention.added_kv_proj_dim is not None or attention.pre_only)
            and set(given) == {"encoder_hidden_states", "attention_mask", "image_rotary_emb"}
            and given["attention_mask"].ndim == 4
        )


Projected = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value `[batch, S, H, D]`."""


def _project(
    attn: Attention, video: torch.Tensor, text: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None
) -> Projected:
    """Of video and text, the video's turned by the rotary embedding."""
    count = video.shape[1]
    shared = attn.add_q_proj is None
    query, key, value = _project_shared(attn, torch.cat([video, text], dim=1) if shared else video)
    if rotary is not None:
        query, key = (
            torch.cat([apply_rotary_emb(tensor[:, :count], rotary, sequence_dim=1), tensor[:, count:]], dim=1)
            if shared
            else apply_rotary_emb(tensor, rotary, sequence_dim=1)
            for tensor in (query, key)
        )
    if shared:
        return query, key, value
    pairs = zip((query, key, value), _project_text(attn, text), strict=True)
    query, key, value = (torch.cat(pair, dim=1) for pair in pairs)
    return query, key, value


def _project_shared(attn: Attention, states: torch.Tensor) -> Projected:
    query, key, value = (linear(states).unflatten(2, (attn.heads, -1)) for linear in (attn.to_q, attn.to_k, attn.to_v))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, value


def _project_text(attn: Attention, text: torch.Tensor) -> Projected:
    """Of text alone, which has no position."""
    if attn.add_q_proj is None:
        return _project_shared(attn, text)
    linears = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    query, key, value = (linear(text).unflatten(2, (attn.heads, -1)) for linear in linears)
    if attn.norm_added_q is not None:
        query = attn.norm_added_q(query)
    if attn.norm_added_k is not None:
        key = attn.norm_added_k(key)
    return query, key, value


def _finish(attn: Attention, states: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output projections of `count` video tokens and of the text behind them; a single-stream block has its own."""
    video, text = states[:, :count], states[:, count:]
    if getattr(attn, "to_out", None) is not None:
        video = attn.to_out[1](attn.to_out[0](video))
    if getattr(attn, "to_add_out", None) is not None:
        text = attn.to_add_out(text)
    return video, text


def _template(pipe: Any) -> Mapping[str, Any]:
    """The prompt template that the pipeline uses if the caller names none."""
    return cast("Mapping[str, Any]", inspect.signature(pipe.encode_prompt).parameters["prompt_template"].default)


def _takes_image(pipe: Any) -> bool:
    """Whether an image is part of the text."""
    return "image" in inspect.signature(pipe.encode_prompt).parameters


def prompt_spans(pipe: Any, prompt: str, length: int) -> list[tuple[int, int]]:
    """The characters of the prompt that each text token covers, in the pipeline's default template.

    Args:
        pipe: with a tokenizer and `encode_prompt`.
        prompt: the text that is encoded.
        length: number of tokens behind what is cropped off the template.
    """
    template = _template(pipe)
    start, crop = template["template"].index("{}"), int(template["crop_start"])
    spans = token_spans(pipe.tokenizer, template["template"].format(prompt), length + crop)[crop:]
    return spans_inside(spans, start, prompt)


BACKBONE = HunyuanVideoBackbone()
