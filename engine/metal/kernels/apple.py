"""What mx.fast.metal_kernel needs to run the expert-major matmul on an Apple GPU: the same text, another entry.

MLX writes the kernel's signature itself, from the inputs' names and from the Metal attributes that the body mentions,
so moe.metal is given without its entry points and the body calls its function. Tests run the text that MLX would make
on the host executor; on Apple hardware it is untested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.metal import table

_TYPES = {"f32": "float", "f16": "half"}


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


def metal_kernel(plan: table.Dispatch) -> dict[str, Any]:
    """Arguments of mx.fast.metal_kernel (name, input_names, output_names, header, source) for a mul_mm_id Dispatch.

    Inputs in order: args int32 [K, M, n_tokens, top_k, x_slots, 0, 0, 0], weights, x, counts, pairs. Each has eight
    entries or more (counts and pairs padded if need be): MLX puts shorter ones in another address space. Call the
    kernel with grid and threadgroup from `grid`, output_shapes [(n, top_k, M)], output_dtypes [float32].
    """
    known = {
        f"kernel_mul_mm_id_{form.name}_{rhs}_n{plan.tile}": (f"block_{form.name}", _TYPES[rhs])
        for form in table.FORMATS.values()
        for rhs in table.RHS.values()
    }
    if plan.kernel not in known:
        raise ValueError(f"{plan.kernel} is no expert-major matmul")
    block, x = known[plan.kernel]
    body = f"""
    threadgroup float staging[{plan.threadgroup_bytes // 4}];
    const MatmulArgs sizes = {{args[0], args[1], args[2], args[3], args[4]}};
    mul_mm_id<{block}, {x}, {plan.tile}>(
        sizes, (device const {block} *) weights, x, counts, pairs, out, (threadgroup uchar *) staging,
        threadgroup_position_in_grid, thread_index_in_threadgroup, simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
"""
    return {
        "name": plan.kernel,
        "input_names": ["args", "weights", "x", "counts", "pairs"],
        "output_names": ["out"],
        "header": "#define ASSAY_FUNCTIONS_ONLY\n" + source_text(table.KERNELS / plan.source),
        "source": body,
    }


def grid(plan: table.Dispatch) -> dict[str, tuple[int, int, int]]:
    """grid (in threads) and threadgroup of the call."""
    x, y, z = (groups * threads for groups, threads in zip(plan.threadgroups, plan.threads, strict=True))
    return {"grid": (x, y, z), "threadgroup": plan.threads}
