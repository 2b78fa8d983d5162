"""Noise at a place of the training schedule that one chooses, for any scheduler of the host."""

from __future__ import annotations

from collections.abc import Iterable
from functools import wraps
from typing import Any, cast

import torch

from diffusers_concept_maps.errors import ConceptMapsValueError

_LEAST = 2.0**-24
"""What schedulers of the host take for the signal that is left, where none is, so that sigma is finite."""


def check_levels(noise_level: object) -> list[float]:
    """Noise levels as numbers.

    Args:
        noise_level: fraction of the training schedule in (0, 1], or several.

    Raises:
        ConceptMapsValueError: there is none, or one is no such number.
    """
    several = isinstance(noise_level, Iterable) and not isinstance(noise_level, str | bytes)
    levels = list(cast("Iterable[object]", noise_level)) if several else [noise_level]
    for level in levels or [noise_level]:
        if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level <= 1:
            raise ConceptMapsValueError(
                f"noise_level is {level!r}; expected a fraction of the training schedule in (0, 1], such as 0.5, or "
                f"several of them"
            )
    return [float(cast(float, level)) for level in levels]


def add_noise(scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, level: float) -> torch.Tensor:
    """Latents as the model has seen them in training at a noise level.

    Args:
        scheduler: of the pipeline.
        clean: latents.
        noise: standard normal numbers of the same shape.
        level: fraction of the training schedule.

    Returns:
        `(1 - level) * clean + level * noise` where the model was trained on straight paths (flow matching),
        `sqrt(a) * clean + sqrt(1 - a) * noise` with the scheduler's cumulative product `a` otherwise.
    """
    if not is_flow(scheduler):
        kept: torch.Tensor = scheduler.alphas_cumprod[_step(scheduler, level)].to(clean)
        return kept.sqrt() * clean + (1 - kept).sqrt() * noise
    return (1 - level) * clean + level * noise


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is for models that were trained on straight paths between clip and noise."""
    config = scheduler.config
    return (
        getattr(scheduler, "alphas_cumprod", None) is None
        or getattr(config, "prediction_type", None) == "flow_prediction"
        or bool(getattr(config, "use_flow_sigmas", False))
    )


def at_level(scheduler: Any, level: float) -> Any:
    """A scheduler of the same config whose schedule is one step at a noise level, whatever is asked of it.

    Args:
        scheduler: of the pipeline; it stays as it is.
        level: fraction of the training schedule.
    """
    if not is_flow(scheduler):
        step = _step(scheduler, level)
        kept = max(float(scheduler.alphas_cumprod[step]), _LEAST)
        return one_step(scheduler, step, ((1 - kept) / kept) ** 0.5)
    sigma = 1 - level if getattr(scheduler.config, "invert_sigmas", False) else level
    # In single precision, as schedulers do it: integer timesteps are cut, not rounded.
    return one_step(scheduler, float(torch.tensor(sigma) * scheduler.config.num_train_timesteps), sigma)


def one_step(scheduler: Any, timestep: float, sigma: float) -> Any:
    """A scheduler of the same config whose schedule is one step, whatever is asked of it.

    Args:
        scheduler: of the pipeline; it stays as it is.
        timestep: what the schedule holds.
        sigma: likewise, for schedulers with sigmas.
    """
    cls: Any = type(scheduler)

    class OneStep(cls):
        """Of a class of its own, because pipelines make deep copies of their scheduler."""

        @wraps(cls.set_timesteps)  # pipelines look at its arguments
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            schedule: Any = self
            schedule.timesteps = torch.full_like(schedule.timesteps[:1], timestep)
            if isinstance(getattr(self, "sigmas", None), torch.Tensor):
                end = 1.0 if getattr(schedule.config, "invert_sigmas", False) else 0.0
                schedule.sigmas = schedule.sigmas.new_tensor([sigma, end])

    own = cls.from_config(scheduler.config)
    own.__class__ = OneStep
    return own


def _step(scheduler: Any, level: float) -> int:
    steps = int(scheduler.config.num_train_timesteps)
    return max(round(level * steps), 1) - 1
