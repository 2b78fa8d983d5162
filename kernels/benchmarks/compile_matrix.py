"""Compile every kernel as the library may launch it, for GPUs that need not be there, and check what comes out.

The public functions are called on tensors without data, every launch is intercepted, and what was about to be
launched is compiled: signature, constants and options are those of the launch, and no table repeats them. Arguments
that an operation refuses as not enabled are left out.

Checked of every launch and target: it compiles, and its shared memory fits. On sm_90, moreover, what takes float16 or
bfloat16 uses no local memory, which means that no register is spilled. Any other outcome ends in exit status 1.

The full matrix takes an hour of CPU time. Finished compilations are kept in a file, so that it can be interrupted.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import triton
from kernel_inputs import OPS
from kernel_launches import DTYPES, Launch, Use, enabled_launches
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).parents[2]
HEAD_WIDTHS = (32, 40, 64, 80, 96, 128, 256)
TEXT_ROWS = (8, 24, 40, 77, 226, 500)  # one for each power of two that they are padded to
NICENESS = 10
KB = 1024


Pair = tuple[Launch, str]  # and the target to compile for


@dataclass(frozen=True)
class Target:
    """A GPU architecture.

    Attributes:
        gpu: what Triton calls it.
        shared: bytes of shared memory that a program can have.
    """

    gpu: GPUTarget
    shared: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KB),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 * KB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KB),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * KB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KB),
}


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a launch.

    Attributes:
        registers: per thread.
        shared: bytes of shared memory per program.
        local: bytes of local memory per thread, where spilled registers go.
        error: why it did not compile; empty if it did.
    """

    registers: int = 0
    shared: int = 0
    local: int = 0
    error: str = ""

    def cell(self) -> str:
        """Registers, shared memory and local memory."""
        return self.error or f"{self.registers}/{self.shared}/{self.local}"

    def violation(self, target: str, use: Use) -> str:
        """What is wrong with it; empty if nothing is."""
        if self.error:
            return self.error
        if self.shared > TARGETS[target].shared:
            return f"{self.shared} bytes of shared memory, at most {TARGETS[target].shared}"
        if target == "sm_90" and self.local and {"fp16", "bf16"} & set(use.dtypes):
            return f"{self.local} bytes of local memory, expected none"
        return ""


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile for a target; nothing of Triton's cache is left behind."""
    attributes = {path: json.loads(value) for path, value in launch.attributes}
    source = ASTSource(launch.function, dict(launch.signature), dict(launch.constants), attributes)
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        built = triton.compile(source, target=TARGETS[target].gpu, options=dict(launch.options))
        if launch.backend == "hip":
            registers, local = _amd_resources(built.asm["amdgcn"])
        else:
            registers, local = _nvidia_resources(built.asm["cubin"], Path(folder))
    return Compiled(registers, int(built.metadata.shared), local)


def _nvidia_resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Registers and local memory of the machine code itself; running ptxas on the PTX once more may differ from it."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def _amd_resources(assembly: str) -> tuple[int, int]:
    registers, local = (
        re.search(rf"\.{name}:\s*(\d+)", assembly) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    if registers is None or local is None:
        raise RuntimeError("the assembly names neither registers nor private memory")
    return int(registers[1]), int(local[1])


class Results:
    """Compilations that are finished, in a file that only grows.

    Attributes:
        compiled: by digest.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.compiled = {digest: Compiled(**values) for digest, values in map(json.loads, lines)}

    def add(self, digest: str, compiled: Compiled) -> None:
        """One more; failures are not kept, so that they are tried again."""
        self.compiled[digest] = compiled
        if not compiled.error:
            with self._path.open("a") as file:
                file.write(json.dumps([digest, compiled.__dict__]) + "\n")


def digest_of(launch: Launch, target: str) -> str:
    """Name of a compilation: another one if the kernel, what it calls, or Triton changes."""
    text = repr((launch, target, launch.function.cache_key, triton.__version__))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def compile_all(pairs: list[Pair], results: Results, jobs: int) -> Iterator[tuple[Pair, Compiled]]:
    """Yield every pair with its compilation: first those that are known, then the others as they finish."""
    digests = {pair: digest_of(*pair) for pair in pairs}
    missing = [pair for pair in pairs if digests[pair] not in results.compiled]
    print(f"{len(pairs)} compilations, {len(pairs) - len(missing)} of them known", flush=True)
    for pair in set(pairs).difference(missing):
        yield pair, results.compiled[digests[pair]]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_lower_priority) as pool:
        futures: dict[Future[Compiled], Pair] = {pool.submit(compile_launch, *pair): pair for pair in missing}
        for count, future in enumerate(as_completed(futures), 1):
            error = future.exception()
            compiled = future.result() if error is None else Compiled(error=f"{type(error).__name__}: {error}"[-500:])
            results.add(digests[futures[future]], compiled)
            yield futures[future], compiled
            if count % 100 == 0:
                print(f"{count} of {len(missing)}", flush=True)


def _lower_priority() -> None:
    os.nice(max(0, NICENESS - os.nice(0)))


def label(launch: Launch, use: Use) -> tuple[str, ...]:
    """The first columns of the line of a launch."""
    names = (launch.kernel, " ".join(use.ops), " ".join(use.dtypes), " ".join(map(str, use.head_widths)))
    return (*names, launch.describe())


def check_table(path: Path, launches: dict[Launch, Use]) -> None:
    """Raise unless a table is of these launches, and every cell of it as it must be."""
    with path.open(newline="") as file:
        found = {tuple(row[:5]): dict(zip(TARGETS, row[5:], strict=True)) for row in list(csv.reader(file))[1:]}
    expected: dict[tuple[str, ...], Use] = {label(launch, use): use for launch, use in launches.items()}
    if stale := found.keys() ^ expected.keys():
        raise SystemExit(f"{path} is stale in {len(stale)} lines, such as {' '.join(sorted(stale)[0])}; write it anew")
    for line, cells in found.items():
        for target, cell in cells.items():
            if cell and (why := Compiled(*map(int, cell.split("/"))).violation(target, expected[line])):
                raise SystemExit(f"{path}: {' '.join(line)} on {target}: {why}")


def write_table(path: Path, launches: dict[Launch, Use], cells: dict[Pair, Compiled]) -> None:
    """Write one line per configuration: registers, bytes of shared and of local memory on every target."""
    rows: dict[tuple[str, ...], dict[str, Compiled]] = {}
    for (launch, target), compiled in cells.items():
        row = rows.setdefault(label(launch, launches[launch]), {})
        # Launches that differ in what is known of strides and sizes share a line, which shows the worst of them.
        row[target] = max(row.get(target, Compiled()), compiled, key=lambda one: (one.error, one.local, one.registers))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kernel", "operations", "dtypes", "head widths", "configuration", *TARGETS])
        for names, row in sorted(rows.items()):
            writer.writerow([*names, *(row[target].cell() if target in row else "" for target in TARGETS)])


def summary(launches: dict[Launch, Use], cells: dict[Pair, Compiled]) -> str:
    """Markdown: of every kernel the number of launches, and the largest use on every target."""
    targets = [target for target in TARGETS if any(target == name for _, name in cells)]
    lines = [
        "Largest over the launches of a kernel: registers per thread / bytes of shared memory per program / bytes of",
        f"local memory per thread. Triton {triton.__version__}.",
        "",
        f"| kernel | launches | {' | '.join(targets)} |",
        f"|{'---|' * (2 + len(targets))}",
    ]
    for kernel in sorted({launch.kernel for launch in launches}):
        counts, shown = [], []
        for target in targets:
            mine = [c for (launch, name), c in cells.items() if launch.kernel == kernel and name == target]
            counts.append(len(mine))
            most = (max((getattr(c, key) for c in mine), default=0) for key in ("registers", "shared", "local"))
            shown.append("/".join(map(str, most)))
        lines.append(f"| `{kernel}` | {max(counts)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-widths", nargs="+", type=int, default=HEAD_WIDTHS)
    parser.add_argument("--text-rows", nargs="+", type=int, default=TEXT_ROWS)
    parser.add_argument("--one", action="store_true", help="one launch per kernel and target")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--list", action="store_true", help="print the launches and compile nothing")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "compile_matrix.jsonl", help="what is finished")
    parser.add_argument("--table", type=Path, help="CSV file to write")
    parser.add_argument("--check", type=Path, help="compile nothing, and check that this table is of today's launches")
    return parser.parse_args()


def main() -> None:
    """Compile, write, print."""
    options = parse_options()
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set, and an interpreted kernel cannot be compiled: unset it")
    launches: dict[Launch, Use] = {}
    for backend in sorted({TARGETS[name].gpu.backend for name in options.targets}):
        gpu = next(TARGETS[name].gpu for name in options.targets if TARGETS[name].gpu.backend == backend)
        found = enabled_launches(gpu, options.ops, options.dtypes, options.head_widths, options.text_rows)
        first = {launch.kernel: launch for launch in reversed(found)}
        launches |= {launch: found[launch] for launch in (first.values() if options.one else found)}
    pairs = [
        (launch, name)
        for name in options.targets
        for launch in launches
        if TARGETS[name].gpu.backend == launch.backend
    ]
    if options.list:
        for launch, name in pairs:
            print(name, launch.kernel, launches[launch], launch.describe())
        return
    if options.check:
        check_table(options.check, launches)
        return
    cells: dict[Pair, Compiled] = {}
    bad = 0
    for (launch, name), compiled in compile_all(pairs, Results(options.state), options.jobs):
        cells[launch, name] = compiled
        if why := compiled.violation(name, launches[launch]):
            bad += 1
            print(f"{name} {launch.kernel} {' '.join(launches[launch].dtypes)} {launch.describe()}: {why}", flush=True)
    text = summary(launches, cells)
    print(text)
    if options.table:
        write_table(options.table, launches, cells)
    if bad:
        raise SystemExit(f"{bad} of {len(cells)} compilations are not as they must be")
    print(f"all {len(cells)} compilations are as they must be")


if __name__ == "__main__":
    main()
