"""Which keys a chunk of new tokens may look at: the one rule that every cache and every route of attention shares.

Columns are counted in what is buffered, padding included, and never by a row's position counter: that one is negative
inside left padding and runs ahead of the buffer once a sliding window has dropped tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

# None: every key is visible. "causal": query i of L sees key j of S iff j <= i + S − L (MLX's alignment, bottom right).
Mask = mx.array | str | None


def attention_mask(
    n: int,
    *,
    offset: int,
    window_size: int | None = None,
    left_padding: Sequence[int] | mx.array | None = None,
    keep: int = 0,
    return_array: bool = False,
) -> Mask:
    """Bool [n, offset + n] or [B, 1, n, offset + n], True = visible; None or "causal" where that says the same.

    Query i lies in column c = offset + i, after `offset` buffered ones. It sees column j iff p_b <= j <= c and
    (j > c − window_size or j < p_b + keep), with p_b = left_padding[b], below 0 as 0: a window slides, a row's first
    `keep` tokens stay. A query inside the padding sees nothing. `return_array` asks for an array instead of "causal".
    None is for one token without a window and without padding, and only then: attention without a mask may be another
    kernel that rounds otherwise, and so the kernel doesn't change when a window begins to bind. Raises ValueError for
    sizes below 1.
    """
    if n < 1 or (window_size is not None and window_size < 1):
        raise ValueError(f"n is {n} and window_size {window_size}; at least 1 is expected of each")
    padding = _padding(left_padding)
    # The last query is the one that a window shortens most: the row's column 0 must be in its reach, or in `keep`.
    window = None if window_size is None or offset + n <= window_size + keep else window_size
    if window is None and not padding:
        if n == 1 and window_size is None:
            return None
        if n > 1 and not return_array:
            return "causal"
    queries, keys = mx.arange(offset, offset + n)[:, None], mx.arange(offset + n)
    first = mx.array(padding)[:, None, None, None] if padding else mx.array(0)
    mask = keys <= queries
    if window is not None:
        near = keys > queries - window
        mask = mask & ((near | (keys < first + keep)) if keep else near)
    return mask & (keys >= first) if padding else mask


def _padding(left_padding: Sequence[int] | mx.array | None) -> list[int]:
    """The padding of every row, or nothing if no row has any."""
    if left_padding is None:
        return []
    rows = [max(p, 0) for p in integers(left_padding)]
    return rows if any(rows) else []


def integers(values: Sequence[int] | mx.array) -> list[int]:
    """One number for each row as Python integers; an array is evaluated for it."""
    if not isinstance(values, mx.array):
        return [int(n) for n in values]
    return [int(n) for n in np.array(values).reshape(-1)]
