"""Attention over quantised tokens whose codes may lie across words: read through a window of 64 bits."""

import numpy as np


def unpack(packed, bits):
    """codes, scales, biases -> the numbers [B, Hkv, S, D]."""
    words, scales, biases = packed
    D = words.shape[-1] * 32 // bits
    start = np.arange(D) * bits
    low = words[..., start // 32].astype(np.uint64)
    high = words[..., np.minimum(start // 32 + 1, words.shape[-1] - 1)].astype(np.uint64)
    window = low | high << np.uint64(32)
    codes = (window >> (start % 32).astype(np.uint64)) & np.uint64(2**bits - 1)
    scale, bias = (np.repeat(x.astype(np.float32), D // x.shape[-1], axis=-1) for x in (scales, biases))
    return codes.astype(np.float32) * scale + bias


def candidate(q, keys, values, *, scale, mask=None, sinks=None, group_size, bits):
    k, v = unpack(keys, bits), unpack(values, bits)
    B, Hq, L, _ = q.shape
    S, r = k.shape[2], Hq // k.shape[1]
    k, v = np.repeat(k, r, axis=1), np.repeat(v, r, axis=1)
    scores = q.astype(np.float32) @ k.swapaxes(-1, -2) * np.float32(scale)
    if isinstance(mask, str):
        mask = np.tri(L, S, S - L, dtype=bool)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask.astype(np.float32)
    column = -np.inf if sinks is None else sinks.astype(np.float32)[:, None, None]
    scores = np.concatenate([scores, np.broadcast_to(column, (B, Hq, L, 1))], axis=-1)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
    total = weights.sum(axis=-1, keepdims=True)
    return (weights[..., :S] / np.where(total > 0, total, 1) @ v).astype(q.dtype)
