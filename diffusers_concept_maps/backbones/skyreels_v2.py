"""SkyReels-V2, which is built as Wan: text-to-video, image-to-video, and diffusion forcing.

With diffusion forcing every latent frame has a timestep of its own, and a step is one pass over all frames, whatever
their timesteps. A clip that is made in several windows, longer than `base_num_frames`, is refused when the second one
starts, because each would have maps of its own. Frames that are given, as the first one of image-to-video or the clip
that is extended, are part of the grid.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, ClassVar

from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2AttnProcessor

from diffusers_concept_maps.backbones._base import Preset
from diffusers_concept_maps.backbones._real import transformer_of
from diffusers_concept_maps.backbones.wan import WanBackbone, WanConceptProcessor
from diffusers_concept_maps.errors import ConceptMapsError


class SkyReelsV2Backbone(WanBackbone):
    """SkyReels-V2 of all sizes; nothing is published on which of its layers or heads to use."""

    transformer_classes: ClassVar[tuple[str, ...]] = ("SkyReelsV2Transformer3DModel",)
    presets: ClassVar[tuple[Preset, ...]] = ()
    context_parallel: ClassVar[bool] = False

    def real_arguments(self, pipe: Any, frames: int) -> dict[str, Any]:
        """See `RealInput.real_arguments`.

        Raises:
            ConceptMapsError: the pipeline extends a video.
        """
        known = signature(type(pipe).__call__).parameters
        if "video" in known:
            raise ConceptMapsError(
                f"{type(pipe).__name__} extends a video, and of a clip that it is given nothing is noise; use "
                f"SkyReelsV2DiffusionForcingPipeline"
            )
        # Diffusion forcing takes the clip whole, and all its frames at one level.
        forcing = {"base_num_frames": frames, "overlap_history": None, "ar_step": 0}
        return super().real_arguments(pipe, frames) | {name: forcing[name] for name in forcing if name in known}

    def latent_frames(self, pipe: Any, least: int) -> int:
        """See `RealInput.latent_frames`; with diffusion forcing they may come in blocks."""
        block = int(transformer_of(pipe).config.num_frame_per_block)
        return -(-least // block) * block


class ConceptSkyReelsV2AttnProcessor(WanConceptProcessor, SkyReelsV2AttnProcessor):
    """Drop-in for `SkyReelsV2AttnProcessor`."""

    stock: ClassVar[type | None] = SkyReelsV2AttnProcessor
    splits_video: ClassVar[bool] = True


BACKBONE = SkyReelsV2Backbone()
