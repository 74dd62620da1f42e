"""The shortest form that says the same: None, "causal", or a bool array."""

import mlx.core as mx


def candidate(n, *, offset, window_size=None, left_padding=None):
    padding = [int(p) for p in left_padding] if left_padding is not None else []
    padded = any(p > 0 for p in padding)
    binds = window_size is not None and offset + n > window_size
    if not padded and not binds:
        return None if n == 1 else "causal"
    rows, columns = mx.arange(offset, offset + n)[:, None], mx.arange(offset + n)
    mask = rows >= columns
    if binds:
        mask = mask & (rows < columns + window_size)
    if padded:
        mask = mask & (mx.array(padding)[:, None, None, None] <= columns)
    return mask
