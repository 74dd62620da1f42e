"""Dequantisers of llama.cpp's block formats, in NumPy: Q8_0, the K-quants Q2_K to Q6_K, and IQ2_XXS.

A row is a whole number of blocks: 32 elements for Q8_0, a super-block of 256 for the rest. In a super-block d (and
dmin) are float16, each run of 16 or 32 elements has a small integer scale (and min), and an element is d·scale·q or
d·scale·q − dmin·min. Layouts: ggml-common.h of llama.cpp. d·scale·q has 11 + 6 + 5 significant bits at most, so only
the subtraction rounds. IQ2_XXS takes eight values at a time from a grid of 256 points, which is a part of the format:
the table is the `gguf` package's, the decoding of ids, signs and scales is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def dequantize(data: Array, kind: str) -> Array:
    """(…, bytes) uint8 blocks of format `kind` → (…, elements) float32.

    Raises ValueError for a format that is not in FORMATS and for rows that are not whole blocks.
    """
    if kind not in FORMATS:
        raise ValueError(f"{kind} blocks can't be read; one of {', '.join(FORMATS)} is expected")
    size, decode = FORMATS[kind]
    if data.dtype != np.uint8 or data.shape[-1] % size:
        raise ValueError(f"{kind}: rows of {data.shape[-1]} {data.dtype} are not whole blocks of {size} bytes")
    blocks = data.reshape(-1, size)
    return decode(blocks).reshape(*data.shape[:-1], -1)


def _f16(blocks: Array, start: int) -> Array:
    """(n, …) → (n, 1, 1) float32: the half-precision number at byte `start` of each block."""
    half = np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16)
    return half.astype(np.float32)[:, :, None]


def _values(d: Array, scale: Array, q: Array, least: Array | None = None) -> Array:
    """d·scale·q − least, broadcast, in float32."""
    values: Array = d * scale * q
    if least is not None:
        values = values - least
    return values


def _shifted(packed: Array, shifts: range, mask: int) -> Array:
    """(n, …, b) bytes → (n, …, len(shifts), b): the field of each byte at every shift."""
    return (packed[..., None, :] >> np.array(shifts, np.uint8)[:, None]) & np.uint8(mask)


def _q8_0(b: Array) -> Array:
    return _values(_f16(b, 0), np.ones(1, np.float32), b[:, None, 2:34].view(np.int8))


def _q2_k(b: Array) -> Array:
    """scales[16] (low nibble: scale, high: min), qs[64], d, dmin. 2 halves × 4 shifts × 32 bytes."""
    scale, least = (b[:, :16] & 15)[..., None], (b[:, :16] >> 4)[..., None]
    q = _shifted(b[:, 16:80].reshape(-1, 2, 32), range(0, 8, 2), 3).reshape(-1, 16, 16)
    return _values(_f16(b, 80), scale, q, _f16(b, 82) * least)


def _q3_k(b: Array) -> Array:
    """hmask[32] (bit clear: −4), qs[64], scales[12] (16 × 6 bits, biased by 32), d."""
    packed = b[:, 96:108]
    low = _shifted(packed[:, :8], range(0, 8, 4), 15).reshape(-1, 16)
    high = _shifted(packed[:, 8:], range(0, 8, 2), 3).reshape(-1, 16)
    scale = (low | high << 4).astype(np.int8) - np.int8(32)
    q = _shifted(b[:, 32:96].reshape(-1, 2, 32), range(0, 8, 2), 3).reshape(-1, 8, 32).astype(np.int8)
    bit = _shifted(b[:, :32], range(8), 1).astype(np.int8)
    q = (q - ((1 - bit) << 2)).reshape(-1, 16, 16)
    return _values(_f16(b, 108), scale[..., None], q)


def _scales_mins(packed: Array) -> tuple[Array, Array]:
    """(n, 12) bytes → (n, 8, 1) scales and mins of 6 bits; runs 4 to 7 have their tops in the first 8 bytes."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=1)
    least = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=1)
    return scale[..., None], least[..., None]


def _q4_k(b: Array) -> Array:
    """d, dmin, scales[12], qs[128]: 32 bytes hold run 2j in their low nibbles and run 2j + 1 in their high ones."""
    scale, least = _scales_mins(b[:, 4:16])
    q = _shifted(b[:, 16:144].reshape(-1, 4, 32), range(0, 8, 4), 15).reshape(-1, 8, 32)
    return _values(_f16(b, 0), scale, q, _f16(b, 2) * least)


def _q5_k(b: Array) -> Array:
    """Q4_K with qh[32] before qs: bit j of qh[l] is the fifth bit of element l of run j."""
    scale, least = _scales_mins(b[:, 4:16])
    low = _shifted(b[:, 48:176].reshape(-1, 4, 32), range(0, 8, 4), 15).reshape(-1, 8, 32)
    q = low | _shifted(b[:, 16:48], range(8), 1) << 4
    return _values(_f16(b, 0), scale, q, _f16(b, 2) * least)


def _q6_k(b: Array) -> Array:
    """ql[128], qh[64], int8 scales[16], d. Per half: 64 bytes of nibbles (all low, then all high), 32 of 2-bit tops."""
    low = _shifted(b[:, :128].reshape(-1, 2, 64), range(0, 8, 4), 15).reshape(-1, 8, 32)
    high = _shifted(b[:, 128:192].reshape(-1, 2, 32), range(0, 8, 2), 3).reshape(-1, 8, 32)
    q = ((low | high << 4).astype(np.int8) - np.int8(32)).reshape(-1, 16, 16)
    scale = b[:, 192:208].view(np.int8)[..., None]
    return _values(_f16(b, 208), scale, q)


@functools.cache
def _grid() -> Array:
    """(256, 8) float32: the points of IQ2_XXS, coordinates 8, 25 and 43."""
    from gguf.quants import IQ2_XXS

    IQ2_XXS.init_grid()  # type: ignore[no-untyped-call]
    assert IQ2_XXS.grid is not None
    return np.ascontiguousarray(IQ2_XXS.grid.reshape(256, 8).astype(np.float32))


def _iq2_xxs(b: Array) -> Array:
    """d, then 8 groups of 8 bytes: four point ids, and a word of four times 7 signs and, on top, a scale of 4 bits.

    The eighth sign of a point makes the number of minus signs even. A group's step is d·(scale + ½)/4.
    """
    groups = b[:, 2:66].reshape(-1, 8, 8)
    word = np.ascontiguousarray(groups[..., 4:]).view("<u4")
    minus = (word[..., None] >> np.array([0, 7, 14, 21], np.uint32)[:, None] >> np.arange(7, dtype=np.uint32)) & 1
    minus = np.concatenate([minus, minus.sum(axis=-1, keepdims=True) & 1], axis=-1)
    step = _f16(b, 0) * (np.float32(0.5) + (word >> 28).astype(np.float32)) * np.float32(0.25)
    values: Array = step[..., None] * _grid()[groups[..., :4]]
    return np.where(minus == 1, -values, values)


# Bytes of a block and its decoder, by ggml's name.
FORMATS: dict[str, tuple[int, Callable[[Array], Array]]] = {
    "Q8_0": (34, _q8_0),
    "Q2_K": (84, _q2_k),
    "Q3_K": (110, _q3_k),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
    "IQ2_XXS": (66, _iq2_xxs),
}
