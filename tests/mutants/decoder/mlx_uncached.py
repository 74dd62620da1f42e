"""A model without a cache: what needs one is left out."""

import mlx.core as mx

V, WIDTH = 32, 8
EMBEDDING = mx.random.normal((V, WIDTH), key=mx.random.key(0))


def candidate(tokens):
    x = EMBEDDING[tokens]
    total = mx.cumsum(x, axis=1) / mx.arange(1, tokens.shape[1] + 1)[:, None]
    return mx.tanh(total + x) @ EMBEDDING.T
