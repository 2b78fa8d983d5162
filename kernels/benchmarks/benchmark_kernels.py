"""What the kernels cost on a GPU: against the least they could, against PyTorch, and in a block of CogVideoX-5B.

First every kernel is compared with float64; where one is too far from it, the program ends there. Then, in one run:

1. every kernel against its floor: bytes and operations, counted, over the bandwidth and matrix rate of the card, both
   measured;
2. every kernel against the PyTorch reference;
3. the attention of 8 concept rows by every backend of PyTorch and by the kernel;
4. a block of CogVideoX-5B (48 heads x 64, 13 x 30 x 45 tokens, 226 prompt tokens, batch 2, bfloat16) as it is, traced
   with `imap` and `concept_attention` for 8 concepts, and with the published algorithm written plainly.

Pairs are timed in turns by CUDA events; results are medians, with the 95% bootstrap interval of the median ratio.
`--dry-run` does all of it at tiny sizes on the CPU, the kernels in Triton's interpreter, and prints no figure.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
import triton
from block_subject import CONCEPTS, FULL, METHODS, SMALL, BlockSubject, Run
from gpu_clock import Ceilings, Clock, Paired, measure_ceilings, paired
from kernel_floors import bytes_moved, operations
from kernel_inputs import OPS, Call, Inputs, Sizes, calls
from kernel_oracle import ORACLES, distances
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import concept_map_kernels
from diffusers_concept_maps import dispatch, reference, reference_matching

TRACED_RATIO = 1.03  # of a traced block over a stock one, at most
FLOOR_SHARE = 0.6  # of a kernel's time that its floor is, at least
EXTRA_MEMORY = 0.02  # of the stock peak, at most
INTERPRETED_DISTANCE = 1.6e-2  # the interpreter truncates where it casts to bfloat16
ONE_PASS_DISTANCE = 2e-2  # of the output, in bfloat16
INDICES = 1e-3  # share of indices that may differ where two values are equal but for rounding
FULL_SIZES = Sizes(1, 48, 13, 30, 45, 64, CONCEPTS, 226)
SMALL_SIZES = Sizes(1, 2, 3, 3, 5, 32, 3, 7)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def figure(value: float, form: str) -> str:
    """A number, or that there is none."""
    return "not measured" if value != value else format(value, form)


def verdict(value: float, met: bool) -> str:
    """Whether a target is met."""
    return "not measured" if value != value else "met" if met else "MISSED"


def ratio(times: Paired) -> str:
    """Median ratio with its interval."""
    if not times.pairs:
        return "not measured"
    return f"{times.ratio:.3f} ({times.low:.3f} to {times.high:.3f}, {times.pairs} pairs)"


def print_row(*cells: str) -> None:
    """A line of a Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def of_reference(op: str) -> Callable[..., Any]:
    """The PyTorch function of an operation."""
    return getattr(reference, op, None) or getattr(reference_matching, op)


def results_of(function: Callable[..., Any], call: Call) -> tuple[torch.Tensor, ...]:
    """What a function returns, or what it has updated in place, from unchanged arguments."""
    arguments = dict(call.arguments)
    if "total" in arguments:
        arguments["total"] = arguments["total"].clone()
    returned = function(**arguments)
    if returned is None:
        return (arguments["total"],)
    return returned if isinstance(returned, tuple) else (returned,)


def label(call: Call) -> str:
    """Operation and variant."""
    return f"{call.op}, {call.variant}" if call.variant else call.op


def enabled_calls(inputs: Inputs) -> Iterator[Call]:
    """The calls for which there is a kernel; says which have none."""
    for op in OPS:
        for call in calls(op, inputs):
            if concept_map_kernels.supports(op, *call.arguments.values()):
                yield call
            else:
                print(f"{op} {call.variant}: no kernel is enabled for this size and dtype")


def check(inputs: Inputs, *, interpreted: bool) -> None:
    """Compare every kernel with float64.

    Raises:
        SystemExit: one is too far from it.
    """
    print("\nDistance to float64, of the kernel and of the reference\n", flush=True)
    for call in enabled_calls(inputs):
        exact = ORACLES[call.op](**call.arguments)
        kernel = results_of(getattr(concept_map_kernels, call.op), call)
        ours, theirs = distances(kernel, exact), distances(results_of(of_reference(call.op), call), exact)
        print(f"{label(call)}: " + ", ".join(f"{a:.1e} / {b:.1e}" for a, b in zip(ours, theirs, strict=True)))
        for result, mine, plain in zip(kernel, ours, theirs, strict=True):
            limit = 2 * plain + (1e-6 if result.is_floating_point() else INDICES)
            if interpreted and result.is_floating_point():
                limit = max(limit, INTERPRETED_DISTANCE)
            if not mine <= limit:
                raise SystemExit(f"{label(call)} is {mine:.2e} from float64, at most {limit:.2e}: no times")


def time_kernels(inputs: Inputs, clock: Clock, ceilings: Ceilings, pairs: int) -> None:
    """Print every kernel against its floor and against the reference."""
    print(f"\nKernels; the floor is wanted to be at least {FLOOR_SHARE:.0%} of the time\n")
    print_row("operation", "kernel, us", "floor, us", "floor / kernel", "target", "kernel / reference")
    print_row(*["---"] * 6)
    for call in enabled_calls(inputs):
        kernel, plain = getattr(concept_map_kernels, call.op), of_reference(call.op)
        moved = bytes_moved(call, results_of(kernel, call))
        times = clock.pair(_bound(kernel, call), _bound(plain, call), pairs)
        floor = ceilings.floor(moved, operations(call, inputs.sizes))
        share = floor / times.first
        cells = (figure(1e3 * times.first, ".0f"), figure(1e3 * floor, ".0f"), figure(share, ".0%"))
        print_row(label(call), *cells, verdict(share, share >= FLOOR_SHARE), ratio(times))


def _bound(function: Callable[..., Any], call: Call) -> Callable[[], object]:
    return lambda: function(**call.arguments)


def time_backends(inputs: Inputs, clock: Clock) -> None:
    """Print the attention of the concept rows by every backend; keys and values are joined beforehand."""
    print(f"\nAttention of {inputs.sizes.concepts} concept rows\n")
    print_row("backend", "us")
    print_row("---", "---")
    call = next(calls("concept_attention", inputs))
    query, keys, values = call.arguments["query"], *_joined(call.arguments)
    for name, backend in BACKENDS.items():

        def attend(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(query, keys, values)

        try:
            shown = figure(1e3 * clock.median(attend), ".0f")
        except RuntimeError as error:
            shown = f"not available ({str(error).splitlines()[0]})"
        print_row(name, shown)
    kernel = _bound(concept_map_kernels.concept_attention, call)
    print_row("kernel, keys not joined", figure(1e3 * clock.median(kernel), ".0f"))


def _joined(arguments: dict[str, Any]) -> Iterator[torch.Tensor]:
    for own, image in (("key", "image_key"), ("value", "image_value")):
        yield torch.cat([arguments[own], arguments[image]], dim=2)


def time_block(subject: BlockSubject, pairs: int) -> None:
    """Print the block, watched in every way, against the stock one."""
    print(f"\nBlock, {CONCEPTS} concepts, {' + '.join(METHODS)}")
    print(f"Wanted: a ratio of at most {TRACED_RATIO} and at most {EXTRA_MEMORY:.0%} more memory\n")
    stock = subject.run("stock")
    if not torch.equal(stock.output, subject.run("stock").output):
        print("the stock output differs from run to run: whether a capture changes it cannot be told")
    print_row("mode", "output", "block / stock", "target", "forward / stock", "extra memory", "target")
    print_row(*["---"] * 7)
    for mode in subject.modes():
        if mode != "stock":
            print_row(mode, *_mode_cells(subject, mode, stock, pairs))


def _mode_cells(subject: BlockSubject, mode: str, stock: Run, pairs: int) -> Iterator[str]:
    watched = subject.run(mode)
    distance = ((watched.output.double() - stock.output.double()).norm() / stock.output.double().norm()).item()
    equal = torch.equal(watched.output, stock.output)
    yield "bit-identical" if equal else f"differs by {distance:.1e}"
    if not (equal or (mode == "one_pass" and distance <= ONE_PASS_DISTANCE)):
        yield from ["no ratio: the output is another one"] + ["-"] * 4
        return
    runs: dict[str, list[Run]] = {mode: [], "stock": []}

    def block(which: str) -> float:
        runs[which].append(subject.run(which))
        return runs[which][-1].block

    times = paired(lambda: block(mode), lambda: block("stock"), pairs)
    target = verdict(times.ratio, times.ratio <= TRACED_RATIO) if mode != "official" else "-"
    yield from (ratio(times), target)
    ours, plain = (torch.tensor([run.forward for run in runs[which][1:]]) for which in (mode, "stock"))
    yield figure((ours / plain).median().item() if times.pairs else float("nan"), ".3f")
    extra = runs[mode][-1].peak / runs["stock"][-1].peak - 1 if times.pairs else float("nan")
    yield figure(extra, ".2%")
    yield verdict(extra, extra <= EXTRA_MEMORY) if mode != "official" else "-"


def measure(device: str, pairs: int) -> None:
    """Gate, then measure; on a CPU only run."""
    dry = device == "cpu"
    name = platform.platform() if dry else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}, diffusers {diffusers.__version__}")
    inputs = Inputs(SMALL_SIZES if dry else FULL_SIZES, torch.bfloat16, device)
    print(f"{inputs.sizes}, {inputs.dtype}")
    check(inputs, interpreted=dry)
    clock = Clock(device)
    ceilings = measure_ceilings(clock, device)
    print(f"\nCopy, TB/s: {figure(ceilings.bandwidth / 1e9, '.2f')}")
    print(f"bfloat16 matrix product, TFLOP/s: {figure(ceilings.matmul / 1e9, '.0f')}")
    time_kernels(inputs, clock, ceilings, pairs)
    time_backends(inputs, clock)
    time_block(BlockSubject(SMALL if dry else FULL, torch.bfloat16, device), pairs if clock.measures else 0)


def main() -> int:
    """Command line; the dry run starts this program again where Triton has to be told to interpret."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30, help="timed pairs of each comparison; slow ones take fewer")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; measures nothing")
    options = parser.parse_args()
    if options.pairs < 1:
        parser.error(f"--pairs is {options.pairs}; expected at least 1")
    if not options.dry_run:
        if not torch.cuda.is_available():
            parser.error("there is no GPU to measure on; --dry-run checks that the script works")
        with torch.inference_mode():
            measure("cuda", options.pairs)
        return 0
    if not triton.knobs.runtime.interpret:
        return subprocess.run([sys.executable, *sys.argv], env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    with torch.inference_mode(), dispatch.use_backend("kernels"):
        measure("cpu", options.pairs)
    print("\nDry run: everything ran, nothing was measured.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
