"""The engine's kernels as functions of arrays, whichever device runs them.

Each function checks that its operands fit together, asks engine.metal.table for the Dispatch and hands it to `run`:
host.run (NumPy arrays, the host executor) or apple.run (MLX arrays, an Apple GPU). So operands, grid and threadgroup
memory are decided once for both. Buffers are numbered as they are listed: arguments, inputs, then outputs.
n tokens, E experts, M rows of an expert's weights, K elements a row; head dims are named in each function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine.metal import table

# NumPy's or MLX's, as `run` takes and gives them.
Array = Any
# Packed arguments, an array with the dtype that the kernel reads it in, or nothing where the kernel reads nothing.
Operand = bytes | tuple[Array, str] | None
Output = tuple[tuple[int, ...], str]
Run = Callable[[table.Dispatch, Sequence[Operand], Sequence[Output]], list[Array]]
# kernel_router's codes.
SCORING = {"sqrtsoftplus": 0, "sigmoid": 1, "softmax": 2, "topk_softmax": 3}


def mul_mm_id(
    x: Array,
    blocks: Array,
    ids: Array,
    kind: str,
    *,
    run: Run,
    max_tile: int = table.DEFAULT_TILE,
    tile: int | None = None,
) -> Array:
    """x (n, K) or (n, top_k, K), blocks (E, M, bytes) uint8, ids (n, top_k) → (n, top_k, M): expert-major matmul.

    x is float32 or float16 and is rounded to float16, as the weights are; sums and output are float32. ids are distinct
    within a token. Raises ValueError for operands that don't fit together.
    """
    experts, rows, args = _operands(x, blocks, ids, kind)
    n, top_k = ids.shape
    counts, pairs = expert_pairs(ids, experts, run=run)
    plan = table.plan_mul_mm_id(kind, dtype_name(x), n, rows, experts, max_tile, tile)
    operands: list[Operand] = [args, (blocks, "uint8"), _as_is(x), (counts, "uint32"), (pairs, "uint32")]
    return run(plan, operands, [((n, top_k, rows), "float32")])[0]


def mul_mv_id(x: Array, blocks: Array, ids: Array, kind: str, *, run: Run) -> Array:
    """The same operands and result as mul_mm_id, a vector at a time, with weights and x in float32 throughout."""
    _, rows, args = _operands(x, blocks, ids, kind)
    n, top_k = ids.shape
    plan = table.plan_mul_mv_id(kind, dtype_name(x), n * top_k, rows)
    operands: list[Operand] = [args, (blocks, "uint8"), _as_is(x), (ids, "int32")]
    return run(plan, operands, [((n, top_k, rows), "float32")])[0]


def expert_pairs(ids: Array, experts: int, *, run: Run) -> tuple[Array, Array]:
    """ids (n, top_k) → counts (E,) and pairs (E, n) uint32: token·top_k + slot, ascending, counts[e] of them."""
    n, top_k = ids.shape
    operands: list[Operand] = [pack("ii", n, top_k), (ids, "int32")]
    outputs = [((experts,), "uint32"), ((experts, n), "uint32")]
    counts, pairs = run(table.plan_mul_mm_id_map(experts), operands, outputs)
    return counts, pairs


def route(
    logits: Array,
    bias: Array | None,
    top_k: int,
    scoring: str,
    *,
    run: Run,
    normalise: bool = True,
    factor: float = 1.0,
) -> tuple[Array, Array]:
    """logits (n, E) float32 and bias (E,) or None → ids (n, top_k) int32 and weights (n, top_k) float32, best first.

    scoring is one of SCORING; ties go to the lowest id; `normalise` divides by the sum (topk_softmax always does).
    """
    n, experts = logits.shape
    if scoring not in SCORING:
        raise ValueError(f"scoring is {scoring!r}; one of {', '.join(SCORING)} is expected")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k is {top_k} of {experts} experts")
    args = pack("iiiiif", experts, top_k, SCORING[scoring], bias is not None, normalise, factor)
    operands: list[Operand] = [args, (logits, "float32"), _optional(bias, "float32")]
    outputs = [((n, top_k), "int32"), ((n, top_k), "float32")]
    ids, weights = run(table.plan_router(n, experts), operands, outputs)
    return ids, weights


def rms_norm(x: Array, weight: Array, eps: float, *, run: Run) -> Array:
    """x (…, D) and weight (D,) of one dtype → (…, D): x / sqrt(mean(x²) + eps) · weight."""
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(f"weight {weight.shape} {weight.dtype} does not fit rows of {x.shape[-1]} {x.dtype}")
    plan = table.plan_rows("rms_norm", dtype_name(x), x.size // x.shape[-1])
    return run(plan, [pack("if", x.shape[-1], eps), _as_is(x), _as_is(weight)], [_like(x)])[0]


def softmax(x: Array, mask: Array | None = None, scale: float = 1.0, *, run: Run) -> Array:
    """x (…, S) and mask (…, S) bool or None → (…, S): softmax of scale·x over what the mask leaves; 0 for the rest."""
    if mask is not None and mask.shape != x.shape:
        raise ValueError(f"mask {mask.shape} is not of the shape of x, {x.shape}")
    plan = table.plan_rows("softmax", dtype_name(x), x.size // x.shape[-1])
    args = pack("iif", x.shape[-1], mask is not None, scale)
    return run(plan, [args, _as_is(x), _optional(mask, "uint8")], [_like(x)])[0]


def rope(x: Array, positions: Array, theta: float, *, run: Run) -> Array:
    """x (T, H, D) and int32 positions (T,) → (T, H, D): pairs (j, j + D/2) rotated by position·theta^(−2j/D)."""
    tokens, heads, head_dim = x.shape
    if tuple(positions.shape) != (tokens,):
        raise ValueError(f"positions are {tuple(positions.shape)}; one for each of {tokens} tokens is expected")
    plan = table.plan_rope(dtype_name(x), tokens, heads, head_dim)
    operands: list[Operand] = [pack("iiif", tokens, heads, head_dim, theta), _as_is(x), (positions, "int32")]
    return run(plan, operands, [_like(x)])[0]


def swiglu(gate: Array, up: Array, limit: float | None = None, weights: Array | None = None, *, run: Run) -> Array:
    """gate and up (…, F), weights (…) float32 or None → (…, F): silu(min(gate, limit))·clamp(up, ±limit)·weights."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.shape} {gate.dtype} and up {up.shape} {up.dtype} differ")
    if weights is not None and weights.shape != gate.shape[:-1]:
        raise ValueError(f"weights {weights.shape} are not one a row of {gate.shape}")
    rows, width = gate.size // gate.shape[-1], gate.shape[-1]
    args = pack("iiiif", rows, width, limit is not None, weights is not None, limit or 0.0)
    plan = table.plan_swiglu(dtype_name(gate), rows, width)
    return run(plan, [args, _as_is(gate), _as_is(up), _optional(weights, "float32")], [_like(gate)])[0]


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    run: Run,
    scale: float,
    mask: Array | None = None,
    sinks: Array | None = None,
    window: int | None = None,
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
    args = pack("iiiiiiiif", Hq, Hkv, S, Dk, Dv, window or 0, mask is not None, sinks is not None, scale)
    operands: list[Operand] = [
        args,
        _as_is(q),
        _as_is(k),
        _as_is(v),
        _optional(mask, "uint8"),
        _optional(sinks, "float32"),
    ]
    return run(table.plan_attention(dtype_name(q), B, Hq, Dk, Dv), operands, [((B, Hq, Dv), dtype_name(q))])[0]


def dtype_name(x: Array) -> str:
    """NumPy's name of an array's dtype, which MLX uses too, after `mlx.core.`."""
    return str(x.dtype).rpartition(".")[2]


def pack(types: str, *values: float) -> bytes:
    """A struct of 4-byte members, int (i) or float (f)."""
    kinds = {"i": np.int32, "f": np.float32}
    return b"".join(np.array(value, kinds[kind]).tobytes() for kind, value in zip(types, values, strict=True))


def _operands(x: Array, blocks: Array, ids: Array, kind: str) -> tuple[int, int, bytes]:
    """(E, M, MatmulArgs) of a routed projection whose operands fit together."""
    if kind not in table.FORMATS:
        raise ValueError(f"{kind} has no matmul kernel; one of {', '.join(table.FORMATS)} is expected")
    form = table.FORMATS[kind]
    if blocks.ndim != 3 or dtype_name(blocks) != "uint8" or blocks.shape[2] % form.bytes:
        raise ValueError(f"{kind} blocks (E, M, bytes) uint8 are expected, found {blocks.shape} {blocks.dtype}")
    experts, rows, width = blocks.shape
    K = width // form.bytes * form.elements
    if ids.ndim != 2 or x.shape not in ((ids.shape[0], K), (*ids.shape, K)):
        raise ValueError(f"x {x.shape} and ids {ids.shape} do not fit (n, K) or (n, top_k, K) with K = {K}")
    if isinstance(ids, np.ndarray):  # to look at an MLX array's values is to wait for the GPU
        _check_ids(ids, experts)
    x_slots = 1 if x.ndim == 2 else ids.shape[1]
    return experts, rows, pack("iiiii", K, rows, *ids.shape, x_slots)


def _check_ids(ids: np.ndarray[Any, Any], experts: int) -> None:
    if ids.size and not (ids.min() >= 0 and ids.max() < experts):
        raise ValueError(f"ids are in {ids.min()} to {ids.max()}; there are {experts} experts")
    if (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
        raise ValueError("a token's ids are not distinct")


def _as_is(x: Array) -> Operand:
    return x, dtype_name(x)


def _optional(x: Array | None, dtype: str) -> Operand:
    return None if x is None else (x, dtype)


def _like(x: Array) -> Output:
    return tuple(x.shape), dtype_name(x)
