"""The naive float64 CogVideoX for every variant of it."""

from __future__ import annotations

import copy
import math
from typing import Any

import naive
import torch


class NaiveVariant(naive.NaiveCogVideoX):
    """The naive model with what the variants add: tokens of several frames, learned positions, `ofs` and faces."""

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer)
        self.host = copy.deepcopy(transformer).double()  # its face modules are taken as they are

    def run(self, call: dict[str, Any], rows: slice, embeds: torch.Tensor) -> tuple[torch.Tensor, list[naive.Taps]]:
        """Noise prediction of some rows of a batch, and what every layer shows of them."""
        latents, text = call["hidden_states"][rows].double(), call["encoder_hidden_states"][rows].double()
        time = self.time(call["timestep"].expand(len(call["hidden_states"]))[rows])
        if self.config.get("ofs_embed_dim"):
            time = time + self.offset(call["ofs"])
        cells, grid = self.patchify(latents)
        image, text = self.linear("patch_embed.proj", cells), self.linear("patch_embed.text_proj", text)
        concepts = self.linear("patch_embed.text_proj", embeds.double()).expand(len(latents), -1, -1)
        if self.config.use_learned_positional_embeddings:
            trained = latents.shape[1] == (self.config.sample_frames - 1) // 4 + 1
            table = self.weights["patch_embed.pos_embedding"][0] if trained else None
            words = text.shape[1]
            image = image + (self.positions(grid) if table is None else table[words:])
            text = text + (0 if table is None else table[:words])
            concepts = concepts + (0 if table is None else table[0])
        seen = []
        for layer in range(self.config.num_layers):
            image, text, concepts, taps = self.block(layer, image, text, concepts, time, call["image_rotary_emb"])
            if self.config.get("is_train_face") and layer % self.config.cross_attn_interval == 0:
                image = image + self.faces(layer, call, image)
            seen.append(taps)
        return self.unpatchify(image, time, grid), seen

    def offset(self, value: torch.Tensor) -> torch.Tensor:
        half = self.config.ofs_embed_dim // 2
        angles = value[:, None].double() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        sinusoid = torch.cat([angles.cos(), angles.sin()], -1)
        return self.linear("ofs_embedding.linear_2", naive.silu(self.linear("ofs_embedding.linear_1", sinusoid)))

    def patchify(self, latents: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
        deep, side = self.config.get("patch_size_t") or 1, self.config.patch_size
        rows, frames, channels, height, width = latents.shape
        grid = (frames // deep, height // side, width // side)
        cells = latents.reshape(rows, grid[0], deep, channels, grid[1], side, grid[2], side)
        cells = cells.permute(0, 1, 4, 6, 3, 2, 5, 7)
        return cells.reshape(rows, math.prod(grid), channels * deep * side * side), grid

    def unpatchify(self, image: torch.Tensor, time: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        deep, side, channels = self.config.get("patch_size_t") or 1, self.config.patch_size, self.config.out_channels
        shift, scale = self.linear("norm_out.linear", naive.silu(time))[:, None].chunk(2, -1)
        image = self.norm("norm_out.norm", self.norm("norm_final", image)) * (1 + scale) + shift
        cells = self.linear("proj_out", image).reshape(-1, *grid, channels, deep, side, side)
        frames = cells.permute(0, 1, 5, 4, 2, 6, 3, 7)
        return frames.reshape(-1, grid[0] * deep, channels, grid[1] * side, grid[2] * side)

    def faces(self, layer: int, call: dict[str, Any], image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            vision = [states.double() for states in call["id_vit_hidden"]]
            face = self.host.local_facial_extractor(call["id_cond"].double(), vision)
            module = self.host.perceiver_cross_attention[layer // self.config.cross_attn_interval]
            joined: torch.Tensor = self.host.local_face_scale * module(face, image)
        return joined
