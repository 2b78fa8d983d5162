"""Maps under the parity switches equal what the official implementations computed on the same weights and inputs.

The tensors are read from the folder that the environment variable `DCM_GOLDEN` names. Where it is not set these tests
are left out, and say so; `test_naive.py` checks the same formulas against an implementation of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

import diffusers_concept_maps as dcm
from diffusers_concept_maps.parity import CONCEPT_ATTENTION, IMAP

GOLDEN = os.environ.get("DCM_GOLDEN")
pytestmark = pytest.mark.skipif(GOLDEN is None, reason="DCM_GOLDEN does not name a folder of golden tensors")

SWITCHES = {"imap": IMAP, "concept_attention": CONCEPT_ATTENTION}
# The official names of the maps: "imap" is GramCol over all heads, "sel_imap" the paper's IMAP.
KEYS = {
    "concept_attention": "concept_attention_maps",
    "cross_attention": "cross_attention_maps",
    "gramcol": "imap",
    "imap": "sel_imap",
}
# Of the tensor's maximum; GramCol sums over all heads, whose z-scores are ill-conditioned where texts nearly agree.
TOLERANCE = {"concept_attention": 1e-4, "cross_attention": 1e-4, "gramcol": 5e-4, "imap": 1e-4}


class Golden:
    """A golden file, the stock transformer it was made with, and the call it was made by."""

    def __init__(self, path: Path) -> None:
        self.facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.tensors = load_file(path.with_suffix(".safetensors"))
        weights = {name[3:]: value for name, value in self.tensors.items() if name.startswith("sd.")}
        self.transformer = CogVideoXTransformer3DModel(**self.facts["config"]).eval()
        self.transformer.load_state_dict(weights)
        self.concepts: int = self.facts["n_concepts"]
        self.row: int = self.facts["cond_row"]
        self.embeds = self.tensors["in.concept_hidden_states"][self.row, : self.concepts]
        self.parity = {name: replace(switch, padded=self.facts["pad_concepts"]) for name, switch in SWITCHES.items()}

    def run(self) -> torch.Tensor:
        rotary = None
        if "in.rope_cos" in self.tensors:
            rotary = (self.tensors["in.rope_cos"], self.tensors["in.rope_sin"])
        with torch.no_grad():
            sample: torch.Tensor = self.transformer(
                hidden_states=self.tensors["in.hidden_states"],
                encoder_hidden_states=self.tensors["in.encoder_hidden_states"],
                timestep=self.tensors["in.timestep"],
                image_rotary_emb=rotary,
                return_dict=False,
            )[0]
        return sample

    def maps(self, method: str, **options: Any) -> torch.Tensor:
        """Map of the conditional row `[concept, token]`."""
        if method == "imap":
            options.setdefault("heads", dcm.HeadSelection(top_k=self.facts["topk"]))
        with dcm.trace(self.transformer, methods=[method], **options) as maps:
            self.run()
        return maps.get(method)[self.row].flatten(1)


def _golden(pattern: str) -> list[Any]:
    """The golden files of that name that `DCM_GOLDEN` holds."""
    paths = sorted(Path(GOLDEN).glob(pattern)) if GOLDEN else []
    missing = pytest.mark.skip(reason=f"DCM_GOLDEN holds no {pattern}")
    return [pytest.param(path, id=path.stem) for path in paths] or [pytest.param(None, id="none", marks=missing)]


def _assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.fixture(scope="module", params=_golden("imap_cogvideox_*.json"))
def imap(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="module", params=_golden("ca_cogvideox_*.json"))
def concept_attention(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def test_imap_sample_is_the_stock_sample(imap: Golden) -> None:
    assert torch.equal(imap.run(), imap.tensors["out.sample"])


@pytest.mark.parametrize("method", KEYS)
def test_imap_layers(imap: Golden, method: str) -> None:
    for layer in imap.facts["layers"]:
        actual = imap.maps(method, parity=imap.parity["imap"], concept_embeds=imap.embeds, layers=[layer])
        expected = imap.tensors[f"concepts.layer{layer}.{KEYS[method]}"][: imap.concepts]
        _assert_close(actual, expected, TOLERANCE[method])


@pytest.mark.parametrize("method", KEYS)
@pytest.mark.parametrize("suffix", ["", "_layers"])
def test_imap_mean_over_layers_and_double_softmax(imap: Golden, method: str, suffix: str) -> None:
    layers = imap.facts["imap_layer"] if suffix else imap.facts["layers"]
    for normalize, name in (("none", "raw"), ("softmax", "softmax")):
        actual = imap.maps(
            method, parity=imap.parity["imap"], concept_embeds=imap.embeds, layers=layers, normalize=normalize
        )
        expected = imap.tensors[f"concepts.agg.{name}.{KEYS[method]}{suffix}"][: imap.concepts]
        if normalize == "softmax":  # the tensors are the transformer's; the official pipeline adds a second softmax
            expected = expected.softmax(0)
        _assert_close(actual, expected, TOLERANCE[method])


@pytest.mark.parametrize("method", ["gramcol", "imap"])
def test_imap_prompt_tokens(imap: Golden, method: str) -> None:
    tokens = {f"token {i}": [i] for i in range(imap.facts["n_tokens"])}
    grid = imap.facts["grid"]
    for layer in imap.facts["layers"]:
        actual = imap.maps(method, parity=imap.parity["imap"], target="prompt", prompt_tokens=tokens, layers=[layer])
        expected = imap.tensors[f"prompt.layer{layer}.{KEYS[method]}"][: len(tokens)]
        # Where the best and the second token are this close, rounding decides which column is taken.
        gap = imap.tensors[f"prompt.layer{layer}.argmax_gap"][:, : len(tokens)].amin(0)  # [token, frame]
        clear = (gap > 1e-5).repeat_interleave(grid[1] * grid[2], dim=1)
        assert clear.float().mean() > 0.9
        _assert_close(actual * clear, expected * clear, TOLERANCE[method])


def test_imap_head_choice(imap: Golden) -> None:
    for layer in imap.facts["layers"]:
        chosen = imap.tensors[f"concepts.layer{layer}.sel_head_idx.chi"].tolist()
        official = imap.maps("imap", parity=imap.parity["imap"], concept_embeds=imap.embeds, layers=[layer])
        named = imap.maps("imap", parity=imap.parity["imap"], concept_embeds=imap.embeds, layers=[layer], heads=chosen)
        assert torch.equal(official, named)


@pytest.mark.parametrize("method", ["concept_attention", "cross_attention"])
def test_concept_attention(concept_attention: Golden, method: str) -> None:
    golden, layers = concept_attention, concept_attention.facts["layers"]
    options = {"parity": golden.parity["concept_attention"], "concept_embeds": golden.embeds}
    raw = golden.tensors[f"raw.{KEYS[method]}"][:, : golden.concepts]
    for layer in layers:
        _assert_close(golden.maps(method, layers=[layer], normalize="none", **options), raw[layer], 1e-4)
    aggregate = golden.tensors[f"agg.{KEYS[method]}"]
    _assert_close(golden.maps(method, layers=layers, **options), aggregate, 1e-4)


def test_parity_differs_from_the_default(imap: Golden) -> None:
    """The switches do something: the default maps are far from the official ones."""
    default: Callable[..., torch.Tensor] = imap.maps
    for method in KEYS:
        official = imap.maps(method, parity=imap.parity["imap"], concept_embeds=imap.embeds, normalize="none")
        ours = default(method, concept_embeds=imap.embeds, normalize="none")
        assert (official - ours).abs().max() > 0.05 * official.abs().max()
