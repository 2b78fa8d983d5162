"""One forward pass of a pipeline's transformer over latents of one's own, at a noise level of one's own.

A copy of the pipeline is called, with the same components and a scheduler of its own: whatever it takes to call this
transformer, such as text, positions, conditions and the scale of the timestep, is then what the pipeline makes it. Its
noise is replaced on the way into the transformer. The text is encoded once, nothing is decoded, and the layers behind
the deepest one that is listened to do not run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import torch
from torch import nn

from diffusers_concept_maps.attachment import DeepestLayerReached, by_name
from diffusers_concept_maps.backbones import Backbone, find_backbone, find_transformers, uncompiled
from diffusers_concept_maps.errors import ConceptMapsValueError

_IMAGE_PIPELINES = (
    "ImageToVideo",
    "Img2Img",
    "VideoToVideo",
    "VideoToWorld",
    "Video2World",
    "Inpaint",
    "Fill",
    "Edit",
)
"""Parts of the class names of pipelines that need an image or a video where their signature says it is optional."""


class SinglePass:
    """Calls a pipeline for single forward passes.

    Attributes:
        pipe: the copy of the pipeline that makes them; what listens to the passes has to be attached to this one.
    """

    def __init__(self, pipe: Any, *, prompt: str, call: Mapping[str, Any] | None = None) -> None:
        """Copy the pipeline object; nothing in it is changed.

        Args:
            pipe: a pipeline whose transformer is one of `supported()`.
            prompt: what to tell the model of the clip.
            call: further arguments of the pipeline's call.

        Raises:
            ConceptMapsValueError: it is a transformer alone, or lacks what encodes clips or text.
        """
        for name in ("vae", "encode_prompt"):
            if getattr(pipe, name, None) is None:
                raise ConceptMapsValueError(
                    f"{type(pipe).__name__} has no {name}; expected a diffusers pipeline whose VAE encodes the clip "
                    f"and whose text encoder encodes what the model is told of it"
                )
        self.backbone: Backbone = find_backbone(find_transformers(pipe)[0])
        self._original = pipe
        cls: Any = type(pipe)
        self.pipe = cls.__new__(cls)
        self.pipe.__dict__.update(pipe.__dict__)
        self.pipe.__dict__["encode_prompt"] = _remembering(pipe.encode_prompt)
        self.pipe.set_progress_bar_config(disable=True)
        self.backbone.prepare(self.pipe)
        self._prompt = prompt
        self._call = dict(call or {})

    @torch.no_grad()
    def encode(self, clip: torch.Tensor) -> torch.Tensor:
        """Latents of a clip, at the scale of the model.

        Args:
            clip: float `[batch, 3, frame, height, width]` in 0..1, of a size that the model takes.

        Returns:
            float32 `[batch, channel, latent frame, height, width]` on the pipeline's device.
        """
        vae = self.pipe.vae
        pixels = (clip * 2 - 1).to(device=self.pipe._execution_device, dtype=vae.dtype)
        return self.backbone.latents(self.pipe, pixels).float()

    def run(
        self, latents: torch.Tensor, level: float, clip: torch.Tensor, *, seed: int = 0, noised: bool = True
    ) -> None:
        """Make one pass.

        Args:
            latents: of one clip, `[1, channel, latent frame, height, width]`.
            level: noise level, a fraction of the training schedule.
            clip: the frames `[frame, 3, height, width]` in 0..1; their number and size are asked for, and pipelines
                that start from an image or video get them.
            seed: of the noise.
            noised: add the noise; otherwise the model gets clean latents and is told that they are noised.
        """
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        if noised:
            latents = self.backbone.add_noise(self._original, latents, noise, level)
        self.pipe.scheduler = self.backbone.scheduler_at(self._original, level)
        put = partial(self._put, latents)
        control = getattr(self.pipe, "controlnet", None)  # sees what the transformer sees
        takers = [*find_transformers(self.pipe), *([control] if isinstance(control, nn.Module) else [])]
        # What listens to them is to see the latents of the clip: prepended.
        hooks = [taker.register_forward_pre_hook(put, with_kwargs=True, prepend=True) for taker in takers]
        try:
            # Some pipelines sample their conditions without the generator that they are given.
            with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
                torch.manual_seed(seed)
                self.pipe(**self._arguments(clip), generator=generator)
        except DeepestLayerReached:
            self.pipe.maybe_free_model_hooks()
        finally:
            for hook in hooks:
                hook.remove()
            if "_all_hooks" in self.pipe.__dict__:  # those of CPU offload are made anew by every run
                self._original._all_hooks = self.pipe._all_hooks

    def _put(
        self, latents: torch.Tensor, taker: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = by_name(uncompiled(taker), args, kwargs)
        if "hidden_states" in call:
            return (), call | self.backbone.insert(self.pipe, call, latents)
        put = self.backbone.insert(self.pipe, call | {"hidden_states": call["latents"]}, latents)
        return (), call | {"latents": put["hidden_states"]}

    def _arguments(self, clip: torch.Tensor) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        known = inspect.signature(type(self.pipe).__call__).parameters
        frames, _, height, width = clip.shape
        given: dict[str, Any] = {"prompt": self._prompt, "height": height, "width": width}
        given |= {"num_frames": frames, "frames": frames, "max_area": height * width}
        given |= self.backbone.real_arguments(self.pipe, frames)
        if any(name.startswith("prompt_embeds") for name in self._call):
            del given["prompt"]
        wants_images = any(part in type(self.pipe).__name__ for part in _IMAGE_PIPELINES)
        for name, value in (("image", _first_picture), ("video", _pictures), ("mask_image", _everything)):
            if name in known and (wants_images or known[name].default is inspect.Parameter.empty):
                given[name] = value(clip)
        if "image" in given and "video" in given:  # one of them
            del given["image" if "video" in self._call else "video"]
        return {name: value for name, value in given.items() if name in known} | self._call


def _pictures(clip: torch.Tensor) -> list[Any]:
    from PIL import Image

    pixels = (clip * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(frame) for frame in pixels]


def _first_picture(clip: torch.Tensor) -> Any:
    return _pictures(clip[:1])[0]


def _everything(clip: torch.Tensor) -> Any:
    """The mask with which a whole image is made anew."""
    from PIL import Image

    return Image.new("L", (clip.shape[3], clip.shape[2]), 255)


def _remembering(encode_prompt: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, that encodes what it has encoded once no second time."""
    known: list[tuple[Any, Any]] = []

    @wraps(encode_prompt)
    def encode(*args: Any, **kwargs: Any) -> Any:
        given = (args, kwargs)
        for earlier, result in known:
            if _same(earlier, given):
                return result
        known.append((given, encode_prompt(*args, **kwargs)))
        return known[-1][1]

    return encode


def _same(a: Any, b: Any) -> bool:
    """Whether arguments are alike; pictures come anew with every run, and are alike where their pixels are."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return a is b or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
    return a is b or bool(a == b)
