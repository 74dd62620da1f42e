"""Weights in llama.cpp's block formats: random ones, and what they stand for.

Decoded by the `gguf` package alone, so that no kernel or engine of ours has a say. The K elements of a row are whole
blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A block's elements and bytes, and where its half-precision numbers lie (llama.cpp, ggml-common.h).

    d scales the codes; dmin, if there is one, the mins that are taken off them.
    """

    elements: int
    bytes: int
    d: int
    dmin: int | None = None


# By ggml's names.
FORMATS = {
    "Q8_0": Format(elements=32, bytes=34, d=0),
    "Q4_K": Format(elements=256, bytes=144, d=0, dmin=2),
    "Q2_K": Format(elements=256, bytes=84, d=80, dmin=82),
    "IQ2_XXS": Format(elements=256, bytes=66, d=0),
}


def random_blocks(kind: str, shape: tuple[int, ...], K: int, rng: np.random.Generator) -> Array:
    """Random blocks uint8 [*shape, row_bytes]: every code and sub-scale varies, d and dmin are near 1e-2."""
    form = FORMATS[kind]
    blocks = rng.integers(0, 256, (*shape, K // form.elements, form.bytes), dtype=np.uint8)
    for offset in (form.d, form.dmin):
        if offset is not None:
            scales = (rng.uniform(0.5, 1.5, blocks.shape[:-1]) * 1e-2).astype(np.float16)
            blocks[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*shape, -1)


def decode(blocks: Array, kind: str) -> tuple[Array, Array]:
    """The weights [..., K] of blocks [..., row_bytes] in float64, and |d·scale·code| + |dmin·min|.

    Rounding errors of a kernel go by the latter. Both terms are exact in float32, in which the package computes, and
    each is what it gives when the other one's factor is zero; their difference in float64 is then exact too.
    """
    form = FORMATS[kind]
    if form.dmin is None:
        values = _dequantized(blocks, kind)
        return values, np.abs(values)
    scaled, least = (_dequantized(_zeroed(blocks, form, offset), kind) for offset in (form.dmin, form.d))
    return scaled + least, np.abs(scaled) + np.abs(least)


def _zeroed(blocks: Array, form: Format, offset: int) -> Array:
    changed = blocks.copy().reshape(-1, form.bytes)
    changed[:, offset : offset + 2] = 0
    return changed.reshape(blocks.shape)


def _dequantized(blocks: Array, kind: str) -> Array:
    return np.asarray(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]).astype(np.float64))
