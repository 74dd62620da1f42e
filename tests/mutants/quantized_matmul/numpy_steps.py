"""Weights decoded to float32, then one product."""

import numpy as np


def unpack(words, bits):
    single = (words[..., None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    grouped = single.reshape(*words.shape[:-1], -1, bits).astype(np.int64)
    return (grouped << np.arange(bits)).sum(-1)


def candidate(x, codes, scales, biases, *, transpose, group_size, bits):
    q = unpack(np.ascontiguousarray(codes), bits).astype(np.float32)
    scale = np.repeat(scales.astype(np.float32), group_size, axis=-1)
    bias = np.repeat(biases.astype(np.float32), group_size, axis=-1)
    w = q * scale + bias
    return (x.astype(np.float32) @ (w.T if transpose else w)).astype(x.dtype)
