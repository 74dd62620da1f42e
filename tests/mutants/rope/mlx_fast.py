"""MLX's own."""

import mlx.core as mx


def candidate(x, *, dims, base, scale, offset, traditional):
    return mx.fast.rope(x, dims, traditional=traditional, base=base, scale=scale, offset=offset)
