"""Cross-attention guidance as the paper has it: all rows in one batch, attention with all its weights, three terms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backbones.tiny_cogvideox import TEXT_LENGTH

STEPS = 3


def may_see(tokens: int, start: int, frames: int, size: int) -> torch.Tensor:
    """Which tokens see one another `[S, S]`, where the tokens of frames see none of other frames."""
    frame = torch.full((tokens,), -1)
    frame[start : start + frames * size] = torch.arange(frames).repeat_interleave(size)
    return (frame[:, None] == frame) | (frame[:, None] < 0) | (frame < 0)


def cut(logits: torch.Tensor, allowed: torch.Tensor, mode: str) -> torch.Tensor:
    """Weights of attention without what is not allowed: set to 0, or the others scaled to 1 again."""
    if mode == "renorm":
        return logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    return logits.softmax(-1) * allowed


class NaiveProcessor:
    """Attention of CogVideoX; the last `rows` of the batch do not see other frames."""

    def __init__(self, frames: int, rows: int, mode: str) -> None:
        self.frames, self.rows, self.mode = frames, rows, mode

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        heads = [layer(joint).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k)]
        query, key = (norm(tensor) for norm, tensor in zip((attn.norm_q, attn.norm_k), heads, strict=True))
        value = attn.to_v(joint).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        if image_rotary_emb is not None:
            cosines, sines = image_rotary_emb
            for tensor in (query, key):
                image = tensor[:, :, text:]
                turned = torch.stack([-image[..., 1::2], image[..., 0::2]], -1).flatten(-2)
                tensor[:, :, text:] = image * cosines + turned * sines
        logits = query @ key.mT / math.sqrt(query.shape[-1])
        weights = logits.softmax(-1)
        if self.rows:
            size = hidden_states.shape[1] // self.frames
            allowed = may_see(joint.shape[1], text, self.frames, size)
            weights[-self.rows :] = cut(logits[-self.rows :], allowed, self.mode)
        states = attn.to_out[0]((weights @ value).transpose(1, 2).flatten(2))
        return states[:, text:], states[:, :text]


def three_way(
    pipe: Any,
    prompts: list[str],
    latents: torch.Tensor,
    *,
    layers: tuple[int, ...],
    scale: float = 1.0,
    guidance_scale: float = 4.0,
    use_dynamic_cfg: bool = False,
    mode: str = "zero",
    steps: tuple[int, ...] = tuple(range(STEPS)),
) -> torch.Tensor:
    """Latents of CogVideoX by `u + w (c - u) + s (c - p)`, or `c + s (c - p)` without classifier-free guidance.

    The pipeline's transformer is given other attention processors for good.
    """
    rows, frames = len(prompts), latents.shape[1]
    guided = guidance_scale > 1
    cond, uncond = pipe.encode_prompt(prompts, None, guided, max_sequence_length=TEXT_LENGTH)
    text = torch.cat([uncond, cond, cond] if guided else [cond, cond])
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        block.attn1.processor = NaiveProcessor(frames, rows if index in layers else 0, mode)
    rope = pipe._prepare_rotary_positional_embeddings(8 * latents.shape[3], 8 * latents.shape[4], frames, "cpu")
    pipe.scheduler.set_timesteps(STEPS)
    for step, time in enumerate(pipe.scheduler.timesteps):
        batch = torch.cat([latents] * (text.shape[0] // rows))
        with torch.no_grad():
            predicted = pipe.transformer(
                hidden_states=batch,
                encoder_hidden_states=text,
                timestep=time.expand(batch.shape[0]),
                image_rotary_emb=rope,
                return_dict=False,
            )[0]
        *without, prediction, perturbed = predicted.split(rows)
        weight = guidance_scale
        if use_dynamic_cfg:
            weight = 1 + guidance_scale * (1 - math.cos(math.pi * ((STEPS - time.item()) / STEPS) ** 5.0)) / 2
        noise = without[0] + weight * (prediction - without[0]) if guided else prediction
        noise = noise + (scale if step in steps else 0.0) * (prediction - perturbed)
        latents = pipe.scheduler.step(noise, time, latents, return_dict=False)[0]
    return latents


@contextmanager
def attention_cut(tokens: int, start: int, frames: int, size: int, *, layer: int, mode: str) -> Iterator[None]:
    """Within the context PyTorch's attention is naive, and its call number `layer` over that many tokens is cut."""
    stock, calls = torch.nn.functional.scaled_dot_product_attention, 0

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, **options: Any
    ) -> torch.Tensor:
        nonlocal calls
        if query.shape[2] != tokens or key.shape[2] != tokens:
            return stock(query, key, value, attn_mask=attn_mask, **options)
        logits = query @ key.mT / math.sqrt(query.shape[-1])
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        weights = cut(logits, may_see(tokens, start, frames, size), mode) if calls == layer else logits.softmax(-1)
        calls += 1
        return weights @ value

    torch.nn.functional.scaled_dot_product_attention = attend
    try:
        yield
        assert calls > layer
    finally:
        torch.nn.functional.scaled_dot_product_attention = stock
