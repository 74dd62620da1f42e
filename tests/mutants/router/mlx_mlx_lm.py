"""As mlx-lm's: argpartition, the dtype of the logits for softmax."""

import mlx.core as mx


def candidate(logits, *, top_k, scoring, bias=None, norm=True, scale=1.0):
    if scoring == "topk_softmax":
        ids = mx.argpartition(-logits, kth=top_k - 1, axis=-1)[..., :top_k]
        return ids, mx.softmax(mx.take_along_axis(logits, ids, axis=-1), axis=-1, precise=True) * scale
    x = logits.astype(mx.float32)
    if scoring == "softmax":
        scores = mx.softmax(logits, axis=-1, precise=True)
    elif scoring == "sigmoid":
        scores = mx.sigmoid(x)
    else:
        scores = mx.sqrt(mx.logaddexp(x, mx.zeros_like(x)))
    ids = mx.argpartition(-(scores if bias is None else scores + bias), kth=top_k - 1, axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, ids, axis=-1)
    if norm:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return ids, weights * scale
