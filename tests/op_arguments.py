"""Arguments of every op as `dispatch` takes them, in shapes that no two axes share."""

from __future__ import annotations

from typing import Any

import torch

ROWS, HEADS, TEXTS, FRAMES, PLACES, WIDTH = 2, 3, 5, 3, 7, 32
TOKENS = FRAMES * PLACES
OPS = (
    "accumulate_similarity_",
    "attention_probabilities",
    "concept_attention",
    "frame_spread",
    "frame_statistics",
    "gram_columns",
    "query_key_argmax",
    "segment_attention",
    "similarity",
    "similarity_and_statistics",
    "temporal_matching",
)


def arguments(op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """The arguments of an op, the same on every call; `dtype` is that of what a model would hand in."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    text, *texts = random(3, ROWS, HEADS, TEXTS, WIDTH)
    images = random(2, ROWS, HEADS, TOKENS, WIDTH)
    frames = images[0].float().unflatten(2, (FRAMES, PLACES)).mean(3)
    weights = torch.tensor([[0.5, 0.0, 2.0], [1.0, 1.0, 0.0]]).to(device)
    count = torch.tensor([1.0, 1.0, 1.0, 1.0, 9.0]).to(device)
    index = torch.randint(PLACES, (ROWS, HEADS, TEXTS, FRAMES), generator=generator).to(device)
    source = images[:, :, :, :PLACES].flip(0)
    places = torch.tensor([[4, 0, 6, 3], [1, 5, 2, 2]]).to(device)
    mask = torch.tensor([[True] * TEXTS, [True, True, False, False, False]]).to(device)
    table: dict[str, tuple[Any, ...]] = {
        "accumulate_similarity_": (random(ROWS, TEXTS, TOKENS).float(), text, images[0], weights, 0.5),
        "attention_probabilities": (images[0], text, torch.tensor([4, 1]).to(device), weights, images[1]),
        "concept_attention": (text, *texts, *images, count),
        "frame_spread": (images[0], frames - frames.mean(2, keepdim=True), FRAMES),
        "frame_statistics": (images[0], FRAMES),
        "gram_columns": (images[0], index, weights, "text", count),
        "query_key_argmax": (images[0], text, FRAMES),
        "segment_attention": (images[0], places, text, images[1], mask, weights, FRAMES, 0.25),
        "similarity": (text, images[0], weights, 0.5, "clip", None),
        "similarity_and_statistics": (text, images[0], weights, FRAMES),
        "temporal_matching": (*source, *images, places, weights, FRAMES, PLACES, 0.25, "both", 1),
    }
    return table[op]


def results(returned: Any, given: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """What an op returned, or its first argument where it returned nothing and changed that."""
    if returned is None:
        return (given[0],)
    return returned if isinstance(returned, tuple) else (returned,)
