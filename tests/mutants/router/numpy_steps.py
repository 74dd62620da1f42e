"""In float32 throughout; slots by descending score, ties to the lowest id."""

import numpy as np


def scores_of(x, scoring):
    if scoring == "softmax":
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)
    if scoring == "sigmoid":
        return 1 / (1 + np.exp(-x))
    middle = np.log1p(np.exp(np.clip(x, -20, 20)))
    return np.sqrt(np.where(x > 20, x, np.where(x < -20, np.exp(np.minimum(x, 0)), middle)))


def candidate(logits, *, top_k, scoring, bias=None, norm=True, scale=1.0):
    x = logits.astype(np.float32)
    if scoring == "topk_softmax":
        ids = np.argsort(-x, axis=-1, kind="stable")[:, :top_k]
        return ids.astype(np.int32), scores_of(np.take_along_axis(x, ids, -1), "softmax") * np.float32(scale)
    scores = scores_of(x, scoring)
    chosen_by = scores if bias is None else scores + bias
    ids = np.argsort(-chosen_by, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, ids, -1)
    if norm:
        weights = weights / np.maximum(weights.sum(-1, keepdims=True), np.float32(1e-20))
    return ids.astype(np.int32), weights * np.float32(scale)
