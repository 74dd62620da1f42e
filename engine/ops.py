"""The engine's ops under the names and signatures of the contracts (audits/contracts/), for arrays of any batch shape.

Thin: each calls what the model itself calls, so that judging these judges the model's arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx
import numpy as np

from engine import layers, sampling
from engine import router as routing
from engine import sdpa as attention
from engine.kquants import dequantize

P = ParamSpec("P")
R = TypeVar("R")


def any_layout(op: Callable[P, R]) -> Callable[P, R]:
    """`op` for operands that lie in memory in any way, on CUDA too.

    There MLX 0.32.4 reads some views wrongly and loses the device over others (docs/evidence/cuda-contracts.md), so
    operands are copied first. The model's own operands are none of those views, and its modules call `op` itself.
    """

    @functools.wraps(op)
    def settled(*args: P.args, **kwargs: P.kwargs) -> R:
        if not layers.on_cuda():
            return op(*args, **kwargs)
        call: Callable[..., R] = op
        return call(*map(_copied, args), **{name: _copied(value) for name, value in kwargs.items()})

    return settled


def _copied(value: Any) -> Any:
    """Arrays, in tuples too, in memory of their own: mx.contiguous alone would keep an offset into other memory."""
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    return mx.contiguous(mx.where(True, value, value)) if isinstance(value, mx.array) else value


sampler = any_layout(sampling.sampler)
sdpa = any_layout(attention.sdpa)
quantized_sdpa = any_layout(attention.quantized_sdpa)


def softmax(x: mx.array) -> mx.array:
    """x [..., S] -> softmax over the last axis, computed in float32 and returned in x's dtype."""
    return mx.softmax(x, axis=-1, precise=True)


def rms_norm(x: mx.array, weight: mx.array, *, eps: float) -> mx.array:
    """x [..., D], weight [D] -> x / sqrt(mean(x²) + eps) · weight."""
    return mx.fast.rms_norm(x, weight, eps)


@any_layout
def rope(x: mx.array, *, dims: int, base: float, scale: float, offset: int, traditional: bool) -> mx.array:
    """x [B, H, L, D] -> the first `dims` of D rotated, by angles (offset + l)·scale·base^(−2j/dims)."""
    return mx.fast.rope(x, dims, traditional=traditional, base=base, scale=scale, offset=offset)


def swiglu(gate: mx.array, up: mx.array, *, limit: float | None = None) -> mx.array:
    """gate, up [..., F] -> silu(min(gate, limit)) · clamp(up, ±limit)."""
    return layers.swiglu(gate, up, limit)


@any_layout
def matmul(a: mx.array, b: mx.array) -> mx.array:
    """a [..., M, K] @ b [..., K, N] -> [..., M, N]."""
    return a @ b


@any_layout
def quantized_matmul(
    x: mx.array,
    codes: mx.array,
    scales: mx.array,
    biases: mx.array,
    *,
    transpose: bool,
    group_size: int,
    bits: int,
) -> mx.array:
    """x [..., K] times affine-quantised weights ([N, K] if transpose, else [K, N]) -> [..., N] in x's dtype.

    On the CPU scales and biases are widened first: MLX keeps the running sum in their dtype there (layers.widen).
    """
    wide = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else scales.dtype
    weights = codes, scales.astype(wide), biases.astype(wide)
    y = layers.quantized_matmul(x.astype(wide), weights, transpose=transpose, group_size=group_size, bits=bits)
    return y.astype(x.dtype)


@any_layout
def quantize(w: mx.array, *, group_size: int, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    """w [..., K] -> codes uint32 [..., K·bits/32], scales and biases [..., K/group_size] in w's dtype (MLX affine)."""
    codes, scales, biases = mx.quantize(w, group_size=group_size, bits=bits)
    return codes, scales, biases


@any_layout
def moe_matmul(x: mx.array, w: mx.array, ids: mx.array, *, format: str | None = None) -> mx.array:
    """x [T, K], w [E, M, K] or blocks uint8 of a `format` of kquants, ids [T, k] -> [T, k, M]: each token times the
    matrices of its experts.

    Blocks are decoded first, as they are when a checkpoint is read.
    """
    if format is not None:
        w = mx.array(dequantize(np.array(w), format)).astype(x.dtype)
    stack = w.astype(mx.float32) if mx.default_device() == mx.Device(mx.cpu) else w
    y = layers.gather_mm(x[:, None, None, :], stack.swapaxes(-1, -2), ids, in_order=False)
    return y.squeeze(-2)


def router(
    logits: mx.array,
    *,
    top_k: int,
    scoring: str,
    bias: mx.array | None = None,
    norm: bool = True,
    scale: float = 1.0,
) -> tuple[mx.array, mx.array]:
    """logits [T, E] -> ids int32 [T, k] and weights float32 [T, k], best first, ties to the lowest id."""
    return routing.choose(logits.astype(mx.float32), bias, k=top_k, scoring=scoring, norm=norm, scale=scale)


def top_k(x: mx.array, *, k: int) -> mx.array:
    """x [..., E] -> ids int32 [..., k] of the k largest, descending, lowest id first among equals."""
    return routing.top_k(x.astype(mx.float32), k)
