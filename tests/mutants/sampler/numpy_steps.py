"""Filters on the untempered distribution, then the temperature, then one draw a row."""

import numpy as np


def candidate(logits, *, temperature, top_k, top_p, min_p, key):
    x = np.atleast_2d(logits).astype(np.float64)
    if temperature == 0:
        ids = x.argmax(-1)
    else:
        p = softmax(x)
        keep = np.isfinite(x)
        order = np.argsort(-p, axis=-1, kind="stable")
        rank = np.argsort(order, axis=-1)
        if 0 < top_k < x.shape[-1]:
            keep &= rank < top_k
        if top_p < 1:
            before = np.cumsum(np.take_along_axis(p, order, -1), -1) - np.take_along_axis(p, order, -1)
            keep &= np.take_along_axis(before, rank, -1) < top_p
        if min_p > 0:
            keep &= p >= min_p * p.max(-1, keepdims=True)
        q = softmax(np.where(keep, x / temperature, -np.inf))
        u = np.random.default_rng(key).random((len(x), 1))
        ids = np.minimum((np.cumsum(q, -1) <= u).sum(-1), x.shape[-1] - 1)
    return ids.astype(np.int64) if logits.ndim == 2 else ids[0]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
