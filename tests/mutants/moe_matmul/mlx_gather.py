"""MLX's gather_mm, which on the CPU takes float32 alone."""

import mlx.core as mx


def candidate(x, w, ids):
    wide = w.astype(mx.float32).swapaxes(-1, -2)
    y = mx.gather_mm(x.astype(mx.float32)[:, None, None, :], wide, rhs_indices=ids)
    return y.squeeze(-2).astype(x.dtype)
