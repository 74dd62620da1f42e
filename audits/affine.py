"""MLX's affine quantisation in NumPy: a weight is code·scale + bias, codes packed into 32-bit words, low bits first.

Codes of 3 and 6 bits lie back to back across words. Groups run along the last axis.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

BITS = (4, 8, 2, 3, 6)
GROUPS = (64, 32, 128)


def pack(codes: Array, bits: int) -> Array:
    """codes [..., K] below 2^bits -> uint32 [..., K·bits/32]; K·bits must be a multiple of 32."""
    if codes.shape[-1] * bits % 32:
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits don't fill whole 32-bit words")
    single = (codes.astype(np.uint64)[..., None] >> np.arange(bits, dtype=np.uint64)) & np.uint64(1)
    words = single.reshape(*codes.shape[:-1], -1, 32).astype(np.uint32)
    return np.asarray((words << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32))


def unpack(words: Array, bits: int) -> Array:
    """uint32 [..., n] -> codes int64 [..., 32·n/bits]."""
    single = (words[..., None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    grouped = single.reshape(*words.shape[:-1], -1, bits).astype(np.int64)
    return np.asarray((grouped << np.arange(bits)).sum(-1))


def decode(words: Array, scales: Array, biases: Array, bits: int) -> tuple[Array, Array]:
    """The weights [..., K] that codes, scales and biases [..., K/group] stand for, in float64, and |code·scale| +
    |bias|, the magnitude that rounding errors of a kernel go by.
    """
    codes = unpack(words, bits)
    group = codes.shape[-1] // scales.shape[-1]
    scale, bias = (np.repeat(x.astype(np.float64), group, axis=-1) for x in (scales, biases))
    return codes * scale + bias, np.abs(codes * scale) + np.abs(bias)
