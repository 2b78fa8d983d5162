"""HunyuanVideo 1.5, text-to-video and image-to-video.

Dual-stream blocks alone, with joint attention over video and text, video first. Text is of three kinds: an encoded
image, glyphs that the prompt has in quotes (ByT5), and the prompt (Qwen), in this order; padding of all three goes to
the end, for every row by itself, where a mask hides it. Concepts are prompt text: refined in every step, each as a
sequence of its own, and marked as the prompt is. Guidance is an object with one pass per condition; one with a third
pass, such as skip-layer guidance, cannot be traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any, ClassVar

import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch.nn import functional

from diffusers_concept_maps.backbones._base import Preset, Site
from diffusers_concept_maps.backbones._real import ClipShape, default_shape
from diffusers_concept_maps.backbones.hunyuan_video import HunyuanVideoBackbone, HunyuanVideoConceptProcessor
from diffusers_concept_maps.tokens import check_encoders, spans_inside, token_spans, undisturbed, word_tokens


class HunyuanVideo15Backbone(HunyuanVideoBackbone):
    """The HunyuanVideo 1.5 transformers; nothing is published of their layers."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("HunyuanVideo15Transformer3DModel",)
    editable: ClassVar[bool] = False
    presets: ClassVar[tuple[Preset, ...]] = ()

    def sites(self, transformer: Any) -> list[Site]:
        """See `Backbone.sites`."""
        return [Site(block, block.attn) for block in transformer.transformer_blocks]

    def encode(self, pipe: Any, texts: list[str], length: int | None) -> tuple[torch.Tensor, list[int]]:
        """See `Backbone.encode`; states of Qwen within the pipeline's own chat, without glyphs."""
        check_encoders(pipe, "tokenizer", "text_encoder")
        length = length or 256
        counts = [word_tokens(pipe.tokenizer, text, length) for text in texts]
        # Not `encode_prompt`, which pads every text to a thousand tokens. Dropout would draw from the random state.
        with undisturbed(pipe.text_encoder):
            states, _ = pipe._get_mllm_prompt_embeds(
                text_encoder=pipe.text_encoder,
                tokenizer=pipe.tokenizer,
                prompt=texts,
                device=pipe._execution_device,
                tokenizer_max_length=length,
                system_message=pipe.system_message,
                crop_start=pipe.prompt_template_encode_start_idx,
            )
        return states, counts

    def clip_shape(self, pipe: Any) -> ClipShape:
        """See `RealInput.clip_shape`; the model knows the size that it was trained with."""
        spatial, temporal = int(pipe.vae_scale_factor_spatial), int(pipe.vae_scale_factor_temporal)
        multiple = spatial * int(pipe.transformer.config.patch_size)
        return default_shape(pipe, multiple, temporal, area=int(pipe.target_size) ** 2)

    def prepare(self, pipe: Any) -> None:
        """See `RealInput.prepare`; guidance is a component, and image-to-video has sizes of its own."""
        pipe.guider = ClassifierFreeGuidance(enabled=False)
        pipe.video_processor = copy(pipe.video_processor)
        pipe.video_processor.calculate_default_height_width = lambda height, width, target_size: (height, width)

    def text_length(self, call: Mapping[str, Any]) -> int:
        """See `Backbone.text_length`."""
        texts = ("image_embeds", "encoder_hidden_states_2", "encoder_hidden_states")
        return sum(int(call[name].shape[1]) for name in texts)

    def token_spans(self, pipe: Any, prompt: str, length: int) -> list[tuple[int, int]]:
        """See `Backbone.token_spans`; the prompt stands behind the tokens of image and glyphs that are no padding."""
        before = _glyph_tokens(pipe, prompt)
        if getattr(pipe, "image_encoder", None) is not None:
            vision = pipe.image_encoder.config
            before += (int(vision.image_size) // int(vision.patch_size)) ** 2
        start, crop = _chat(pipe, "\0").index("\0"), int(pipe.prompt_template_encode_start_idx)
        spans = token_spans(pipe.tokenizer, _chat(pipe, prompt), crop + pipe.tokenizer_max_length)[crop:]
        return [(0, 0)] * before + spans_inside(spans, start, prompt)

    def refine(
        self, transformer: Any, states: torch.Tensor, timestep: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """See `HunyuanVideoBackbone.refine`; all text is marked by its kind."""
        refined = super().refine(transformer, states, timestep, mask)
        kind: torch.Tensor = transformer.cond_type_embed(torch.zeros_like(refined[:, :, 0], dtype=torch.long))
        return refined + kind


def _chat(pipe: Any, prompt: str) -> str:
    """The text of which the pipeline encodes the tokens behind its crop."""
    messages = [{"role": "system", "content": pipe.system_message}, {"role": "user", "content": prompt}]
    return str(pipe.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _glyph_tokens(pipe: Any, prompt: str) -> int:
    """Number of tokens of what the prompt has in quotes."""
    from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts

    glyphs = extract_glyph_texts(prompt)
    if glyphs is None:
        return 0
    return len(pipe.tokenizer_2(glyphs, truncation=True, max_length=pipe.tokenizer_2_max_length).input_ids)


class ConceptHunyuanVideo15AttnProcessor2_0(HunyuanVideoConceptProcessor, HunyuanVideo15AttnProcessor2_0):
    """Drop-in for `HunyuanVideo15AttnProcessor2_0`."""

    stock: ClassVar[type | None] = HunyuanVideo15AttnProcessor2_0

    def mask(self, attention_mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
        """See `HunyuanVideoConceptProcessor.mask`; padding of the text neither reads nor is read."""
        assert attention_mask is not None  # blocks are always called with one
        batch, length = query.shape[:2]
        valid = functional.pad(attention_mask, (length - attention_mask.shape[1], 0), value=True).bool()
        seen = valid.view(batch, 1, 1, length).repeat(1, 1, length, 1)
        return (seen & seen.transpose(2, 3)).bool()


BACKBONE = HunyuanVideo15Backbone()
