"""Grouped attention in MLX, step by step: five axes, a fill of the scores' own dtype, a softmax in float32."""

import mlx.core as mx


def candidate(q, k, v, *, scale, mask=None, sinks=None):
    B, Hq, L, D = q.shape
    Hkv, S = k.shape[1], k.shape[2]
    r = Hq // Hkv
    queries = (q * scale).reshape(B, Hkv, r, L, D)
    scores = queries @ mx.expand_dims(k, 2).swapaxes(-1, -2)
    scores = masked(scores, mask, Hkv, r)
    if sinks is not None:
        column = mx.broadcast_to(sinks.reshape(1, Hkv, r, 1, 1), (*scores.shape[:-1], 1))
        scores = mx.concatenate([scores, column.astype(scores.dtype)], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True)[..., :S]
    return (weights @ mx.expand_dims(v, 2)).reshape(B, Hq, L, -1)


def masked(scores, mask, Hkv, r):
    L, S = scores.shape[-2:]
    if mask is None:
        return scores
    if isinstance(mask, str):
        mask = mx.arange(S) <= mx.arange(S - L, S)[:, None]
    if mask.ndim == 4:
        heads = (Hkv, r) if mask.shape[1] > 1 else (1, 1)
        mask = mask.reshape(mask.shape[0], *heads, *mask.shape[2:])
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
    return scores + mask
