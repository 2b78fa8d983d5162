"""What a call has to move and to compute at least: the bytes and operations that its floor is made of.

Every argument that is read is read once, and once more where a result needs a mean over all tokens first; of the
spread that is the mean of the first frame. Every result is written once. Operations are those of the matrix products,
two for a multiplication and an addition.
"""

from __future__ import annotations

from typing import Any

import torch
from kernel_inputs import Call, Sizes

_UNREAD = {
    # of `temporal_matching`, by direction
    "forward": {"source_key", "target_query"},
    "backward": {"source_query", "target_key"},
}
_READ_TWICE = {
    ("gram_columns", "clip"): "image_output",
    ("similarity", "clip"): "image",
}


def bytes_moved(call: Call, results: tuple[torch.Tensor, ...]) -> int:
    """Bytes of the arguments that are read and of the results; what is updated in place is both."""
    unread = _UNREAD.get(call.variant, set()) if call.op == "temporal_matching" else set()
    tensors = {name: x for name, x in call.arguments.items() if isinstance(x, torch.Tensor) and name not in unread}
    twice = _READ_TWICE.get((call.op, call.variant))
    again = _bytes(tensors[twice]) if twice else 0
    if call.op == "frame_spread":
        again = _bytes(tensors["image_output"]) // call.arguments["frames"]
    return sum(map(_bytes, tensors.values())) + again + sum(map(_bytes, results))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def operations(call: Call, sizes: Sizes) -> int:
    """Operations of the matrix products."""
    heads, image, texts = sizes.rows * sizes.heads * sizes.head_width, sizes.tokens, sizes.concepts
    one = 2 * heads * texts * image  # text rows by image tokens
    if call.op in ("frame_statistics", "frame_spread"):
        return 0
    if call.op == "concept_attention":  # queries by keys, weights by values
        return 4 * heads * texts * (image + texts)
    if call.op == "attention_probabilities":
        return 2 * heads * image * (sizes.text + (image if call.variant == "all keys" else 0))
    if call.op == "temporal_matching":  # for the sums of the softmax, then for the weights
        return 4 * heads * sizes.in_frame * image * (2 if call.variant == "both" else 1)
    if call.op == "segment_attention":
        return 4 * heads * sizes.in_frame * (image + _text_keys(call.arguments))
    return one


def _text_keys(arguments: dict[str, Any]) -> int:
    keys: torch.Tensor = arguments["text_key"]
    return keys.shape[2]
