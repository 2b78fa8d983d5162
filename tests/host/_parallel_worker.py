"""One of two processes that share the tokens of a model: `python _parallel_worker.py RANK FOLDER`, with gloo.

It saves frames and maps under context parallelism, and what the host says where it has none, for the tests.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from backbones._case import seeded
from backbones._oracle import embeds_of, kept_state
from backbones.tiny_flux import inputs as flux_inputs
from backbones.tiny_flux import positions
from diffusers import ContextParallelConfig
from host._families import FAMILIES, FLUX, WAN, Case

import diffusers_concept_maps as dcm

RUNS = ("before", "while attached", "any length")


def inputs_of(case: Case) -> dict[str, Any]:
    """Of a batch of two, with tokens that two processes can share alike: gloo gathers nothing else."""
    if case is FLUX:
        return flux_inputs(2, 6, 1, ids=positions(4, 3))
    return {**case.inputs(2, 6, 1), "hidden_states": seeded(2, 16, 3, 8, 6, seed=2)}


def enable(transformer: Any, how: str) -> None:
    transformer.enable_parallelism(
        config=ContextParallelConfig(ulysses_degree=2, ulysses_anything=how == "any length")
    )


def record(case: Case, transformer: Any, inputs: dict[str, Any], how: str) -> dict[str, torch.Tensor]:
    """Frames with and without a capture, and maps of concepts and of words of the prompt."""
    if how != "while attached":
        enable(transformer, how)
    tensors = {}
    with torch.no_grad(), dcm.trace(transformer, concept_embeds=embeds_of(case), methods=case.methods) as maps:
        if how == "while attached":
            enable(transformer, how)
        tensors["on"] = transformer(**inputs, return_dict=False)[0]
    words = {"a": [0], "b": [3, 4]}
    target = {"target": "prompt", "prompt_tokens": words, "methods": ["cross_attention"]}
    before = kept_state(transformer)
    with torch.no_grad(), dcm.trace(transformer, list(words), **target) as of_words:
        transformer(**inputs, return_dict=False)
    assert kept_state(transformer) == before
    with torch.no_grad():
        tensors["off"] = transformer(**inputs, return_dict=False)[0]
    return tensors | {method: maps.get(method) for method in case.methods} | {"words": of_words.get()}


def refusal(case: Case) -> str:
    """What the host says where a model has no plan for it."""
    try:
        enable(case.make(), "before")
    except ValueError as error:
        return str(error)
    return "nothing"


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.accelerator.device_count = lambda: 1  # the host divides by it, and a CPU has none
    results = {
        f"{case.name} {how}": record(case, case.make(), inputs_of(case), how) for case in (FLUX, WAN) for how in RUNS
    }
    refusals = {case.name: refusal(case) for case in FAMILIES if case not in (FLUX, WAN)}
    torch.save((results, refusals), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
