"""In float32, angles too, rounded once."""

import numpy as np


def candidate(x, *, dims, base, scale, offset, traditional):
    half = dims // 2
    frequency = np.power(np.float64(base), -np.arange(half) / half).astype(np.float32)
    position = np.arange(offset, offset + x.shape[2], dtype=np.float32) * np.float32(scale)
    angle = position[:, None] * frequency
    cos, sin = np.cos(angle), np.sin(angle)
    wide = x.astype(np.float32)
    result = wide.copy()
    first = slice(0, dims, 2) if traditional else slice(0, half)
    second = slice(1, dims, 2) if traditional else slice(half, dims)
    result[..., first] = wide[..., first] * cos - wide[..., second] * sin
    result[..., second] = wide[..., second] * cos + wide[..., first] * sin
    return result.astype(x.dtype)
