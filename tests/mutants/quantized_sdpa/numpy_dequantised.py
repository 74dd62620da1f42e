"""Attention over quantised tokens: made into float32 numbers, then step by step. Blind queries get zeros."""

import numpy as np


def unpack(packed, bits):
    """codes, scales, biases -> the numbers [B, Hkv, S, D]: codes lie in 32-bit words, the first in the lowest bits."""
    codes, scales, biases = packed
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    mask = np.uint32(2**bits - 1)
    values = (codes[..., None] >> shifts) & mask
    values = values.reshape(*codes.shape[:-1], -1).astype(np.float32)
    group = values.shape[-1] // scales.shape[-1]
    scale = np.repeat(scales.astype(np.float32), group, axis=-1)
    bias = np.repeat(biases.astype(np.float32), group, axis=-1)
    return values * scale + bias


def candidate(q, keys, values, *, scale, mask=None, sinks=None, group_size, bits):
    B, Hq, L, D = q.shape
    k, v = unpack(keys, bits), unpack(values, bits)
    Hkv, S = k.shape[1:3]
    r = Hq // Hkv
    queries = q.astype(np.float32).reshape(B, Hkv, r, L, D) * np.float32(scale)
    scores = queries @ k[:, :, None].swapaxes(-1, -2)
    if isinstance(mask, str):
        mask = np.tri(L, S, S - L, dtype=bool)
    if mask is not None:
        if mask.ndim == 4:
            heads = (Hkv, r) if mask.shape[1] > 1 else (1, 1)
            mask = mask.reshape(mask.shape[0], *heads, *mask.shape[2:])
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask.astype(np.float32)
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(np.float32).reshape(Hkv, r, 1, 1)
        top = np.maximum(top, sink)
    top = np.where(np.isneginf(top), 0, top)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sink - top)
    output = (weights @ v[:, :, None]) / np.where(total > 0, total, 1)
    return output.reshape(B, Hq, L, -1).astype(q.dtype)
