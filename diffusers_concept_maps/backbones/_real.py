"""What a model family declares so that real images and videos can be put into its pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from diffusers_concept_maps import noising
from diffusers_concept_maps.errors import ConceptMapsError


@dataclass(frozen=True)
class ClipShape:
    """What a pipeline can be given.

    Attributes:
        multiple: height and width in pixels have to be multiples of it.
        area: pixels of a frame that it makes by default.
        frames: number of frames that it makes by default; 1 of image models.
        frame_step: frames are one and a multiple of it.
    """

    multiple: int
    area: int
    frames: int = 1
    frame_step: int = 1


class RealInput:
    """How clips get into the pipelines of a family.

    The methods here suit a video model whose latents are `[batch, channel, frame, height, width]`.
    """

    def clip_shape(self, pipe: Any) -> ClipShape:
        """What the pipeline can be given.

        Args:
            pipe: the pipeline.
        """
        spatial, temporal = int(pipe.vae_scale_factor_spatial), int(pipe.vae_scale_factor_temporal)
        patch = pipe.transformer.config.patch_size
        multiple = spatial * (int(patch[-1]) if isinstance(patch, tuple | list) else int(patch))
        defaults = {name: p.default for name, p in inspect.signature(type(pipe).__call__).parameters.items()}
        return ClipShape(multiple, defaults["height"] * defaults["width"], int(defaults["num_frames"]), temporal)

    def latents(self, pipe: Any, clip: torch.Tensor) -> torch.Tensor:
        """What the model's VAE makes of a clip, scaled as the model was trained with.

        Args:
            pipe: the pipeline.
            clip: `[batch, 3, frame, height, width]` in -1..1, on the VAE's device and in its dtype.

        Returns:
            `[batch, channel, latent frame, height, width]`; the mean of the VAE's posterior.
        """
        return scale_latents(pipe.vae, posterior_mean(pipe.vae.encode(clip)))

    def real_arguments(self, pipe: Any) -> dict[str, Any]:
        """Arguments of the pipeline's call for one unguided pass, beside prompt, size and image.

        Args:
            pipe: the pipeline.
        """
        wanted: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent", "strength": 1.0}
        if not getattr(pipe.transformer.config, "guidance_embeds", False):
            wanted["guidance_scale"] = 1.0
        known = inspect.signature(type(pipe).__call__).parameters
        return {name: value for name, value in wanted.items() if name in known}

    def insert(self, pipe: Any, call: Mapping[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        """Arguments of the transformer in which latents stand where the pipeline has put its noise.

        Args:
            pipe: the pipeline.
            call: what it has called its transformer with, by name; conditions, such as a first frame, are in there.
            latents: `[batch, channel, latent frame, height, width]`.

        Returns:
            The arguments that change, by name.

        Raises:
            ConceptMapsError: the pipeline has made noise of another shape.
        """
        hidden = call["hidden_states"]
        return {"hidden_states": put_channels(hidden, latents, dim=1)}

    def add_noise(self, pipe: Any, clean: torch.Tensor, noise: torch.Tensor, level: float) -> torch.Tensor:
        """Latents as the model has seen them in training at a noise level.

        Args:
            pipe: the pipeline.
            clean: latents.
            noise: standard normal numbers of the same shape.
            level: fraction of the training schedule.
        """
        return noising.add_noise(pipe.scheduler, clean, noise, level)

    def scheduler_at(self, pipe: Any, level: float) -> Any:
        """A scheduler whose only step is at a noise level.

        Args:
            pipe: the pipeline, whose own scheduler stays as it is.
            level: fraction of the training schedule.
        """
        return noising.at_level(pipe.scheduler, level)


def posterior_mean(encoded: Any) -> torch.Tensor:
    """The latents in what the `encode` of a VAE returns."""
    distribution = getattr(encoded, "latent_dist", None)
    return cast(torch.Tensor, encoded.latent if distribution is None else distribution.mode())


def scale_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents `[batch, channel, ...]` of a VAE at the scale of its model, mean 0 and deviation 1 by its config."""
    config, shape = vae.config, (1, -1, *(1,) * (latents.ndim - 2))
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    factor = getattr(config, "scaling_factor", None) or 1.0
    if mean is not None and std is not None:
        centered = latents - latents.new_tensor(mean).view(shape)
        return centered / latents.new_tensor(std).view(shape) * factor
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * factor


def put_channels(hidden: torch.Tensor, latents: torch.Tensor, dim: int) -> torch.Tensor:
    """A copy of `hidden` with latents as its first channels.

    Args:
        hidden: what the transformer was to be called with.
        latents: in the same layout, with as many or fewer channels.
        dim: of the channels.

    Raises:
        ConceptMapsError: other dimensions differ.
    """
    own = hidden.narrow(dim, 0, min(latents.shape[dim], hidden.shape[dim]))
    if own.shape[1:] != latents.shape[1:]:
        raise ConceptMapsError(
            f"the pipeline calls its transformer with {tuple(own.shape)}, but the latents of the clip are "
            f"{tuple(latents.shape)}; pass a size and a number of frames that the pipeline takes"
        )
    rest = hidden.narrow(dim, own.shape[dim], hidden.shape[dim] - own.shape[dim])
    return torch.cat([latents.to(hidden).expand(hidden.shape[0], *latents.shape[1:]), rest], dim)
