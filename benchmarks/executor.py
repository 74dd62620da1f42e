"""The host executor beside PoCL and Oclgrind: the same tiled matmul, in one run, as ns per multiply-add and as ratios.

`python benchmarks/executor.py` prints Markdown tables; the README beside it has them from one machine. Each figure is
the best of its repeats, as many for us as for PoCL, rounds of all executors taking turns, so that a busy moment hits
all of them. It prints what it measured and judges nothing: no time decides a test. Peers that are not installed are
named with the way to get them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from engine import quantize
from engine.metal import launch as launching
from engine.metal import table
from engine.metal.kernels import host
from engine.metal.library import Kernel, compile

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "tiled_matmul.metal"
INSTALL = "`apt-get install pocl-opencl-icd oclgrind` and `pip install pyopencl`"
# Launches of which a turn keeps the best. The first touches memory that the others find mapped.
REPEATS = 5
EMPTY = "#include <metal_stdlib>\nkernel void empty(device uint* unused) {}\n"
# Two sites, as in every tiled kernel: a switch that is predicted only when all threads come from one site shows.
WAITS = """#include <metal_stdlib>
using namespace metal;
kernel void waits(device uint* out, uint i [[thread_index_in_threadgroup]]) {
  uint sum = 0;
  for (uint n = 0; n < 512; n++) { WAIT; sum += n; WAIT; }
  out[i] = sum;
}
"""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A tile of rows × columns, depth elements a step, and what one thread computes of it."""

    rows: int
    columns: int
    depth: int
    down: int
    across: int

    def __str__(self) -> str:
        threads = self.rows // self.down * (self.columns // self.across)
        return f"{self.rows}×{self.columns}×{self.depth}, {threads} threads of {self.down}×{self.across}"

    def numbers(self, n: int) -> dict[str, int]:
        """The names that the source wants defined."""
        values = (n, self.rows, self.columns, self.depth, self.down, self.across)
        return dict(zip(("N", "ROWS", "COLUMNS", "DEPTH", "DOWN", "ACROSS"), values, strict=True))


# From one output a thread, where barriers and scalar code dominate, to the register tiles of a real matmul.
SHAPES = tuple(
    Shape(rows=rows, columns=columns, depth=depth, down=down, across=across)
    for rows, columns, depth, down, across in (
        (16, 16, 16, 1, 1),
        (32, 32, 32, 1, 1),
        (32, 32, 16, 4, 4),
        (64, 64, 16, 8, 8),
        (64, 64, 32, 4, 16),
    )
)


@dataclass(frozen=True, kw_only=True)
class Executor:
    """One column: `measure` returns ns per multiply-add and a hash of the result, at matrices of n."""

    name: str
    n: int
    measure: Callable[[Shape, int], tuple[float, str]]
    missing: str = ""


def ours(*, checked: bool, threads: int | None) -> Callable[[Shape, int], tuple[float, str]]:
    """The host executor, best of REPEATS launches; threads=None: as many host threads as it takes by itself."""

    def measure(shape: Shape, n: int) -> tuple[float, str]:
        kernel = _kernel(shape, n, checked)
        rng = np.random.default_rng(0)  # the matrices of opencl_matmul.py
        a, b = rng.standard_normal((n, n), np.float32), rng.standard_normal((n, n), np.float32)
        c = np.empty_like(a)
        chosen = {"side_effect": launching._host_threads} if threads is None else {"return_value": threads}
        with mock.patch.object(launching, "_host_threads", **chosen):
            runs = [
                kernel.launch(
                    {0: a, 1: b, 2: c},
                    threadgroups=(n // shape.columns, n // shape.rows),
                    threads=(shape.columns // shape.across, shape.rows // shape.down),
                    outputs=(2,),
                    timeout=120.0,
                )
                for _ in range(REPEATS)
            ]
        if faults := runs[0].faults:
            raise SystemExit(f"the matmul is at fault: {faults[0].message}")
        np.testing.assert_allclose(c, a.astype(np.float64) @ b, rtol=0, atol=1e-5 * n)
        return min(run.stats.seconds for run in runs) * 1e9 / n**3, hashlib.sha256(c.tobytes()).hexdigest()

    return measure


_kernels: dict[tuple[Shape, int, bool], Kernel] = {}


def _kernel(shape: Shape, n: int, checked: bool) -> Kernel:
    key = (shape, n, checked)
    if key not in _kernels:
        _kernels[key] = compile(SOURCE, defines=shape.numbers(n), checked=checked)["tiled_matmul"]
    return _kernels[key]


def opencl(
    platform_name: str, wrapper: tuple[str, ...] = (), repeats: int = REPEATS, **environment: str
) -> Callable[[Shape, int], tuple[float, str]]:
    """An OpenCL platform, in a process of its own."""

    def measure(shape: Shape, n: int) -> tuple[float, str]:
        numbers = [str(value) for value in shape.numbers(n).values()]
        script = [sys.executable, "-W", "ignore", str(FOLDER / "opencl_matmul.py"), platform_name]
        done = subprocess.run(
            [*wrapper, *script, *numbers, str(repeats)],
            env=os.environ | environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"{platform_name} failed at {shape}:\n{(done.stdout + done.stderr)[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        return float(found["ns"]), str(found["hash"])

    return measure


def platforms() -> set[str]:
    """The OpenCL platforms here, by name."""
    if find_spec("pyopencl") is None:
        return set()
    script = "import pyopencl as cl\nfor p in cl.get_platforms(): print(p.name)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    return set(done.stdout.split("\n")) - {""}


def executors(n: int, small: int) -> list[Executor]:
    """Every column, in order; a peer that isn't here is `missing`."""
    found = platforms()
    pocl = "Portable Computing Language"
    no_pocl = "" if pocl in found else f"PoCL is not here: {INSTALL}"
    no_oclgrind = "" if shutil.which("oclgrind") and find_spec("pyopencl") else f"Oclgrind is not here: {INSTALL}"
    # POCL_CPU_MAX_CU_COUNT is the name since PoCL 4.
    one = opencl(pocl, POCL_MAX_PTHREAD_COUNT="1", POCL_CPU_MAX_CU_COUNT="1")
    grind = ("oclgrind", "--num-threads", "1")
    checks = (*grind, "--data-races", "--uninitialized")
    return [
        Executor(name="ours", n=n, measure=ours(checked=False, threads=1)),
        Executor(name="ours, all threads", n=n, measure=ours(checked=False, threads=None)),
        Executor(name="ours, checked", n=n // 4, measure=ours(checked=True, threads=1)),
        Executor(name="PoCL", n=n, measure=one, missing=no_pocl),
        Executor(name="PoCL, all threads", n=n, measure=opencl(pocl), missing=no_pocl),
        Executor(name="Oclgrind", n=small, measure=opencl("Oclgrind", grind, 1), missing=no_oclgrind),
        Executor(name="Oclgrind, checking", n=small, measure=opencl("Oclgrind", checks, 1), missing=no_oclgrind),
    ]


def matmuls(n: int, small: int, rounds: int) -> None:
    columns = executors(n, small)
    for reason in dict.fromkeys(column.missing for column in columns if column.missing):
        print(f"{reason}\n")
    here = [column for column in columns if not column.missing]
    print("| ns per multiply-add | " + " | ".join(f"{column.name} (N={column.n})" for column in here) + " |")
    print("|---|" + "---:|" * len(here))
    ratios = []
    for shape in SHAPES:
        best: dict[str, float] = {}
        hashes: dict[int, set[str]] = {}
        for turn in range(rounds):
            for column in here:
                if turn > 1 and column.n == small:
                    continue  # of figures a thousand times as large, two will do
                ns, digest = column.measure(shape, column.n)
                best[column.name] = min(ns, best.get(column.name, ns))
                hashes.setdefault(column.n, set()).add(digest)
        if any(len(found) > 1 for found in hashes.values()):
            raise SystemExit(f"{shape}: executors disagree about the result")
        print(f"| {shape} | " + " | ".join(f"{best[column.name]:.3g}" for column in here) + " |", flush=True)
        ratios.append((shape, best))
    _print_ratios(ratios)


# Heading, dividend, divisor, and what is wanted of the ratio.
RATIOS = (
    ("ours / PoCL (≤ 1.3 wanted)", "ours", "PoCL"),
    ("the same, all threads", "ours, all threads", "PoCL, all threads"),
    ("Oclgrind / ours (≥ 500 wanted)", "Oclgrind", "ours"),
    ("Oclgrind checking / ours checked (≥ 100 wanted)", "Oclgrind, checking", "ours, checked"),
    ("ours checked / ours", "ours, checked", "ours"),
)


def _print_ratios(measured: list[tuple[Shape, dict[str, float]]]) -> None:
    known = [ratio for ratio in RATIOS if {ratio[1], ratio[2]} <= measured[0][1].keys()]
    print("\n| ratio | " + " | ".join(heading for heading, *_ in known) + " |")
    print("|---|" + "---:|" * len(known))
    for shape, best in measured:
        cells = [f"{best[above] / best[below]:.3g}" for _, above, below in known]
        print(f"| {shape} | " + " | ".join(cells) + " |")


def _best(action: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def moe(size: int, tokens: int) -> None:
    """The engine's own expert-major matmul: simdgroup matrices, Q4_K weights of one expert that every token visits."""
    rng = np.random.default_rng(0)
    blocks = quantize.quantize(rng.standard_normal((1, size, size), np.float32), "Q4_K")
    x, ids = rng.standard_normal((tokens, size), np.float32), np.zeros((tokens, 1), np.int64)
    print(f"\n| kernel_mul_mm_id_q4_K_f32_n128, M=K={size}, R={tokens} | seconds | ns per multiply-add |")
    print("|---|---:|---:|")
    for name, threads, checked in (("one thread", 1, False), ("all threads", None, False), ("one, checked", 1, True)):
        chosen = {"side_effect": launching._host_threads} if threads is None else {"return_value": threads}

        def product(checked: bool = checked) -> None:
            host.mul_mm_id(x, blocks, ids, "Q4_K", tile=128, checked=checked, timeout=300.0)

        with mock.patch.object(launching, "_host_threads", **chosen):
            product()
            seconds = _best(product, 1 if checked else 5)
        print(f"| {name} | {seconds:.3f} | {seconds * 1e9 / (size * size * tokens):.3g} |", flush=True)


def _wait(statement: str, threads: int) -> float:
    """ns that a thread of a threadgroup costs at `statement`, which makes it wait for others."""
    kernel, out = compile(WAITS, defines={"WAIT": statement})["waits"], np.zeros(threads, np.uint32)
    runs = [kernel.launch({0: out}, threadgroups=1, threads=threads, outputs=(0,)) for _ in range(10 * REPEATS)]
    return min(run.stats.seconds for run in runs) * 1e9 / (2 * 512 * threads)


def overheads() -> None:
    kernel, unused = compile(EMPTY)["empty"], np.zeros(1, np.uint32)
    launches = [kernel.launch({0: unused}, threadgroups=1, threads=1).stats.wall_seconds for _ in range(1000)]
    print("\n| overhead | |\n|---|---:|")
    print(f"| launch of an empty kernel, median of 1000 | {statistics.median(launches) * 1e6:.0f} µs |")
    for threads in (32, 256, 1024):
        barrier = _wait("threadgroup_barrier(mem_flags::mem_threadgroup)", threads)
        print(f"| threadgroup barrier, {threads} threads | {barrier:.1f} ns a thread |")
    print(f"| simd_sum, 256 threads | {_wait('sum ^= simd_sum(sum)', 256):.1f} ns a thread |")
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, ASSAY_CACHE=folder):
        for name, path, kernel_name, checked in (
            ("tiled_matmul", SOURCE, "tiled_matmul", False),
            ("tiled_matmul, checked", SOURCE, "tiled_matmul", True),
            ("the MoE kernel", table.KERNELS / "moe.metal", "kernel_mul_mm_id_q4_K_f32_n128", False),
        ):
            # Never compiled before: the compiler has a cache of its own, too.
            text = f"{path.read_text()}\nconstant long compiled_at = {time.time_ns()};\n"

            def build(
                text: str = text, folder: Path = path.parent, kernel: str = kernel_name, checked: bool = checked
            ) -> None:
                compile(text, include_dirs=[folder], defines=SHAPES[2].numbers(512), checked=checked)[kernel]

            cold, warm = _best(build, 1), _best(build, 5)
            print(f"| compile {name} | {cold:.2f} s |\n| the same, from the cache | {warm * 1e3:.0f} ms |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=512, help="matrix size for the host executor and PoCL; 512")
    parser.add_argument("--small", type=int, default=64, help="matrix size for Oclgrind; 64")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the best is kept; 5")
    options = parser.parse_args()
    if options.n % 256 or options.small % 64:
        parser.error("--n must be a multiple of 256 and --small of 64: tiles divide the matrices")
    print(
        f"{platform.machine()} {_processor()}, {os.cpu_count()} cores, {platform.system()}; {time.strftime('%Y-%m')}\n"
    )
    matmuls(options.n, options.small, options.rounds)
    moe(2048, 256)
    overheads()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
