"""Tiles of 32 by 32 outputs, 16 products at a time, ragged at the ends; K split in two, added at the end."""

import numpy as np

TILE, STEP = 32, 16


def candidate(a, b):
    wide, other = a.astype(np.float32), b.astype(np.float32)
    M, K = a.shape[-2:]
    N = b.shape[-1]
    other = np.broadcast_to(other, (*a.shape[:-2], K, N))
    out = np.empty((*a.shape[:-2], M, N), np.float32)
    middle = K // 2 // STEP * STEP
    for row in range(0, M, TILE):
        for column in range(0, N, TILE):
            place = (..., slice(row, row + TILE), slice(column, column + TILE))
            halves = [part(wide, other, place, first, last) for first, last in ((0, middle), (middle, K))]
            out[place] = halves[0] + halves[1]
    return out.astype(a.dtype)


def part(a, b, place, first, last):
    rows, columns = place[1:]
    total = np.zeros((*a.shape[:-2], len(range(a.shape[-2])[rows]), len(range(b.shape[-1])[columns])), np.float32)
    for k in range(first, last, STEP):
        end = min(k + STEP, last)
        total += a[..., rows, k:end] @ b[..., k:end, columns]
    return total
