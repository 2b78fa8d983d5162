"""FramePack: HunyuanVideo that generates a clip section by section, each beside a compressed history of the others.

The history stands in front of the section in the video stream and is left out of maps; concepts read it as text does.
An encoded image stands in front of the prompt in the text. Every section is a run of its own, so that the maps are
those of the section that was generated last: the first one in time where sampling is inverted, as by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from math import ceil, prod
from typing import Any, ClassVar

from diffusers_concept_maps.backbones._base import Grid, Preset
from diffusers_concept_maps.backbones._real import ClipShape
from diffusers_concept_maps.backbones.hunyuan_video import HunyuanVideoBackbone, prompt_spans

_HISTORY = {
    "latents_clean": (1, 2, 2),
    "latents_history_2x": (2, 4, 4),
    "latents_history_4x": (4, 8, 8),
}
"""Arguments with latents of the history, and how many frames, rows and columns of them make a token."""


class FramepackBackbone(HunyuanVideoBackbone):
    """The FramePack transformers; nothing is published of their layers."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("HunyuanVideoFramepackTransformer3DModel",)
    editable: ClassVar[bool] = False
    presets: ClassVar[tuple[Preset, ...]] = ()

    def grid(self, transformer: Any, call: Mapping[str, Any]) -> Grid:
        """See `Backbone.grid`."""
        start = 0
        for name, patch in _HISTORY.items():
            latents = call.get(name)
            if latents is not None and call.get(name.replace("latents", "indices_latents")) is not None:
                start += prod(ceil(size / part) for size, part in zip(latents.shape[2:], patch, strict=True))
        return replace(super().grid(transformer, call), start=start)

    def clip_shape(self, pipe: Any) -> ClipShape:
        """See `RealInput.clip_shape`; a clip is a section."""
        window = int(signature(type(pipe).__call__).parameters["latent_window_size"].default)
        step = int(pipe.vae_scale_factor_temporal)
        return replace(super().clip_shape(pipe), frames=(window - 1) * step + 1)

    def real_arguments(self, pipe: Any, frames: int) -> dict[str, Any]:
        """See `RealInput.real_arguments`; the clip is the only section, of as many frames as it has."""
        window = (frames - 1) // int(pipe.vae_scale_factor_temporal) + 1
        return super().real_arguments(pipe, frames) | {"latent_window_size": window}

    def text_length(self, call: Mapping[str, Any]) -> int:
        """See `Backbone.text_length`; of a single clip the model cuts the padding off, and waits for the device."""
        mask = call["encoder_attention_mask"]
        text = int(mask.sum()) if mask.shape[0] == 1 else int(mask.shape[1])
        return text + int(call["image_embeds"].shape[1])

    def token_spans(self, pipe: Any, prompt: str, length: int) -> list[tuple[int, int]]:
        """See `Backbone.token_spans`; of the pipeline's default prompt template, behind the image."""
        vision = pipe.image_encoder.config
        images = (int(vision.image_size) // int(vision.patch_size)) ** 2
        return [(0, 0)] * images + prompt_spans(pipe, prompt, length - images)


BACKBONE = FramepackBackbone()
