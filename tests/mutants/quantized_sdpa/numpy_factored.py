"""Attention over quantised tokens without making their numbers: scale·(q·codes) + bias·sum(q), group by group."""

import numpy as np


def unpack(words, bits):
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words[..., None] >> shifts) & np.uint32(2**bits - 1)
    return codes.reshape(*words.shape[:-1], -1).astype(np.float32)


def candidate(q, keys, values, *, scale, mask=None, sinks=None, group_size, bits):
    B, Hq, L, _ = q.shape
    Hkv, S = keys[0].shape[1:3]
    r = Hq // Hkv
    codes, scales, biases = unpack(keys[0], bits), keys[1].astype(np.float32), keys[2].astype(np.float32)
    queries = q.astype(np.float32).reshape(B, Hkv, r * L, -1, group_size)
    codes = codes.reshape(B, Hkv, S, -1, group_size)
    inner = np.einsum("bhlgd,bhsgd->bhlsg", queries, codes)
    sums = queries.sum(axis=-1)
    scores = (inner * scales[:, :, None]).sum(axis=-1) + sums @ biases.swapaxes(-1, -2)
    scores = scores.reshape(B, Hq, L, S) * np.float32(scale)
    if isinstance(mask, str):
        mask = np.arange(S) <= np.arange(S - L, S)[:, None]
    if mask is not None and mask.dtype == np.bool_:
        scores = np.where(mask, scores, np.finfo(np.float32).min)
    elif mask is not None:
        scores = scores + mask.astype(np.float32)
    if sinks is not None:
        column = np.broadcast_to(sinks.astype(np.float32)[:, None, None], (B, Hq, L, 1))
        scores = np.concatenate([scores, column], axis=-1)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = (weights / weights.sum(axis=-1, keepdims=True))[..., :S].reshape(B, Hkv, r * L, S)
    codes, scales, biases = unpack(values[0], bits), values[1].astype(np.float32), values[2].astype(np.float32)
    scaled = (codes.reshape(B, Hkv, S, -1, group_size) * scales[..., None]).reshape(B, Hkv, S, -1)
    output = weights @ scaled + np.repeat(weights @ biases, group_size, axis=-1)
    return output.reshape(B, Hq, L, -1).astype(q.dtype)
