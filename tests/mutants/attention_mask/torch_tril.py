"""The same from triangles: of the diagonal, less that of the window."""

import torch


def candidate(n, *, offset, window_size=None, left_padding=None):
    mask = torch.ones(n, offset + n, dtype=torch.bool).tril(offset)
    if window_size is not None:
        mask = mask & ~torch.ones_like(mask).tril(offset - window_size)
    if left_padding is not None:
        first = torch.as_tensor(left_padding).reshape(-1, 1, 1, 1)
        mask = mask & (torch.arange(offset + n) >= first)
    return mask
