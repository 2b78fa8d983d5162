"""Maps of concepts in a real image or video: noised latents, one forward pass for each noise level, no generation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from diffusers_concept_maps.capture import attach
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.fitting import Fit, fit_clip
from diffusers_concept_maps.maps import ConceptMaps
from diffusers_concept_maps.media import read_frames
from diffusers_concept_maps.noising import check_levels
from diffusers_concept_maps.plan import Request
from diffusers_concept_maps.single_pass import SinglePass

_OPTIONS = {entry.name for entry in fields(Request)} - {"attention", "branch", "detail_path", "steps"}


def encode(
    pipe: Any,
    image_or_video: Any,
    concepts: Sequence[str] | None = None,
    *,
    noise_level: float | Iterable[float] = 0.5,
    prompt: str = "",
    num_samples: int = 1,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    num_frames: int | None = None,
    call: Mapping[str, Any] | None = None,
    **options: Any,
) -> ConceptMaps:
    """Saliency maps of concepts in a real image or video (ConceptAttention, arXiv 2502.04320, section 5).

    The clip is scaled and cut to what the model takes, encoded by the model's VAE, noised, and sent once through the
    transformer for each noise level and sample, up to the deepest layer that is asked for; the maps are the means.
    Nothing is decoded, no guidance is used, and the pipeline is left as it is.

    Args:
        pipe: a diffusers pipeline whose transformer is one of `supported()`.
        image_or_video: whatever `media.read_frames` reads: a path, PIL images, an array or a tensor.
        concepts: words or phrases.
        noise_level: fraction of the training schedule in (0, 1], or several, over which the maps are averaged.
        prompt: what to tell the model of the clip, such as a caption.
        num_samples: draws of noise for each level.
        seed: of the first draw; the next have the seeds that follow.
        size: `(height, width)` in pixels to scale the clip to; None keeps its aspect ratio, at no more than the area
            that the model makes by default.
        num_frames: most frames to take, from the first; None is what the model makes by default.
        call: further arguments of the pipeline's call, such as a control image.
        **options: `methods`, `layers`, `heads`, `concept_embeds`, `token_policy`, `normalize`, `parity`, `target`,
            `prompt_tokens`, `space`, `reads` and `detail` of `trace`; in kept axes, every level and sample is a step,
            in the order of levels.

    Returns:
        `ConceptMaps`, whose `upsample()` is on the grid of the clip as it came; `metadata["source"]` says how it was
        fitted.

    Raises:
        ConceptMapsError: the clip cannot be read or fitted, or as `trace`; the pipeline is as it was in any case.

    Example:
        >>> maps = dcm.encode(pipe, "dog.mp4", ["dog", "grass"], noise_level=(0.4, 0.6), prompt="a dog on grass")
        >>> maps.upsample().shape    # [1, concept, frame, height, width] of the file
    """
    if unknown := sorted(options.keys() - _OPTIONS):
        raise ConceptMapsValueError(
            f"encode has no argument {', '.join(unknown)}; beside its own it takes {', '.join(sorted(_OPTIONS))}"
        )
    levels = check_levels(noise_level)
    for name, number in (("num_samples", num_samples), ("num_frames", 1 if num_frames is None else num_frames)):
        if not isinstance(number, int) or number < 1:
            raise ConceptMapsValueError(f"{name} is {number!r}; expected a whole number of at least 1")
    if not isinstance(seed, int):
        raise ConceptMapsValueError(f"seed is {seed!r}; expected a whole number")
    single = SinglePass(pipe, prompt=prompt, call=call)
    clip, fit = fit_to(single, image_or_video, size=size, num_frames=num_frames)
    notes = {
        "source": fit.to_json(),
        "noise_levels": levels,
        "prompt": prompt,
        "seeds": list(range(seed, seed + num_samples)),
    }
    steps = range(len(levels) * num_samples)
    handle = attach(single.pipe, concepts, single_passes=True, notes=notes, steps=steps, **options)
    try:
        latents = single.encode(clip.transpose(0, 1)[None])
        for level in levels:
            for sample in range(num_samples):
                single.run(latents, level, clip, seed=seed + sample)
    except BaseException:
        handle.remove(failed=True)
        raise
    handle.remove()
    return handle.maps["cond"]


def fit_to(
    single: SinglePass, image_or_video: Any, *, size: tuple[int, int] | None, num_frames: int | None
) -> tuple[torch.Tensor, Fit]:
    """Read a clip and fit it to what a pipeline takes.

    Args:
        single: of the pipeline.
        image_or_video: whatever `media.read_frames` reads.
        size: as for `encode`.
        num_frames: likewise.

    Returns:
        `[frame, 3, height, width]` in 0..1, and how it was fitted.
    """
    shape = single.backbone.clip_shape(single.pipe)
    longest = shape.frames if num_frames is None else num_frames
    clip = read_frames(image_or_video, max_frames=longest)  # a film does not fit into memory
    return fit_clip(
        clip.frames,
        area=shape.area,
        multiple=shape.multiple,
        frame_step=shape.frame_step,
        max_frames=longest,
        size=size,
        total=clip.total,
    )
