"""What a model family declares so that real images and videos can be put into its pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
        patch = transformer_of(pipe).config.patch_size
        side = int(patch[-1]) if isinstance(patch, tuple | list) else int(patch)
        return default_shape(pipe, side * int(pipe.vae_scale_factor_spatial), int(pipe.vae_scale_factor_temporal))

    def latents(self, pipe: Any, clip: torch.Tensor) -> torch.Tensor:
        """What the model's VAE makes of a clip, scaled as the model was trained with.

        Args:
            pipe: the pipeline.
            clip: `[batch, 3, frame, height, width]` in -1..1, on the VAE's device and in its dtype.

        Returns:
            `[batch, channel, latent frame, height, width]`; the mean of the VAE's posterior.
        """
        return scale_latents(pipe.vae, posterior_mean(pipe.vae.encode(clip)))

    def prepare(self, pipe: Any) -> None:
        """Put in place of the components of a pipeline what makes one unguided pass of any size.

        Args:
            pipe: a copy of the pipeline; its components are those of the original.
        """

    def real_arguments(self, pipe: Any, frames: int) -> dict[str, Any]:
        """Arguments of the pipeline's call for one unguided pass, beside prompt, size and image.

        Args:
            pipe: the pipeline.
            frames: of the clip.
        """
        wanted: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent", "strength": 1.0}
        if not getattr(transformer_of(pipe).config, "guidance_embeds", False):
            wanted["guidance_scale"] = 1.0
        known = inspect.signature(type(pipe).__call__).parameters
        return {name: value for name, value in wanted.items() if name in known}

    def latent_frames(self, pipe: Any, least: int) -> int:
        """How many latent frames the model takes where there are some number of them at least.

        Args:
            pipe: the pipeline.
            least: the number.
        """
        return least

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
        return {"hidden_states": put_channels(hidden, latents, dim=1, given=self.given(pipe, call))}

    def given(self, pipe: Any, call: Mapping[str, Any]) -> torch.Tensor | None:
        """Where the pipeline has put what it was given, such as a first frame, among its noise.

        Args:
            pipe: the pipeline.
            call: what it has called its transformer with, by name.

        Returns:
            bool, to be broadcast to the noise in the layout of the transformer; None where there is nothing.
        """
        return None

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


class ImageInput(RealInput):
    """How images get into the pipelines of a family; every frame of a clip is an image."""

    def clip_shape(self, pipe: Any) -> ClipShape:
        """See `RealInput.clip_shape`; the pipelines take images by twos of latents."""
        factor = int(pipe.vae_scale_factor)
        return ClipShape(2 * factor, (int(pipe.default_sample_size) * factor) ** 2)

    def latents(self, pipe: Any, clip: torch.Tensor) -> torch.Tensor:
        """See `RealInput.latents`; `clip` has images as frames."""
        return by_frame(partial(self.image_latents, pipe), clip)

    def image_latents(self, pipe: Any, images: torch.Tensor) -> torch.Tensor:
        """What the model's VAE makes of images `[batch, 3, height, width]`, scaled as the model was trained with."""
        return scale_latents(pipe.vae, posterior_mean(pipe.vae.encode(images)))

    def insert(self, pipe: Any, call: Mapping[str, Any], latents: torch.Tensor) -> dict[str, Any]:
        """See `RealInput.insert`."""
        return {"hidden_states": put_channels(call["hidden_states"], only_frame(latents), dim=1)}


def transformer_of(pipe: Any) -> Any:
    """The transformer of a pipeline, of those of Wan 2.2 the first that it has."""
    return pipe.transformer if pipe.transformer is not None else pipe.transformer_2


def default_shape(pipe: Any, multiple: int, frame_step: int, **known: int) -> ClipShape:
    """What a pipeline can be given, of the size that its call has by default.

    Args:
        pipe: the pipeline.
        multiple: see `ClipShape`.
        frame_step: likewise.
        **known: `area` and `frames`, where the call does not tell.
    """
    defaults = {name: p.default for name, p in inspect.signature(type(pipe).__call__).parameters.items()}
    frames = known.get("frames") or defaults.get("num_frames") or defaults.get("frames") or 1
    return ClipShape(multiple, known.get("area") or defaults["height"] * defaults["width"], int(frames), frame_step)


def by_frame(encode: Callable[[torch.Tensor], torch.Tensor], clip: torch.Tensor) -> torch.Tensor:
    """What a function of images `[image, ...]` makes of every frame of `[batch, 3, frame, height, width]`."""
    images = clip.transpose(1, 2)
    encoded = encode(images.flatten(0, 1))
    return cast(torch.Tensor, encoded.unflatten(0, images.shape[:2])).transpose(1, 2)


def only_frame(latents: torch.Tensor) -> torch.Tensor:
    """Latents `[batch, channel, height, width]` of an image.

    Raises:
        ConceptMapsError: there are several frames.
    """
    if latents.shape[2] != 1:
        raise ConceptMapsError(f"the model makes images, but the clip has {latents.shape[2]} frames; pass them singly")
    return latents[:, :, 0]


def posterior_mean(encoded: Any) -> torch.Tensor:
    """The latents in what the `encode` of a VAE returns."""
    distribution = getattr(encoded, "latent_dist", None)
    return cast(torch.Tensor, encoded.latent if distribution is None else distribution.mode())


def scale_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents `[batch, channel, ...]` of a VAE at the scale of its model, mean 0 and deviation 1 by its config."""
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    factor = getattr(config, "scaling_factor", None) or 1.0
    if mean is not None and std is not None:
        return normalize_latents(latents, mean, std) * factor
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * factor


def normalize_latents(latents: torch.Tensor, mean: Any, std: Any) -> torch.Tensor:
    """Latents `[batch, channel, ...]` at mean 0 and deviation 1, by those `[channel]` of a VAE."""
    shape = (1, -1, *(1,) * (latents.ndim - 2))
    center, width = (torch.as_tensor(own).to(latents).view(shape) for own in (mean, std))
    return (latents - center) / width


def put_channels(
    hidden: torch.Tensor, latents: torch.Tensor, dim: int, given: torch.Tensor | None = None
) -> torch.Tensor:
    """A copy of `hidden` with latents as its first channels.

    Args:
        hidden: what the transformer was to be called with.
        latents: in the same layout, with as many or fewer channels.
        dim: of the channels.
        given: bool, where `hidden` stays.

    Raises:
        ConceptMapsError: other dimensions differ.
    """
    own = hidden.narrow(dim, 0, min(latents.shape[dim], hidden.shape[dim]))
    if own.shape[1:] != latents.shape[1:]:
        raise ConceptMapsError(
            f"the pipeline calls its transformer with {tuple(own.shape)}, but the latents of the clip are "
            f"{tuple(latents.shape)}; pass a size and a number of frames that the pipeline takes"
        )
    latents = latents.to(hidden).expand_as(own)
    if given is not None:
        latents = torch.where(given, own, latents)
    return torch.cat([latents, hidden.narrow(dim, own.shape[dim], hidden.shape[dim] - own.shape[dim])], dim)


def put_tokens(
    hidden: torch.Tensor, tokens: torch.Tensor, own: slice, given: torch.Tensor | None = None
) -> torch.Tensor:
    """A copy of a sequence `[batch, token, channel]` with packed latents in it.

    Args:
        hidden: what the transformer was to be called with; other tokens, such as reference images, stay.
        tokens: packed latents, with as many or fewer channels.
        own: the tokens that they are put in place of.
        given: bool `[batch, token]`, which of those stay.

    Raises:
        ConceptMapsError: there are not as many.
    """
    kept = None if given is None else given.unsqueeze(-1)
    put = put_channels(hidden[:, own], tokens, dim=2, given=kept)
    return torch.cat([hidden[:, : own.start], put, hidden[:, own.stop :]], dim=1)
