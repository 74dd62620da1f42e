"""The engine's kernels (ops.py) as functions of NumPy arrays, run by the host executor.

Outputs are new arrays that the executor poisons first. A fault of the launch is an error here: what a faulty kernel
returned is no result. Each function takes, besides what ops.py says, `checked`, `schedule_seed` and `timeout` of the
launch, and `note`, which is told the name of each kernel that was launched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from engine.metal import table
from engine.metal.errors import MetalError
from engine.metal.kernels import ops
from engine.metal.library import Library, compile

Array = np.ndarray[Any, np.dtype[Any]]
Note = Callable[[str], None]
# What a launch can be told, of host.run's options.
_LAUNCH = ("checked", "schedule_seed", "timeout", "note")


@functools.cache
def library(source: str, checked: bool) -> Library:
    """One of the files in table.KERNELS, compiled on first use."""
    return compile(table.KERNELS / source, checked=checked)


def run(
    plan: table.Dispatch,
    operands: Sequence[ops.Operand],
    outputs: Sequence[ops.Output],
    *,
    checked: bool = False,
    schedule_seed: int | None = None,
    timeout: float = 10.0,
    note: Note = lambda _: None,
) -> list[Array]:
    """Launch `plan` on NumPy arrays and return its outputs; an ops.Run. Raises MetalError for a fault."""
    kernel = library(plan.source, checked)[plan.kernel]
    results = [np.empty(shape, _dtype(name)) for shape, name in outputs]
    buffers = [_buffer(operand) for operand in operands] + results
    done = kernel.launch(
        dict(enumerate(buffers)),
        threadgroups=plan.threadgroups,
        threads=plan.threads,
        threadgroup_memory={0: plan.threadgroup_bytes} if plan.threadgroup_bytes else {},
        outputs=tuple(range(len(operands), len(buffers))),
        schedule_seed=schedule_seed,
        timeout=timeout,
    )
    note(done.kernel)
    if done.faults:
        raise MetalError(f"{done.kernel}: {done.faults[0].message}")
    return results


def _buffer(operand: ops.Operand) -> object:
    if operand is None or isinstance(operand, bytes):
        return operand
    array, dtype = operand
    return np.ascontiguousarray(array, _dtype(dtype))


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _on_host(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` of ops.py with its `run` bound to the host's, whose options it takes too."""

    @functools.wraps(op)
    def launched(*operands: Any, **options: Any) -> Any:
        launch = {name: options.pop(name) for name in _LAUNCH if name in options}
        return op(*operands, run=functools.partial(run, **launch), **options)

    return launched


mul_mm_id = _on_host(ops.mul_mm_id)
mul_mv_id = _on_host(ops.mul_mv_id)
expert_pairs = _on_host(ops.expert_pairs)
route = _on_host(ops.route)
rms_norm = _on_host(ops.rms_norm)
softmax = _on_host(ops.softmax)
rope = _on_host(ops.rope)
swiglu = _on_host(ops.swiglu)
attention = _on_host(ops.attention)
