"""A LoRA for any transformer."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig


def add_lora(transformer: Any) -> None:
    """Random numbers on every linear layer, those that concepts pass before the blocks among them."""
    names = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=names))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
