"""MLX's fused attention as it is."""

import mlx.core as mx


def candidate(q, k, v, *, scale, mask=None, sinks=None):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
