"""The full matrix of the contract for the five main families; one command, whose last result is in docs/.

    python tests/backbones/full_matrix.py --write docs/contract_matrix.md

Per model, dtype, fused or separate projections, batch size and number of text tokens: the output with a capture of all
methods equals the stock output bit for bit, the undo is exact and, in float32, maps are those of the float64 oracle.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a test suite it finds its helpers by itself
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import conftest  # noqa: F401  # threads and quiet libraries, before torch is imported

import diffusers
import torch
from backbones._case import Case, cast_inputs, find_cases
from backbones._oracle import embeds_of, kept_state, layer_taps
from naive import all_heads, best_heads, saliency

import diffusers_concept_maps as dcm

FAMILIES = (
    "CogVideoXTransformer3DModel",
    "WanTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = range(3, 13)
NORMALIZATIONS = {"concept_attention": "softmax", "cross_attention": "softmax", "gramcol": "zscore", "imap": "zscore"}


@dataclass(frozen=True)
class Row:
    """One combination."""

    case: Case
    family: str
    dtype: torch.dtype
    fused: bool
    batch: int
    text: int

    def __str__(self) -> str:
        projections = "fused" if self.fused else "separate"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.case.name} | {dtype} | {projections} | {self.batch} | {self.text}"


def rows() -> Iterator[Row]:
    """Every combination that stock diffusers has: not every model can fuse its projections."""
    for case in find_cases():
        family = type(case.make()).__name__
        if family not in FAMILIES:
            continue
        lengths = sorted({*case.text_lengths, *(() if len(case.text_lengths) == 1 else (1, 3, 7, 16))})
        for dtype, fused, batch, text in itertools.product(DTYPES, (False, True), (1, 2), lengths):
            if not fused or can_fuse(case):
                yield Row(case, family, dtype, fused, batch, text)


def can_fuse(case: Case) -> bool:
    """Whether fusing changes anything in this model, and the stock model runs then."""
    transformer = case.make()
    if not hasattr(transformer, "fuse_qkv_projections"):
        return False
    before = set(transformer.state_dict())
    transformer.fuse_qkv_projections()
    if set(transformer.state_dict()) == before:
        return False
    try:
        _output(transformer, case.inputs(1, case.text_lengths[-1], SEEDS[0]))
    except AttributeError:  # SD3.5 medium: the host's fused processor needs text, which some of its attention has not
        return False
    return True


def check(row: Row) -> str:
    """What is wrong with a combination; empty if nothing is."""
    case, embeds = row.case, embeds_of(row.case)
    transformer = case.make().to(row.dtype)
    if row.fused:
        transformer.fuse_qkv_projections()
    seed, expected = _expected(row) if row.dtype == torch.float32 else (SEEDS[0], {})
    inputs = cast_inputs(case.inputs(row.batch, row.text, seed), row.dtype)
    before, off = kept_state(transformer), _output(transformer, inputs)
    chosen = {method: dcm.HeadSelection(top_k=2) if method == "imap" else None for method in case.methods}
    maps = {}
    for method, heads in chosen.items():
        with dcm.trace(transformer, concept_embeds=embeds, methods=[method], heads=heads) as traced:
            on = _output(transformer, inputs)
        maps[method] = traced.get()
        if not torch.equal(on, off):
            return f"{method} changes the output by {(on - off).abs().max().item():.1e}"
        if kept_state(transformer) != before:
            return f"{method} leaves something behind"
    if not torch.equal(_output(transformer, inputs), off):
        return "the output after the captures differs"
    return "; ".join(filter(None, (_compare(method, got, expected.get(method)) for method, got in maps.items())))


def _output(transformer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = transformer(**inputs, return_dict=False)[0]
    return output


def _expected(row: Row) -> tuple[int, dict[str, torch.Tensor]]:
    """A seed whose inputs leave no choice of anchors or heads to rounding, and the maps of the oracle."""
    case = row.case
    for seed in SEEDS:
        taps = layer_taps(case, case.inputs(row.batch, row.text, seed), embeds_of(case))
        maps = {}
        try:
            # A single text token gives all image tokens the same output in cross-attention, which maps nothing.
            for method in case.methods if case.joint or row.text > 1 else ("cross_attention",):
                rule = best_heads(2) if method == "imap" and case.grid[0] > 1 else all_heads
                maps[method] = saliency([taps], method, NORMALIZATIONS[method], case.grid, rule)
        except AssertionError as error:  # how the oracle refuses near ties
            print(f"{row} | seed {seed}: {error}", flush=True)
        else:
            return seed, maps
    raise RuntimeError(f"{row}: no seed of {SEEDS} is without near ties; add more")


def _compare(method: str, got: torch.Tensor, expected: torch.Tensor | None) -> str:
    """What is wrong with a map; without one to compare it with it has to be finite."""
    if expected is None:
        return "" if got.isfinite().all() else f"{method} is not finite"
    error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
    return "" if error <= 1e-4 else f"{method} is {error:.1e} off"


def report(results: dict[Row, str]) -> str:
    """The result as a page."""
    lines = [
        "# The contract, in full",
        "",
        "Every combination is a tiny random model of a stock class. The output under a capture of all methods equals",
        "the stock output bit for bit, nothing is left behind, and in float32 maps are those of a float64 oracle to",
        "1e-4 of their maximum. Written by `python tests/backbones/full_matrix.py --write docs/contract_matrix.md`",
        f"with diffusers {diffusers.__version__} and torch {torch.__version__.partition('+')[0]}.",
        "",
        "| model | dtypes | projections | batch sizes | text tokens | combinations | result |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, group in itertools.groupby(results, lambda row: row.case.name):
        members = list(group)
        wrong = [f"{row}: {results[row]}" for row in members if results[row]]
        cells = [
            ", ".join(dict.fromkeys(str(row.dtype).removeprefix("torch.") for row in members)),
            ", ".join(dict.fromkeys("fused" if row.fused else "separate" for row in members)),
            ", ".join(dict.fromkeys(str(row.batch) for row in members)),
            ", ".join(dict.fromkeys(str(row.text) for row in members)),
            str(len(members)),
            "; ".join(wrong) or "all hold",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Check, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="Markdown file to write the result to")
    options = parser.parse_args()
    results: dict[Row, str] = {}
    for row in rows():
        results[row] = check(row)
        print(f"{row} | {results[row] or 'ok'}", flush=True)
    text = report(results)
    print(text)
    if options.write:
        options.write.write_text(text)
    if any(results.values()):
        raise SystemExit(f"{sum(map(bool, results.values()))} of {len(results)} combinations do not hold")


if __name__ == "__main__":
    main()
