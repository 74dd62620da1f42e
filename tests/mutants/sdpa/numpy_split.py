"""Attention in parts: each part of the keys gives a maximum, a total and a sum; a second step puts them together."""

import numpy as np

PART = 16


def candidate(q, k, v, *, scale, mask=None, sinks=None):
    B, Hq, L, D = q.shape
    Hkv, S, Dv = k.shape[1], k.shape[2], v.shape[3]
    # The queries of a group share their keys: [B, Hkv, r, L, D].
    grouped = q.astype(np.float32).reshape(B, Hkv, Hq // Hkv, L, D)
    keys, values = k.astype(np.float32)[:, :, None], v.astype(np.float32)[:, :, None]
    bias = split_heads(mask, B, Hkv, Hq // Hkv, L, S)
    tops, totals, sums = [], [], []
    for start in range(0, S, PART):
        part = slice(start, start + PART)
        scores = (grouped @ keys[..., part, :].swapaxes(-1, -2)) * np.float32(scale) + bias[..., part]
        top = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
        tops.append(top)
        totals.append(weights.sum(axis=-1, keepdims=True))
        sums.append(weights @ values[..., part, :])
    return combine(tops, totals, sums, sinks, Hkv).reshape(B, Hq, L, Dv).astype(q.dtype)


def split_heads(mask, B, Hkv, r, L, S):
    """What is added to the scores, [B, Hkv, r, L, S]."""
    if mask is None:
        return np.zeros((1, 1, 1, 1, S), np.float32)
    if isinstance(mask, str):
        mask = np.tri(L, S, S - L, dtype=bool)
    if mask.dtype == np.bool_:
        mask = np.where(mask, 0, -np.inf)
    full = np.broadcast_to(mask.astype(np.float32), (B, Hkv * r, L, S))
    return full.reshape(B, Hkv, r, L, S)


def combine(tops, totals, sums, sinks, Hkv):
    if sinks is not None:
        sink = sinks.astype(np.float32).reshape(1, Hkv, -1, 1, 1)
        tops.append(np.broadcast_to(sink, tops[0].shape))
        totals.append(np.ones_like(totals[0]))
        sums.append(np.zeros_like(sums[0]))
    top = np.max(tops, axis=0)
    top = np.where(np.isneginf(top), 0, top)
    factors = [np.exp(t - top) for t in tops]
    total = sum(f * t for f, t in zip(factors, totals, strict=True))
    output = sum(f * s for f, s in zip(factors, sums, strict=True))
    return output / np.where(total > 0, total, 1)
