"""Train the embedded model: `python -m diffusers_concept_maps.shapes.train --output RUN_DIR --clips 300000`.

On a CPU, one single-threaded process per core is fastest: `torchrun --standalone --nproc-per-node 2 -m
diffusers_concept_maps.shapes.train ...`. On a GPU one process and `--batch 512`. Text encoder and transformer are
trained together on the v-prediction loss alone; attention is never supervised with the masks.

A run writes `checkpoint.safetensors` (weights and their moving average, half precision), `curve.csv` and, at the end,
the pipeline folder `pipeline/`. `--resume CHECKPOINT` continues; the optimizer's state is not kept, it warms up again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.attention_processor import Attention
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5EncoderModel

from diffusers_concept_maps.files import whole_file
from diffusers_concept_maps.shapes.captions import TEXT_LENGTH, training_captions
from diffusers_concept_maps.shapes.model import (
    build_pipeline,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
)
from diffusers_concept_maps.shapes.scenes import sample_scenes

_WARM_UP_STEPS, _HOLD, _FLOOR = 60, 0.5, 0.02  # of the learning rate: linear up, hold for half the run, linear down
_EMA_DECAY, _MAX_GRADIENT_NORM, _LOG_EVERY, _SAVE_SECONDS = 0.998, 1.0, 50, 300.0
_WORDS, _OUTSIDE = (0.3, 0.9), 0.3  # noise levels at which words matter; share of clips drawn from all levels alike
_COLUMNS = ("step", "clips", "seconds", "loss", "loss_low_noise", "loss_mid_noise", "loss_high_noise", "learning_rate")


class _PlainAttnProcessor:
    """The arithmetic of `CogVideoXAttnProcessor2_0` as two matrix products: 2.4 times faster in bfloat16 on a CPU."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text_length = encoder_hidden_states.size(1)
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            project(joint).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query) * query.shape[-1] ** -0.5, attn.norm_k(key)
        weights = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).softmax(-1)
        out = torch.bmm(weights, value.flatten(0, 1)).unflatten(0, query.shape[:2]).transpose(1, 2).flatten(2)
        out = attn.to_out[0](out)
        return out[:, text_length:], out[:, :text_length]


@dataclass
class _Model:
    """The two trained networks in bfloat16, and the float32 weights that the optimizers and the average work on."""

    transformer: CogVideoXTransformer3DModel
    text_encoder: T5EncoderModel
    master: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor]

    @classmethod
    def build(cls, device: torch.device) -> _Model:
        transformer, text_encoder = build_transformer(), build_text_encoder()
        master = {name: p.detach().clone().to(device) for name, p in cls._named(transformer, text_encoder)}
        average = {name: p.clone() for name, p in master.items()}
        if device.type == "cpu":
            transformer.set_attn_processor(_PlainAttnProcessor())
        networks: list[Any] = [transformer, text_encoder]
        for network in networks:
            network.to(device=device, dtype=torch.bfloat16)
        return cls(transformer, text_encoder, master, average)

    @staticmethod
    def _named(transformer: nn.Module, text_encoder: nn.Module) -> list[tuple[str, nn.Parameter]]:
        named = [(f"transformer.{n}", p) for n, p in transformer.named_parameters()]
        return named + [(f"text_encoder.{n}", p) for n, p in text_encoder.named_parameters()]

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        return self._named(self.transformer, self.text_encoder)

    @torch.no_grad()
    def publish(self, decay: float) -> None:
        """Copy the float32 weights into the networks and move the average towards them."""
        for name, parameter in self.parameters():
            parameter.copy_(self.master[name])
            self.average[name].lerp_(self.master[name], 1 - decay)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        stored = load_file(path)
        for name in self.master:
            self.master[name].copy_(stored[f"weights.{name}"])
            self.average[name].copy_(stored[f"average.{name}"])
        self.publish(decay=1.0)

    def save(self, path: Path, progress: dict[str, float]) -> None:
        tensors = {f"weights.{n}": p.detach().half().cpu() for n, p in self.master.items()}
        tensors |= {f"average.{n}": p.detach().half().cpu() for n, p in self.average.items()}
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata={"progress": json.dumps(progress)})

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Write the averaged weights as a half-precision pipeline folder that `from_pretrained` reads."""
        transformer, text_encoder = build_transformer(), build_text_encoder()
        for name, parameter in self._named(transformer, text_encoder):
            parameter.copy_(self.average[name])
        pipe = build_pipeline(transformer, text_encoder).to(torch.float16)
        # transformers loads weights in the dtype they have: a small float32 encoder fits whatever dtype is asked for.
        text_encoder.to(torch.float32)  # type: ignore[arg-type]
        pipe.save_pretrained(folder)


def _optimizers(model: _Model, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    inside = (".attn1.to_", ".ff.net.", ".SelfAttention.", ".DenseReluDense.")
    matrices: list[torch.Tensor] = []
    rest: list[torch.Tensor] = []
    for name, parameter in model.master.items():
        parameter.requires_grad_(True)
        is_matrix = parameter.ndim == 2 and any(part in name for part in inside) and "relative" not in name
        (matrices if is_matrix else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def _timesteps(quantile: torch.Tensor) -> torch.Tensor:
    """Noise levels at quantiles of their density: most of it where words matter, at levels 0.3 to 0.9.

    Above, nothing can be told from the noise; below, everything can be read off the picture.
    """
    below, inside = _OUTSIDE * _WORDS[0], 1 - _OUTSIDE + _OUTSIDE * (_WORDS[1] - _WORDS[0])
    corners = torch.tensor([0.0, below, below + inside, 1.0], device=quantile.device)
    levels = torch.tensor([0.0, *_WORDS, 1.0], device=quantile.device)
    part = (torch.bucketize(quantile, corners) - 1).clamp(0, 2)
    share = (quantile - corners[part]) / (corners[part + 1] - corners[part])
    return (levels[part].lerp(levels[part + 1], share) * 1000).long().clamp(0, 999)


def _weight(alpha: torch.Tensor) -> torch.Tensor:
    """Weight of the loss: the more of the picture is seen, the less is left to chance, and the less is the error."""
    return (1 + alpha / (1 - alpha) / 0.02).sqrt().clamp(max=4.0)


class _Objective:
    """The v-prediction loss on a fresh batch of scenes; noise levels are stratified over all processes."""

    def __init__(self, batch: int, rank: int, world: int, seed: int, device: torch.device) -> None:
        self.batch, self.rank, self.world, self.device = batch, rank, world, device
        self.rng = np.random.default_rng([seed, rank])
        self.generator = torch.Generator(device).manual_seed(seed * 1000 + rank)
        self.tokenizer = build_tokenizer()
        self.alphas = build_scheduler().alphas_cumprod.float().to(device)

    def __call__(self, model: _Model) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of every clip of the batch `[batch]`, in order of rising noise level, and its weight."""
        scenes = sample_scenes(self.batch, self.rng, device=self.device)
        captions = training_captions(scenes, self.rng)
        tokens = self.tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
        jitter = torch.rand(self.batch, generator=self.generator, device=self.device)
        stratum = torch.arange(self.batch, device=self.device) * self.world + self.rank
        timestep = _timesteps((stratum + jitter) / (self.batch * self.world))
        alpha = self.alphas[timestep].view(-1, 1, 1, 1, 1)
        noise = torch.randn(scenes.video.shape, generator=self.generator, device=self.device)
        noisy = alpha.sqrt() * scenes.video + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * scenes.video
        text = model.text_encoder(tokens.input_ids.to(self.device))[0]
        predicted = model.transformer(noisy.bfloat16(), text, timestep, return_dict=False)[0]
        loss: torch.Tensor = (predicted.float() - velocity).square().mean((1, 2, 3, 4))
        return loss, _weight(alpha.flatten())


def _reduce_gradients(model: _Model, world: int) -> None:
    """Average the gradients over the processes, clip their norm and hand them to the float32 weights."""
    named = model.parameters()
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).float().flatten() for _, p in named])
    if world > 1:
        dist.all_reduce(flat)
        flat /= world
    flat *= (_MAX_GRADIENT_NORM / (flat.norm() + 1e-6)).clamp(max=1.0)
    for (name, parameter), gradient in zip(named, flat.split([p.numel() for _, p in named]), strict=True):
        model.master[name].grad = gradient.view(parameter.shape)
        parameter.grad = None


def _progress(clips: int, seconds: float, arguments: argparse.Namespace, world: int) -> float:
    """Fraction of the run that is done: of its clips, or of its minutes if those end first; equal on every process."""
    limit = seconds / (60 * arguments.minutes) if arguments.minutes else 0.0
    fraction = torch.tensor([max(clips / arguments.clips, limit)])
    if world > 1:
        dist.broadcast(fraction, 0)
    return float(fraction)


def _learning_rate(peak: float, step: int, fraction: float) -> float:
    fade = min(1.0, max(_FLOOR, (1 - fraction) / (1 - _HOLD)))
    return peak * min(1.0, (step + 1) / _WARM_UP_STEPS) * fade


class _Log:
    """The curve as a CSV file and one printed line per `_LOG_EVERY` steps; appended to when a run is resumed."""

    def __init__(self, path: Path) -> None:
        self.path, self.losses = path, list[torch.Tensor]()
        if not path.exists():
            path.write_text(",".join(_COLUMNS) + "\n", encoding="utf-8")

    def add(self, losses: torch.Tensor, step: int, clips: int, seconds: float, rate: float) -> None:
        low, mid, high = (part.mean() for part in losses.detach().tensor_split(3))
        self.losses.append(torch.stack([losses.detach().mean(), low, mid, high]))
        if len(self.losses) < _LOG_EVERY:
            return
        means = [f"{value:.5f}" for value in torch.stack(self.losses).mean(0).tolist()]
        self.losses = []
        row = [str(step), str(clips), f"{seconds:.0f}", *means, f"{rate:.2e}"]
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(row)
        print(" ".join(f"{name}={value}" for name, value in zip(_COLUMNS, row, strict=True)), flush=True)


def _train(arguments: argparse.Namespace, rank: int, world: int, device: torch.device) -> None:
    model = _Model.build(device)
    if arguments.compile:
        model.transformer.compile(dynamic=False)
    step, clips, earlier = 0, 0, 0.0
    if arguments.resume:
        model.load(arguments.resume)
        with safe_open(arguments.resume, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
        step, clips, earlier = int(progress["step"]), int(progress["clips"]), float(progress.get("seconds", 0))
    optimizers = _optimizers(model, arguments.learning_rate)
    objective = _Objective(arguments.batch, rank, world, arguments.seed + step, device)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / "checkpoint.safetensors"
    log = _Log(output / "curve.csv") if rank == 0 else None
    start = saved = time.monotonic()
    first_step, first_clip = step, clips
    while (fraction := _progress(clips - first_clip, time.monotonic() - start, arguments, world)) < 1:
        rate = _learning_rate(arguments.learning_rate, step - first_step, fraction)
        losses, weights = objective(model)
        (losses * weights).mean().backward()
        _reduce_gradients(model, world)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        done = step - first_step + 1
        model.publish(decay=_EMA_DECAY if arguments.resume else min(_EMA_DECAY, done / (done + 9)))
        step, clips = step + 1, clips + arguments.batch * world
        if log:
            log.add(losses, step, clips, earlier + time.monotonic() - start, rate)
            if time.monotonic() - saved > _SAVE_SECONDS:
                saved = time.monotonic()
                model.save(checkpoint, {"step": step, "clips": clips, "seconds": earlier + saved - start})
    if rank == 0:
        model.save(checkpoint, {"step": step, "clips": clips, "seconds": earlier + time.monotonic() - start})
        model.export(output / "pipeline")


def main() -> None:
    """Parse the command line and train, in one process or in those that `torchrun` started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoint, curve and pipeline")
    parser.add_argument("--clips", type=int, default=300_000, help="clips to train on in this run")
    parser.add_argument("--minutes", type=float, default=None, help="end after this time if the clips last longer")
    parser.add_argument("--batch", type=int, default=8, help="clips per step and process")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile the transformer: a sixth faster on a CPU")
    parser.add_argument("--resume", type=Path, default=None, help="a checkpoint.safetensors to continue from")
    arguments = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    if device.type == "cpu":
        torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    _train(arguments, dist.get_rank() if world > 1 else 0, world, device)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
