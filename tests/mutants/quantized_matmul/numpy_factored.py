"""Scales and biases taken out of the sums of a group: scale·Σ(x·code) + bias·Σx."""

import numpy as np


def unpack(words, bits):
    single = (words[..., None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    grouped = single.reshape(*words.shape[:-1], -1, bits).astype(np.int64)
    return (grouped << np.arange(bits)).sum(-1)


def candidate(x, codes, scales, biases, *, transpose, group_size, bits):
    q = unpack(np.ascontiguousarray(codes), bits).astype(np.float32)
    scale, bias, wide = (v.astype(np.float32) for v in (scales, biases, x))
    if not transpose:
        w = q * np.repeat(scale, group_size, axis=-1) + np.repeat(bias, group_size, axis=-1)
        return (wide @ w).astype(x.dtype)
    total = np.zeros((len(x), len(q)), np.float32)
    for group in range(scale.shape[-1]):
        part = slice(group * group_size, (group + 1) * group_size)
        total += (wide[:, part] @ q[:, part].T) * scale[:, group]
        total += wide[:, part].sum(-1, keepdims=True) * bias[:, group]
    return total.astype(x.dtype)
