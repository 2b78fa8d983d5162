"""The FLUX.1 transformer of the official ConceptAttention code, as a stock one with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from safetensors.torch import load_file

EMBEDDERS = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder", "vector_in": "text_embedder"}
STREAMS = {
    "img": (("to_q", "to_k", "to_v"), "to_out.0", "ff", ("norm_q", "norm_k"), "norm1"),
    "txt": (
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "to_add_out",
        "ff_context",
        ("norm_added_q", "norm_added_k"),
        "norm1_context",
    ),
}


class Golden:
    """A golden file, the stock transformer it was made with, and the call it was made by."""

    def __init__(self, path: Path) -> None:
        self.tensors = load_file(path.with_suffix(".safetensors"))
        params = json.loads(path.read_text(encoding="utf-8"))["params"]
        self.transformer = _make(params)
        self.transformer.load_state_dict(_convert(self.tensors, params))

    def run(self) -> torch.Tensor:
        names = {
            "hidden_states": "img",
            "encoder_hidden_states": "txt",
            "pooled_projections": "y",
            "timestep": "timesteps",
            "guidance": "guidance",
        }
        call = {name: self.tensors[f"in.{own}"] for name, own in names.items()}
        ids = {name: self.tensors[f"in.{name}"][0] for name in ("img_ids", "txt_ids")}
        with torch.no_grad():
            sample: torch.Tensor = self.transformer(**call, **ids, return_dict=False)[0]
        return sample


def _make(params: dict[str, Any]) -> Any:
    width, heads, ratio = params["hidden_size"], params["num_heads"], params["mlp_ratio"]
    transformer = FluxTransformer2DModel(
        in_channels=params["in_channels"],
        num_layers=params["depth"],
        num_single_layers=params["depth_single_blocks"],
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=params["context_in_dim"],
        pooled_projection_dim=params["vec_in_dim"],
        guidance_embeds=params["guidance_embed"],
        axes_dims_rope=tuple(params["axes_dim"]),
    )
    for block in transformer.transformer_blocks:  # the stock model has its own ratio fixed
        for name in ("ff", "ff_context"):
            setattr(block, name, FeedForward(width, width, mult=ratio, activation_fn="gelu-approximate"))
    for index in range(params["depth_single_blocks"]):
        block = FluxSingleTransformerBlock(width, heads, width // heads, mlp_ratio=ratio)
        transformer.single_transformer_blocks[index] = block
    return transformer.eval()


class _Weights:
    """Official weights by their stock names."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.official = {name[3:]: value for name, value in tensors.items() if name.startswith("sd.")}
        self.stock: dict[str, torch.Tensor] = {}

    def move(self, old: str, new: str) -> None:
        for part in ("weight", "bias"):
            self.stock[f"{new}.{part}"] = self.official[f"{old}.{part}"]

    def split(self, old: str, new: list[str]) -> None:
        width = self.official[f"{old}.weight"].shape[1]
        for part in ("weight", "bias"):
            whole = self.official[f"{old}.{part}"]
            sizes = [width] * 3 + [whole.shape[0] - 3 * width] * (len(new) - 3)
            for name, tensor in zip(new, whole.split(sizes), strict=True):
                self.stock[f"{name}.{part}"] = tensor

    def move_norms(self, old: str, new: str, names: tuple[str, ...]) -> None:
        for name, official in zip(names, ("query_norm", "key_norm"), strict=True):
            self.stock[f"{new}.{name}.weight"] = self.official[f"{old}.{official}.scale"]

    def move_dual(self, index: int) -> None:
        old, new = f"double_blocks.{index}", f"transformer_blocks.{index}"
        for stream, (linears, out, feed, norms, norm) in STREAMS.items():
            self.move(f"{old}.{stream}_mod.lin", f"{new}.{norm}.linear")
            self.split(f"{old}.{stream}_attn.qkv", [f"{new}.attn.{linear}" for linear in linears])
            self.move(f"{old}.{stream}_attn.proj", f"{new}.attn.{out}")
            self.move_norms(f"{old}.{stream}_attn.norm", f"{new}.attn", norms)
            self.move(f"{old}.{stream}_mlp.0", f"{new}.{feed}.net.0.proj")
            self.move(f"{old}.{stream}_mlp.2", f"{new}.{feed}.net.2")

    def move_single(self, index: int) -> None:
        old, new = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
        self.move(f"{old}.modulation.lin", f"{new}.norm.linear")
        self.split(f"{old}.linear1", [f"{new}.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")])
        self.move(f"{old}.linear2", f"{new}.proj_out")
        self.move_norms(f"{old}.norm", f"{new}.attn", ("norm_q", "norm_k"))

    def move_ends(self) -> None:
        self.move("img_in", "x_embedder")
        self.move("txt_in", "context_embedder")
        for old, new in EMBEDDERS.items():
            self.move(f"{old}.in_layer", f"time_text_embed.{new}.linear_1")
            self.move(f"{old}.out_layer", f"time_text_embed.{new}.linear_2")
        self.move("final_layer.linear", "proj_out")
        for part in ("weight", "bias"):
            shift, scale = self.official[f"final_layer.adaLN_modulation.1.{part}"].chunk(2)
            self.stock[f"norm_out.linear.{part}"] = torch.cat([scale, shift])


def _convert(tensors: dict[str, torch.Tensor], params: dict[str, Any]) -> dict[str, torch.Tensor]:
    weights = _Weights(tensors)
    weights.move_ends()
    for index in range(params["depth"]):
        weights.move_dual(index)
    for index in range(params["depth_single_blocks"]):
        weights.move_single(index)
    return weights.stock
