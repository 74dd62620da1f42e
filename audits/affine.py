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
    single = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(single.reshape(*codes.shape[:-1], codes.shape[-1] * bits), axis=-1, bitorder="little")
    return packed.view("<u4").astype(np.uint32, copy=False)


def unpack(words: Array, bits: int) -> Array:
    """uint32 [..., n] -> codes int64 [..., 32·n/bits]."""
    first = np.arange(words.shape[-1] * 32 // bits) * bits  # bits before each code, which may end in the next word
    word, shift = first // 32, (first % 32).astype(np.uint64)
    wide = words.astype(np.uint64)
    after = np.minimum(word + 1, words.shape[-1] - 1)
    both = wide.take(word, -1) | wide.take(after, -1) << np.uint64(32)
    return np.asarray((both >> shift & np.uint64(2**bits - 1)).astype(np.int64))


def decode(words: Array, scales: Array, biases: Array, bits: int) -> tuple[Array, Array]:
    """The weights [..., K] that codes, scales and biases [..., K/group] stand for, in float64, and |code·scale| +
    |bias|, the magnitude that rounding errors of a kernel go by.
    """
    codes = unpack(words, bits)
    group = codes.shape[-1] // scales.shape[-1]
    scale, bias = (np.repeat(x.astype(np.float64), group, axis=-1) for x in (scales, biases))
    return codes * scale + bias, np.abs(codes * scale) + np.abs(bias)
