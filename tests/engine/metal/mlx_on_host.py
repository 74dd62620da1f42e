"""mx.fast.metal_kernel without an Apple GPU: MLX writes the kernel's text, the host executor runs it.

Off Metal, MLX makes the whole call only while it exports a function, and then keeps its generated source, grid and
threadgroup in the exported graph. So what runs here is MLX's own text under MLX's own preamble; not Apple's compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx
import mlx.core as mx
import numpy as np
import pytest

from engine.metal.kernels import apple
from engine.metal.library import Library, Run, compile
from engine.probes import to_numpy

INCLUDE = Path(next(iter(mlx.__path__))) / "include"
# What MLX puts before every custom kernel (mlx/backend/metal/custom_kernel.cpp).
PREAMBLE = '#include "mlx/backend/metal/kernels/utils.h"\n'
REAL = mx.fast.metal_kernel


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A call as MLX would issue it: the entry point's name, the text, threads of the grid and of a threadgroup."""

    name: str
    text: str
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]


def export(kernel: Any, inputs: list[mx.array], options: dict[str, Any]) -> Exported:
    """What `kernel(inputs=inputs, **options)` puts into MLX's graph."""
    steps: list[dict[str, Any]] = []
    mx.export_function(steps.append, lambda *arrays: kernel(inputs=list(arrays), **options), *inputs)
    (call,) = (step for step in steps if step.get("name") == "CustomKernel")
    name, text, *sizes = call["arguments"][:8]
    return Exported(name=name, text=text, grid=tuple(sizes[:3]), threads=tuple(sizes[3:]))


@functools.cache
def library(text: str, checked: bool) -> Library:
    return compile(PREAMBLE + text, include_dirs=[INCLUDE], checked=checked)


class OnHost:
    """A stand-in for mx.fast.metal_kernel; keeps each call and its Run."""

    def __init__(self, *, checked: bool = False) -> None:
        self.checked = checked
        self.calls: list[tuple[Exported, Run]] = []

    def __call__(self, **described: Any) -> Any:
        kernel = REAL(**described)
        return lambda *, inputs, **options: self._launch(kernel, inputs, options)

    def _launch(self, kernel: Any, inputs: list[mx.array], options: dict[str, Any]) -> list[mx.array]:
        made = export(kernel, inputs, options)
        outputs = [
            np.empty(shape, ml_dtypes.bfloat16 if dtype == mx.bfloat16 else str(dtype).rpartition(".")[2])
            for shape, dtype in zip(options["output_shapes"], options["output_dtypes"], strict=True)
        ]
        buffers = [to_numpy(array) for array in inputs] + outputs
        assert list(library(made.text, self.checked).kernels) == [made.name], library(made.text, self.checked).kernels
        run = library(made.text, self.checked)[made.name].launch(
            dict(enumerate(buffers)),
            grid=made.grid,
            threads=made.threads,
            outputs=tuple(range(len(inputs), len(buffers))),
        )
        assert not run.faults, run.faults[0].message
        assert run.stats.threadgroups == prod(g // t for g, t in zip(made.grid, made.threads, strict=True))
        self.calls.append((made, run))
        return [from_numpy(array) for array in outputs]


def from_numpy(array: np.ndarray[Any, Any]) -> mx.array:
    """`array` in MLX with its bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[OnHost]:
    """Fixture: mx.fast.metal_kernel is an OnHost."""
    made = OnHost()
    monkeypatch.setattr(mx.fast, "metal_kernel", made)
    apple._kernel.cache_clear()
    yield made
    apple._kernel.cache_clear()
