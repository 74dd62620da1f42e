"""Attention step by step in float32: scores, mask, softmax, product. Queries that see nothing get zeros."""

import numpy as np


def visible_scores(scores, mask):
    """scores [B, Hq, L, S] with −inf where the mask hides a key, or with the additive mask added."""
    L, S = scores.shape[-2:]
    if isinstance(mask, str):
        offset = S - L
        mask = np.arange(S) <= np.arange(L)[:, None] + offset
    if mask is None:
        return scores
    if mask.dtype == np.bool_:
        return np.where(mask, scores, np.float32(-np.inf))
    return scores + mask.astype(np.float32)


def candidate(q, k, v, *, scale, mask=None, sinks=None):
    r = q.shape[1] // k.shape[1]
    queries = q.astype(np.float32) * np.float32(scale)
    keys = np.repeat(k.astype(np.float32), r, axis=1)
    values = np.repeat(v.astype(np.float32), r, axis=1)
    scores = visible_scores(queries @ keys.swapaxes(-1, -2), mask)
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(np.float32)[:, None, None]
        top = np.maximum(top, sink)
    top = np.where(np.isneginf(top), 0, top)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sink - top)
    weights = weights / np.where(total > 0, total, 1)
    return (weights @ values).astype(q.dtype)
