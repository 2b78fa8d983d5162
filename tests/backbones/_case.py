"""What a tiny stock model has to say of itself, so that the contract of all backbones can be tested on it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Inputs = dict[str, Any]
"""Arguments of a transformer by name."""


@contextmanager
def append_to_text(transformer: Any, inputs: Inputs, embeds: torch.Tensor) -> Iterator[Inputs]:
    """Concepts join the text where the transformer takes it; for models that give text neither mask nor position."""
    text = inputs["encoder_hidden_states"]
    yield {**inputs, "encoder_hidden_states": torch.cat([text, embeds.expand(text.shape[0], -1, -1).to(text)], 1)}


@dataclass(frozen=True)
class Case:
    """A tiny random transformer of a stock class.

    Attributes:
        name: of the case in test reports.
        make: a new transformer in float32, `shake`n, in evaluation mode; the same at every call.
        inputs: from batch size, number of text tokens and seed to the arguments of a forward pass in float32; rows of
            a batch differ, and so do seeds.
        grid: frames, height and width of the token grid of these inputs.
        image_first: in the joint sequence the image comes before the text.
        joint: text and image attend jointly; False where the image reads a text that no block updates.
        layers: number of layers that can be traced.
        text_width: width of the text encoder states that the transformer takes.
        text_lengths: numbers of text tokens to try.
        start: image tokens in front of the grid.
        behind: image tokens behind the grid.
        row_by_row: attention is called for every row of the batch by itself.
        joining: how concepts become text rows of the model itself, behind its own, seen by nobody thanks to the
            attention that `oracle` puts in place of PyTorch's; within the context, the arguments to call it with.
        pipeline: a new tiny stock pipeline around such a transformer, None if there is none.
        call: from pipeline, list of prompts and options of its call to latents; seeded, three steps, with guidance.
        guidance: "batched", "two passes" (the conditional one first) or "none" in such a call.
        frames_per_prompt: name of the pipeline's argument for several videos or images per prompt.
        real_call: what else the pipeline is called with where a clip is put into it.
    """

    name: str
    make: Callable[[], Any]
    inputs: Callable[[int, int, int], Inputs]
    grid: tuple[int, int, int]
    image_first: bool
    layers: int
    text_width: int
    joint: bool = True
    text_lengths: tuple[int, ...] = (1, 5)
    start: int = 0
    behind: int = 0
    row_by_row: bool = False
    joining: Callable[[Any, Inputs, torch.Tensor], AbstractContextManager[Inputs]] = append_to_text
    pipeline: Callable[[], Any] | None = None
    call: Callable[..., torch.Tensor] | None = None
    guidance: str = "batched"
    frames_per_prompt: str = "num_videos_per_prompt"
    real_call: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that the topology allows."""
        return (*(["concept_attention"] if self.joint else []), "cross_attention", "gramcol", "imap")

    def has_maps(self, length: int) -> bool:
        """Whether maps differ between tokens: to all that read it alone, one text token gives the same."""
        return self.joint or length > 1

    @property
    def tokens(self) -> int:
        """Number of tokens of the grid."""
        frames, height, width = self.grid
        return frames * height * width


def randomize(transformer: Any) -> Any:
    """Weights large enough for maps that are not flat, and norms and biases off their initial ones and zeros."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            elif "norm" not in name:
                parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
    return transformer.eval()


def seeded(*shape: int, seed: int) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cast_inputs(inputs: Mapping[str, Any], dtype: torch.dtype) -> Inputs:
    """The floating tensors among the arguments in that dtype, timesteps and positions excepted."""
    kept = ("timestep", "img_ids", "txt_ids", "guidance", "image_rotary_emb")
    return {
        name: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in kept
        else value
        for name, value in inputs.items()
    }


def in_double(case: Case, inputs: Inputs) -> tuple[Any, Inputs]:
    """The transformer and its arguments in float64, for the oracle."""
    return deepcopy(case.make()).double(), cast_inputs(inputs, torch.float64)


def call_for_images(pipe: Any, prompts: list[str], **options: Any) -> torch.Tensor:
    """A seeded run of three guided steps to the latents of small images; `options` go to the pipeline."""
    settings: dict[str, Any] = {
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "height": 20,
        "width": 12,
        "max_sequence_length": 12,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    latents: torch.Tensor = pipe(prompts, **(settings | options)).images
    return latents


def find_cases() -> list[Case]:
    """The cases of every module beside this one that has some."""
    folder = Path(__file__).parent
    names = sorted(module.name for module in pkgutil.iter_modules([str(folder)]) if module.name.startswith("tiny_"))
    modules = [importlib.import_module(f"backbones.{name}") for name in names]
    return [case for module in modules for case in getattr(module, "CASES", ())]
