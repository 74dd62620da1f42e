"""MLX's own."""

import mlx.core as mx


def candidate(w, *, group_size, bits):
    return tuple(mx.quantize(w, group_size=group_size, bits=bits))
