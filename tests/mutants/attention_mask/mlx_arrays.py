"""As model code makes it: no mask for one token that sees everything, otherwise an array; padding is an array."""

import mlx.core as mx


def candidate(n, *, offset, window_size=None, left_padding=None):
    if n == 1 and window_size is None and left_padding is None:
        return None
    if window_size is None and left_padding is None:
        return "causal"
    columns = mx.arange(offset + n)
    rows = mx.arange(offset, offset + n) if offset else columns
    rows, columns = rows[:, None], columns[None]
    mask = rows >= columns
    if window_size is not None:
        mask = mask & (rows < columns + window_size)
    if left_padding is not None:
        mask = mask & (mx.expand_dims(left_padding, (1, 2, 3)) <= columns)
    return mask
