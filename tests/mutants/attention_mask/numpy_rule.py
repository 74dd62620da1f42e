"""The rule for visible keys, always as a bool array."""

import numpy as np


def candidate(n, *, offset, window_size=None, left_padding=None):
    query = np.arange(offset, offset + n)[:, None]
    key = np.arange(offset + n)[None]
    mask = query >= key
    if window_size is not None:
        mask = mask & (query < key + window_size)
    if left_padding is not None:
        padding = np.asarray(left_padding)[:, None, None, None]
        mask = mask & (padding <= key)
    return mask
