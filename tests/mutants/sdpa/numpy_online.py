"""Attention by an online softmax: tiles of queries, one sweep over blocks of keys, in base 2."""

import numpy as np

BLOCK = 16
ROWS = 8
LOG2E = np.float32(np.log2(np.e))


def bias_of(mask, B, Hq, L, S):
    """What is added to the scores [B, Hq, L, S], in base 2."""
    if mask is None:
        return np.zeros((B, Hq, L, S), np.float32)
    if isinstance(mask, str):
        mask = np.arange(S)[None] <= np.arange(S - L, S)[:, None]
    if mask.dtype == np.bool_:
        mask = np.where(mask, np.float32(0), np.float32(-np.inf))
    return np.broadcast_to(mask.astype(np.float32) * LOG2E, (B, Hq, L, S))


def candidate(q, k, v, *, scale, mask=None, sinks=None):
    B, Hq, L, _ = q.shape
    Hkv, S, Dv = k.shape[1], k.shape[2], v.shape[3]
    queries = q.astype(np.float32) * np.float32(scale) * LOG2E
    bias = bias_of(mask, B, Hq, L, S)
    output = np.empty((B, Hq, L, Dv), np.float32)
    for b in range(B):
        for h in range(Hq):
            keys, values = (x[b, h // (Hq // Hkv)].astype(np.float32) for x in (k, v))
            for row in range(0, L, ROWS):
                rows = slice(row, min(row + ROWS, L))
                n = rows.stop - rows.start
                top = np.full((n, 1), -np.inf, np.float32)
                total = np.zeros((n, 1), np.float32)
                gathered = np.zeros((n, Dv), np.float32)
                if sinks is not None:
                    top[:] = np.float32(sinks[h]) * LOG2E
                    total[:] = 1
                for start in range(0, S, BLOCK):
                    block = slice(start, min(start + BLOCK, S))
                    scores = queries[b, h, rows] @ keys[block].T + bias[b, h, rows, block]
                    new = np.maximum(top, scores.max(axis=-1, keepdims=True))
                    safe = np.where(np.isneginf(new), 0, new)
                    factor = np.exp2(top - safe)
                    weights = np.exp2(scores - safe)
                    total = total * factor + weights.sum(axis=-1, keepdims=True)
                    gathered = gathered * factor + weights @ values[block]
                    top = new
                output[b, h, rows] = gathered / np.where(total > 0, total, 1)
    return output.astype(q.dtype)
