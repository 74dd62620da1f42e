"""The engine's kernels as functions of NumPy arrays, run by the host executor.

Each function checks its operands, asks engine.metal.table for the Dispatch and launches it; outputs are new arrays that
the executor poisons first. A fault of the launch is an error here: what a faulty kernel returned is no result.
n tokens, E experts, M rows of an expert's weights, K elements a row; head dims are named in each function.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from engine.metal import table
from engine.metal.errors import MetalError
from engine.metal.library import Library, compile

Array = np.ndarray[Any, np.dtype[Any]]
# kernel_router's codes.
SCORING = {"sqrtsoftplus": 0, "sigmoid": 1, "softmax": 2, "topk_softmax": 3}
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def mul_mm_id(
    x: Array,
    blocks: Array,
    ids: Array,
    kind: str,
    *,
    max_tile: int = table.DEFAULT_TILE,
    tile: int | None = None,
    **launch: Any,
) -> Array:
    """x (n, K) or (n, top_k, K), blocks (E, M, bytes) uint8, ids (n, top_k) → (n, top_k, M): expert-major matmul.

    x is float32 or float16 and is rounded to float16, as the weights are; sums and output are float32. ids are distinct
    within a token. launch: `checked`, `schedule_seed`, `timeout`. Raises ValueError for operands that don't fit
    together, MetalError for a fault.
    """
    experts, rows, args = _operands(x, blocks, ids, kind)
    n, top_k = ids.shape
    counts, pairs = expert_pairs(ids, experts, **launch)
    plan = table.plan_mul_mm_id(kind, x.dtype.name, n, rows, experts, max_tile, tile)
    return _run(plan, [args, blocks, x, counts, pairs], {5: ((n, top_k, rows), "float32")}, launch)[5]


def mul_mv_id(x: Array, blocks: Array, ids: Array, kind: str, **launch: Any) -> Array:
    """The same operands and result as mul_mm_id, a vector at a time, with weights and x in float32 throughout."""
    _, rows, args = _operands(x, blocks, ids, kind)
    n, top_k = ids.shape
    plan = table.plan_mul_mv_id(kind, x.dtype.name, n * top_k, rows)
    return _run(plan, [args, blocks, x, _int32(ids)], {4: ((n, top_k, rows), "float32")}, launch)[4]


def expert_pairs(ids: Array, experts: int, **launch: Any) -> tuple[Array, Array]:
    """ids (n, top_k) → counts (E,) and pairs (E, n) uint32: token·top_k + slot, ascending, counts[e] of them."""
    n, top_k = ids.shape
    shapes = {2: ((experts,), "uint32"), 3: ((experts, n), "uint32")}
    done = _run(table.plan_mul_mm_id_map(experts), [_args("ii", n, top_k), _int32(ids)], shapes, launch)
    return done[2], done[3]


def route(
    logits: Array,
    bias: Array | None,
    top_k: int,
    scoring: str,
    *,
    normalise: bool = True,
    factor: float = 1.0,
    **launch: Any,
) -> tuple[Array, Array]:
    """logits (n, E) float32 and bias (E,) or None → ids (n, top_k) int32 and weights (n, top_k) float32, best first.

    scoring is one of SCORING; ties go to the lowest id; `normalise` divides by the sum (topk_softmax always does).
    """
    n, experts = logits.shape
    if scoring not in SCORING:
        raise ValueError(f"scoring is {scoring!r}; one of {', '.join(SCORING)} is expected")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k} of {experts} experts")
    args = _args("iiiiif", experts, top_k, SCORING[scoring], bias is not None, normalise, factor)
    operands = [args, logits.astype(np.float32), None if bias is None else bias.astype(np.float32)]
    shapes = {3: ((n, top_k), "int32"), 4: ((n, top_k), "float32")}
    done = _run(table.plan_router(n, experts), operands, shapes, launch)
    return done[3], done[4]


def rms_norm(x: Array, weight: Array, eps: float, **launch: Any) -> Array:
    """x (…, D) and weight (D,) of one dtype → (…, D): x / sqrt(mean(x²) + eps) · weight."""
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(f"weight {weight.shape} {weight.dtype} does not fit rows of {x.shape[-1]} {x.dtype}")
    plan = table.plan_rows("rms_norm", x.dtype.name, x.size // x.shape[-1])
    return _run(plan, [_args("if", x.shape[-1], eps), x, weight], {3: (x.shape, x.dtype.name)}, launch)[3]


def softmax(x: Array, mask: Array | None = None, scale: float = 1.0, **launch: Any) -> Array:
    """x (…, S) and mask (…, S) bool or None → (…, S): softmax of scale·x over what the mask leaves; 0 for the rest."""
    if mask is not None and mask.shape != x.shape:
        raise ValueError(f"mask {mask.shape} is not of the shape of x, {x.shape}")
    plan = table.plan_rows("softmax", x.dtype.name, x.size // x.shape[-1])
    args = _args("iif", x.shape[-1], mask is not None, scale)
    return _run(plan, [args, x, _bytes(mask)], {3: (x.shape, x.dtype.name)}, launch)[3]


def rope(x: Array, offset: int, theta: float, **launch: Any) -> Array:
    """x (T, H, D) → (T, H, D): pairs (j, j + D/2) rotated by (offset + t)·theta^(−2j/D)."""
    tokens, heads, head_dim = x.shape
    plan = table.plan_rope(x.dtype.name, tokens, heads, head_dim)
    args = _args("iiiif", tokens, heads, head_dim, offset, theta)
    return _run(plan, [args, x], {2: (x.shape, x.dtype.name)}, launch)[2]


def swiglu(gate: Array, up: Array, limit: float | None = None, weights: Array | None = None, **launch: Any) -> Array:
    """gate and up (…, F), weights (…) float32 or None → (…, F): silu(min(gate, limit))·clamp(up, ±limit)·weights."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.shape} {gate.dtype} and up {up.shape} {up.dtype} differ")
    if weights is not None and weights.shape != gate.shape[:-1]:
        raise ValueError(f"weights {weights.shape} are not one a row of {gate.shape}")
    rows, width = gate.size // gate.shape[-1], gate.shape[-1]
    args = _args("iiiif", rows, width, limit is not None, weights is not None, limit or 0.0)
    operands = [args, gate, up, None if weights is None else weights.astype(np.float32)]
    plan = table.plan_swiglu(gate.dtype.name, rows, width)
    return _run(plan, operands, {4: (gate.shape, gate.dtype.name)}, launch)[4]


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    mask: Array | None = None,
    sinks: Array | None = None,
    window: int | None = None,
    **launch: Any,
) -> Array:
    """q (B, Hq, Dk), k (B, Hkv, S, Dk), v (B, Hkv, S, Dv) of one dtype → (B, Hq, Dv), for the query at position S − 1.

    mask (B, S) bool, False hides a key; sinks (Hq,) logits of a further key without value; window: keys seen.
    """
    (B, Hq, Dk), (Hkv, S, Dv) = q.shape, v.shape[1:]
    if k.shape != (B, Hkv, S, Dk) or v.shape[0] != B or Hq % Hkv or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q {q.shape} {q.dtype}, k {k.shape} {k.dtype} and v {v.shape} {v.dtype} don't fit together")
    if (mask is not None and mask.shape != (B, S)) or (sinks is not None and sinks.shape != (Hq,)):
        raise ValueError(f"mask is not ({B}, {S}) or sinks are not ({Hq},)")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; at least 1 is expected")
    args = _args("iiiiiiiif", Hq, Hkv, S, Dk, Dv, window or 0, mask is not None, sinks is not None, scale)
    operands = [args, q, k, v, _bytes(mask), None if sinks is None else sinks.astype(np.float32)]
    plan = table.plan_attention(q.dtype.name, B, Hq, Dk, Dv)
    return _run(plan, operands, {6: ((B, Hq, Dv), q.dtype.name)}, launch)[6]


@functools.cache
def library(source: str, checked: bool) -> Library:
    """One of the files in table.KERNELS, compiled on first use."""
    return compile(table.KERNELS / source, checked=checked)


def _run(
    plan: table.Dispatch,
    operands: list[Any],
    outputs: Mapping[int, tuple[tuple[int, ...], str]],
    launch: dict[str, Any],
) -> dict[int, Array]:
    """Launches `plan` on operands (buffers 0, 1, …; None: unbound) and new outputs, by buffer index."""
    launch = dict(launch)
    kernel = library(plan.source, launch.pop("checked", False))[plan.kernel]
    results = {index: np.empty(shape, _DTYPES.get(name, name)) for index, (shape, name) in outputs.items()}
    buffers = {i: np.ascontiguousarray(a) if isinstance(a, np.ndarray) else a for i, a in enumerate(operands)}
    memory = {0: plan.threadgroup_bytes} if plan.threadgroup_bytes else {}
    run = kernel.launch(
        {index: buffer for index, buffer in buffers.items() if buffer is not None} | results,
        threadgroups=plan.threadgroups,
        threads=plan.threads,
        threadgroup_memory=memory,
        outputs=tuple(results),
        **launch,
    )
    if run.faults:
        raise MetalError(f"{plan.kernel}: {run.faults[0].message}")
    return results


def _operands(x: Array, blocks: Array, ids: Array, kind: str) -> tuple[int, int, bytes]:
    """(E, M, MatmulArgs) of a routed projection whose operands fit together."""
    if kind not in table.FORMATS:
        raise ValueError(f"{kind} has no matmul kernel; one of {', '.join(table.FORMATS)} is expected")
    form = table.FORMATS[kind]
    if blocks.ndim != 3 or blocks.dtype != np.uint8 or blocks.shape[2] % form.bytes:
        raise ValueError(f"{kind} blocks (E, M, bytes) uint8 are expected, found {blocks.shape} {blocks.dtype}")
    experts, rows, width = blocks.shape
    K = width // form.bytes * form.elements
    if ids.ndim != 2 or x.shape not in ((ids.shape[0], K), (*ids.shape, K)):
        raise ValueError(f"x {x.shape} and ids {ids.shape} do not fit (n, K) or (n, top_k, K) with K = {K}")
    if ids.size and not (ids.min() >= 0 and ids.max() < experts):
        raise ValueError(f"ids are in {ids.min()} to {ids.max()}; there are {experts} experts")
    if (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
        raise ValueError("a token's ids are not distinct")
    x_slots = 1 if x.ndim == 2 else ids.shape[1]
    return experts, rows, _args("iiiii", K, rows, *ids.shape, x_slots)


def _args(types: str, *values: float) -> bytes:
    """A struct of 4-byte members, int (i) or float (f)."""
    kinds = {"i": np.int32, "f": np.float32}
    return b"".join(np.array(value, kinds[kind]).tobytes() for kind, value in zip(types, values, strict=True))


def _int32(ids: Array) -> Array:
    return ids.astype(np.int32)


def _bytes(mask: Array | None) -> Array | None:
    return None if mask is None else mask.astype(np.uint8)
