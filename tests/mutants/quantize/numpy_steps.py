"""From the least to the largest value of a group in equal steps, each weight by its nearest code."""

import numpy as np


def pack(codes, bits):
    single = (codes.astype(np.uint64)[..., None] >> np.arange(bits, dtype=np.uint64)) & np.uint64(1)
    words = single.reshape(*codes.shape[:-1], -1, 32).astype(np.uint32)
    return (words << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32)


def candidate(w, *, group_size, bits):
    top = 2**bits - 1
    groups = w.astype(np.float32).reshape(*w.shape[:-1], -1, group_size)
    low, high = groups.min(-1), groups.max(-1)
    scale = np.maximum((high - low) / top, 1e-7).astype(np.float32)
    codes = np.clip(np.round((groups - low[..., None]) / scale[..., None]), 0, top)
    return pack(codes.reshape(w.shape), bits), scale.astype(w.dtype), low.astype(w.dtype)
