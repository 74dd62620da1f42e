"""Grouped attention by MLX's quantised products, in float32: on a CPU those add up in the dtype of the scales."""

import mlx.core as mx


def candidate(q, keys, values, *, scale, mask=None, sinks=None, group_size, bits):
    B, Hq, L, D = q.shape
    Hkv, S = keys[0].shape[1:3]
    r = Hq // Hkv
    queries = q.astype(mx.float32).reshape(B, Hkv, r, L, D) * scale
    keys, values = (widened(part) for part in (keys, values))
    scores = mx.quantized_matmul(queries, *keys, transpose=True, group_size=group_size, bits=bits)
    if isinstance(mask, str):
        mask = mx.arange(S - L, S)[:, None] >= mx.arange(S)
    if mask is not None:
        if mask.ndim == 4:
            heads = (1, 1) if mask.shape[1] == 1 else (Hkv, r)
            mask = mask.reshape(mask.shape[0], *heads, *mask.shape[2:])
        if mask.dtype == mx.bool_:
            scores = mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
        else:
            scores = scores + mask
    if sinks is not None:
        column = mx.broadcast_to(sinks.astype(scores.dtype).reshape(1, Hkv, r, 1, 1), (B, Hkv, r, L, 1))
        scores = mx.concatenate([scores, column], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True)[..., :S]
    output = mx.quantized_matmul(weights, *values, transpose=False, group_size=group_size, bits=bits)
    return output.reshape(B, Hq, L, -1).astype(q.dtype)


def widened(packed):
    codes, scales, biases = packed
    return [mx.expand_dims(x, 2) for x in (codes, scales.astype(mx.float32), biases.astype(mx.float32))]
