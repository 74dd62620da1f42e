"""The engine's kernels (ops.py) on an Apple GPU, through mx.fast.metal_kernel: the same text, the same plans.

MLX writes the entry point itself, from the inputs' names and the Metal attributes that the body mentions. So the entry
points of a kernel file become plain functions here, by nothing but taking away what makes them entry points, and the
body calls one with what its own parameter list asks for. Buffers keep their numbers, since MLX numbers inputs, then
outputs. Off the device, tests run the text that MLX makes on the host executor; on Apple hardware it is untested.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from engine.metal import table
from engine.metal.kernels import ops

# MLX passes arrays of fewer elements in the constant address space (mlx/backend/common/metal_kernel.cpp).
LEAST_IN_DEVICE = 8
# Attributes that MLX declares as uint3 (the same file); the others are uint.
_TRIPLES = ("thread_position_in_grid", "threadgroup_position_in_grid", "threads_per_threadgroup")
# Not `_shape`, `_strides` or `_ndim` of an input, nor an attribute: MLX would declare those.
_MEMORY, _MEMORY_BYTES = "shared_memory", "shared_bytes"
_ENTRY = re.compile(
    r"(?P<before>(?:template <(?P<template>[^>]*)>\n)?)kernel void (?P<name>\w+)\((?P<list>.*?)\) \{", re.DOTALL
)
_PARAMETER = re.compile(r"(?P<type>.+?) ?\b(?P<name>\w+) \[\[(?P<attribute>\w+)(?:\(\d+\))?\]\]", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of an entry point: `attribute` is buffer, threadgroup, or a built-in's name."""

    type_text: str
    name: str
    attribute: str

    @property
    def plain(self) -> str:
        """What it is in a plain function: arguments come by value, as MLX doesn't say in which address space."""
        reference = re.fullmatch(r"constant (\w+) &", self.type_text)
        return f"{reference[1] if reference else self.type_text} {self.name}"


def source_text(path: Path) -> str:
    """A kernel file with its local headers written out, each once."""
    return _written_out(path, set())


def _written_out(path: Path, seen: set[Path]) -> str:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        name = line.removeprefix('#include "').removesuffix('"')
        if line.startswith('#include "'):
            header = path.parent / name
            if header not in seen:
                seen.add(header)
                lines.append(_written_out(header, seen))
        elif line != "#pragma once":
            lines.append(line)
    return "\n".join(lines)


def functions_text(text: str) -> str:
    """A kernel file's text with entry points made plain functions, and without their instantiations."""

    def plain(entry: re.Match[str]) -> str:
        parameters = ", ".join(p.plain for p in _parameters(entry["list"]))
        return f"{entry['before']}void {entry['name']}({parameters}) {{"

    # MLX writes its entry point straight behind this text.
    return f"#define ASSAY_FUNCTIONS_ONLY\n{_ENTRY.sub(plain, text)}\n"


def _parameters(text: str) -> list[Parameter]:
    found = (_PARAMETER.fullmatch(part.strip()) for part in text.split(","))
    return [Parameter(type_text=p["type"], name=p["name"], attribute=p["attribute"]) for p in found if p is not None]


def description(plan: table.Dispatch) -> dict[str, Any]:
    """Arguments of mx.fast.metal_kernel for the kernel of a plan: name, input_names, output_names, header, source."""
    text = source_text(table.KERNELS / plan.source)
    name, _, arguments = plan.entry.removesuffix(">").partition("<")
    entry = next(found for found in _ENTRY.finditer(text) if found["name"] == name)
    types = dict(zip(re.findall(r"(\w+)(?:,|$)", entry["template"] or ""), arguments.split(", "), strict=False))
    parameters = [
        Parameter(
            type_text=re.sub(r"\w+", lambda w: types.get(w[0], w[0]), p.type_text), name=p.name, attribute=p.attribute
        )
        for p in _parameters(entry["list"])
    ]
    buffers = [p for p in parameters if p.attribute == "buffer"]
    inputs = [p.name for p in buffers if "const" in p.type_text.split() or p.type_text.startswith("constant")]
    memory = f"    threadgroup float {_MEMORY}[{_MEMORY_BYTES} / 4];\n" if plan.threadgroup_bytes else ""
    return {
        "name": plan.kernel,
        "input_names": inputs,
        "output_names": [p.name for p in buffers if p.name not in inputs],
        "header": functions_text(text),
        "source": f"{memory}    {plan.entry}({', '.join(map(_argument, parameters))});",
    }


def _argument(parameter: Parameter) -> str:
    """What the body passes for a parameter of the function that it calls."""
    kind, name = parameter.type_text, parameter.name
    if parameter.attribute == "buffer":
        struct = re.fullmatch(r"constant (\w+) &", kind)
        return f"*(device const {struct[1]} *) {name}" if struct else f"({kind}) {name}"
    if parameter.attribute == "threadgroup":
        return f"({kind}) {_MEMORY}"
    if parameter.attribute not in _TRIPLES:
        return parameter.attribute
    return parameter.attribute + {"uint3": "", "uint2": ".xy"}.get(kind, ".x")


def call_options(plan: table.Dispatch) -> dict[str, Any]:
    """grid (in threads), threadgroup and template of the call."""
    x, y, z = (groups * threads for groups, threads in zip(plan.threadgroups, plan.threads, strict=True))
    template = [(_MEMORY_BYTES, plan.threadgroup_bytes)] if plan.threadgroup_bytes else None
    return {"grid": (x, y, z), "threadgroup": plan.threads, "template": template}


@functools.cache
def _kernel(source: str, kernel: str, entry: str, shared: bool) -> Any:
    """MLX's callable; the numbers of a plan that it doesn't depend on are left out."""
    ones = (1, 1, 1)
    plan = table.Dispatch(
        source=source, kernel=kernel, entry=entry, threadgroups=ones, threads=ones, threadgroup_bytes=int(shared)
    )
    return mx.fast.metal_kernel(**description(plan))


def run(
    plan: table.Dispatch,
    operands: Sequence[ops.Operand],
    outputs: Sequence[ops.Output],
    *,
    note: Callable[[str], None] = lambda _: None,
) -> list[mx.array]:
    """Launch `plan` on MLX arrays and return its outputs, unevaluated; an ops.Run. `note` is told the kernel's name."""
    kernel = _kernel(plan.source, plan.kernel, plan.entry, plan.threadgroup_bytes > 0)
    results: list[mx.array] = kernel(
        inputs=[_input(operand) for operand in operands],
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[getattr(mx, dtype) for _, dtype in outputs],
        **call_options(plan),
    )
    note(plan.kernel)
    return results


def _input(operand: ops.Operand) -> mx.array:
    """An operand as an array that MLX passes in device memory: arguments as words, nothing and short ones padded."""
    if operand is None:
        return mx.zeros(LEAST_IN_DEVICE, mx.uint8)
    if isinstance(operand, bytes):
        array = mx.array(np.frombuffer(operand, np.int32))
    else:
        array = operand[0].astype(getattr(mx, operand[1]))
    if array.size >= LEAST_IN_DEVICE:
        return array
    return mx.concatenate([array.flatten(), mx.zeros(LEAST_IN_DEVICE - array.size, array.dtype)])
