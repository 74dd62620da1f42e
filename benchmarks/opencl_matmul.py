"""Time tiled_matmul.metal on an OpenCL platform.

`python opencl_matmul.py PLATFORM N ROWS COLUMNS DEPTH DOWN ACROSS REPEATS`: executor.py calls it so.

A process of its own, since Oclgrind wraps one and PoCL reads its number of threads when it starts. Prints one line of
JSON: device, best ns per multiply-add between enqueue and completion, and a hash of the result.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyopencl as cl

TEXT = Path(__file__).parent / "tiled_matmul.metal"
NAMES = ("N", "ROWS", "COLUMNS", "DEPTH", "DOWN", "ACROSS")


def matrices(n: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(n, n) float32 twice, the same for every executor."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, n), np.float32), rng.standard_normal((n, n), np.float32)


def main(platform_name: str, *numbers: str) -> None:
    n, rows, columns, _, down, across, repeats = map(int, numbers)
    platform = next(p for p in cl.get_platforms() if platform_name in p.name)
    context = cl.Context(platform.get_devices())
    queue = cl.CommandQueue(context)
    defines = [f"-D{name}={value}" for name, value in zip(NAMES, numbers, strict=False)]
    kernel = cl.Kernel(cl.Program(context, TEXT.read_text()).build(defines), "tiled_matmul")
    a, b = matrices(n)
    flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
    result = np.full((n, n), np.nan, np.float32)
    buffers = [cl.Buffer(context, flags, hostbuf=array) for array in (a, b, result)]
    kernel.set_args(*buffers)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        cl.enqueue_nd_range_kernel(queue, kernel, (n // across, n // down), (columns // across, rows // down))
        queue.finish()
        seconds.append(time.perf_counter() - began)
    cl.enqueue_copy(queue, result, buffers[2])
    np.testing.assert_allclose(result, a.astype(np.float64) @ b, rtol=0, atol=1e-5 * n)
    device = platform.get_devices()[0].name.strip()
    found = {"device": device, "ns": min(seconds) * 1e9 / n**3, "hash": hashlib.sha256(result.tobytes()).hexdigest()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
