"""Scaled dot-product attention, dense and over quantised keys and values, with one contract for every mask.

    o = Σ_s softmax_s(scale·q·k_s over the visible s, and the sink) · v_s

B batch, Hq query heads, Hkv key heads (Hq = r·Hkv; query head h reads key head h // r), L queries, S keys, D and Dv
head sizes. A mask is None, "causal" (bottom right: query i sees key j iff j <= i + S − L), bool (True = visible) or
additive, of any shape that broadcasts to [B, Hq, L, S]. A query that sees nothing gives zeros, with or without a sink.
In an additive mask what hides is −inf, or what lies below half of its dtype's lowest number: −1e9 in float32 is a bias.

The dense route is MLX's fused one. What it gives for queries that see nothing depends on the backend (an average of
all values, NaN, or zeros), so those rows are overwritten; without a mask, or with "causal" and L <= S, there are none.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from engine.caches.codecs import Arrays
from engine.layers import quantized_matmul
from engine.masks import Mask

Softmax = Callable[[mx.array], mx.array]


def softmax(scores: mx.array) -> mx.array:
    """[…, S] float32 → […, S]: softmax over the last axis."""
    return mx.softmax(scores, axis=-1, precise=True)


def sdpa(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask = None, sinks: mx.array | None = None
) -> mx.array:
    """q [B, Hq, L, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], sinks [Hq] → [B, Hq, L, Dv] in the dtype of q.

    Softmax is in float32. Sinks are rounded to the dtype of q, as weights are; an additive mask that has digits which
    the dtype of q hasn't makes the whole product float32. Raises ValueError for a mask that doesn't fit.
    """
    L, S = q.shape[2], k.shape[2]
    sinks = None if sinks is None else sinks.astype(q.dtype)
    if S == 0:
        return mx.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    if _is_causal(mask):
        blind = max(L - S, 0)
        seen = _fused(q[:, :, blind:], k, v, scale=scale, mask=mask, sinks=sinks)
        return mx.pad(seen, [(0, 0), (0, 0), (blind, 0), (0, 0)]) if blind else seen
    if mask is None:
        return _fused(q, k, v, scale=scale, mask=None, sinks=sinks)
    assert isinstance(mask, mx.array)
    if mask.dtype == mx.bool_ or mx.result_type(mask, q) == q.dtype:
        y = _fused(q, k, v, scale=scale, mask=mask, sinks=sinks)
    else:
        q32, k32, v32 = (x.astype(mx.float32) for x in (q, k, v))
        sinks = None if sinks is None else sinks.astype(mx.float32)
        y = _fused(q32, k32, v32, scale=scale, mask=mask.astype(mx.float32), sinks=sinks).astype(q.dtype)
    return mx.where(_sees(mask), y, mx.zeros((), y.dtype))


def quantized_sdpa(
    q: mx.array,
    keys: Arrays,
    values: Arrays,
    *,
    scale: float,
    mask: Mask = None,
    sinks: mx.array | None = None,
    group_size: int,
    bits: int,
    softmax: Softmax = softmax,
) -> mx.array:
    """q [B, Hq, L, D], keys and values (codes, scales, biases) of [B, Hkv, S, D] and [B, Hkv, S, Dv] → [B, Hq, L, Dv].

    Scores become float32 before the mask and the softmax. MLX's CPU backend keeps the running sum of a quantised
    product in the dtype of the scales (engine.layers.widen), so there both products are done in float32; a GPU does
    them in the dtype of q, with float32 sums. `softmax` is what computes the weights of float32 scores over the last
    axis. Raises ValueError for heads or a mask that don't fit.
    """
    B, Hq, L, D = q.shape
    Hkv, S = keys[0].shape[1:3]
    if Hq % Hkv:
        raise ValueError(f"{Hq} query heads can't share {Hkv} key heads evenly")
    r = Hq // Hkv
    dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else q.dtype
    # The queries of a group read the same keys, so they are rows of one product: nothing has to be repeated.
    rows = (q.astype(dtype) * scale).reshape(B, Hkv, r * L, D)
    scores = _product(rows, keys, transpose=True, group_size=group_size, bits=bits)
    scores = scores.reshape(B, Hkv, r, L, S).astype(mx.float32)
    if _is_causal(mask):
        mask = mx.arange(S) <= mx.arange(S - L, S)[:, None]
    grouped = _grouped(mask, Hkv, r) if isinstance(mask, mx.array) else None
    weights = _weights(scores, grouped, None if sinks is None else sinks.reshape(1, Hkv, r, 1, 1), softmax)
    weights = weights.reshape(B, Hkv, r * L, S).astype(dtype)
    y = _product(weights, values, transpose=False, group_size=group_size, bits=bits).reshape(B, Hkv, r, L, -1)
    if grouped is not None:
        y = mx.where(_sees(grouped), y, mx.zeros((), y.dtype))
    return y.reshape(B, Hq, L, -1).astype(q.dtype)


def _fused(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Mask, sinks: mx.array | None) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)


def _product(x: mx.array, packed: Arrays, *, transpose: bool, group_size: int, bits: int) -> mx.array:
    codes, scales, biases = packed
    weights = codes, scales.astype(x.dtype), biases.astype(x.dtype)
    return quantized_matmul(x, weights, transpose=transpose, group_size=group_size, bits=bits)


def _weights(scores: mx.array, mask: mx.array | None, sinks: mx.array | None, softmax: Softmax) -> mx.array:
    """Weights of float32 `scores` [B, Hkv, r, L, S]; a sink [1, Hkv, r, 1, 1] is one more key, without a value."""
    if mask is not None:
        lowest = mx.array(mx.finfo(scores.dtype).min, scores.dtype)
        scores = mx.where(mask, scores, lowest) if mask.dtype == mx.bool_ else scores + mask.astype(scores.dtype)
    if sinks is None:
        return softmax(scores)
    column = mx.broadcast_to(sinks.astype(scores.dtype), (*scores.shape[:-1], 1))
    return softmax(mx.concatenate([scores, column], axis=-1))[..., :-1]


def _grouped(mask: mx.array, Hkv: int, r: int) -> mx.array:
    """A mask that broadcasts to [B, Hq, L, S] → the same for [B, Hkv, r, L, S]: heads split, or one for all."""
    if mask.ndim > 4:
        raise ValueError(f"the mask has {mask.ndim} axes; at most [B, Hq, L, S] is expected")
    b, heads, rows, columns = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if heads not in (1, Hkv * r):
        raise ValueError(f"the mask has {heads} heads; 1 or {Hkv * r} are expected")
    return mask.reshape(b, *((1, 1) if heads == 1 else (Hkv, r)), rows, columns)


def _sees(mask: mx.array) -> mx.array:
    """[…, L, 1]: whether the query sees any key."""
    if mask.dtype != mx.bool_:
        mask = mask > mx.finfo(mask.dtype).min / 2
    return mask.any(axis=-1, keepdims=True)


def _is_causal(mask: Mask) -> bool:
    if isinstance(mask, str) and mask != "causal":
        raise ValueError(f'mask is {mask!r}; "causal" is the only one that has a name')
    return isinstance(mask, str)
