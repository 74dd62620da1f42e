"""Keys and values that say who they are, so that a lost, repeated, stale or foreign token can be named.

A token's serial number, its head, and whether it is a key or a value make a code of 32 bits with a checksum. The bits
lie in 32 consecutive numbers of the vector as low and high values, repeated in every 32, hence every quantisation group
holds both ends of its range and the code survives 2 bits. The numbers carry random jitter, so that bits and
quantisation codes can be compared too, and the range differs between neighbouring tokens, heads and groups, so that a
scale taken from a neighbour shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from audits.frameworks import DTYPES
from audits.kept import once

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 32  # numbers that hold one code
SERIALS = 1 << 16
_HEAD, _KIND, _CHECK, _ONE = 16, 19, 20, 31  # where a code's fields begin; bit 30 is 0 and bit 31 is 1
GARBAGE, BLANK = -1, -2  # what `decode` says of a vector that holds no code, and of one whose numbers are all equal
KEY, VALUE = 0, 1
# A bit's value is within this share of its end of the range. 2-bit codes have steps of a third of the range, so that
# what was stored below 0.2 comes back below 0.37 even from MLX's shifted grid, and what was above 0.8 above 0.63.
JITTER = 0.2
LOW = -0.4  # the range's lower end, in units of its width: zero lies inside, as in real keys


@dataclass(frozen=True)
class Label:
    """Where a token was fed: its row's name and position; no position is padding."""

    row: str
    position: int | None


class Tokens:
    """Every token of one program: labels by serial, and the vectors that were fed.

    keys [H, D], values [H, Dv] a token in `dtype`; `group` is the number of dims that share a quantisation scale.
    """

    def __init__(self, *, seed: int, heads: int, dims: tuple[int, int], group: int, dtype: str) -> None:
        self.seed, self.heads, self.dims, self.group = seed, heads, dims, group
        self.dtype = np.dtype(DTYPES[dtype])
        self.labels: list[Label] = []
        self._tables = [np.zeros((64, heads, d), self.dtype) for d in dims]

    def make(self, labels: Sequence[Sequence[Label]]) -> tuple[Array, Array, Array]:
        """Labels of B rows of n tokens -> serials [B, n], keys [B, H, n, D], values [B, H, n, Dv]."""
        first, rows, n = len(self.labels), len(labels), len(labels[0])
        if first + rows * n > SERIALS:
            raise ValueError(f"a program of more than {SERIALS} tokens can't be told apart")
        for row in labels:
            self.labels += row
        serials = first + np.arange(rows * n)
        made = [self._vectors(first, rows * n, kind) for kind in (KEY, VALUE)]
        for kind, vectors in enumerate(made):
            table = self._tables[kind]
            if len(self.labels) > len(table):
                grown = np.zeros((2 * len(self.labels), *table.shape[1:]), table.dtype)
                grown[:first] = table[:first]
                self._tables[kind] = table = grown
            table[serials] = vectors
        keys, values = (x.reshape(rows, n, self.heads, -1).swapaxes(1, 2).copy() for x in made)
        return serials.reshape(rows, n), keys, values

    def fed(self, kind: int, serials: Array) -> Array:
        """The vectors that were fed for serials [...] -> [..., H, D]."""
        found: Array = self._tables[kind][serials]
        return found

    def _vectors(self, first: int, n: int, kind: int) -> Array:
        """[n, H, D] of a kind, of n serials from `first` on; programs that feed as many at a time get the same."""
        told = self.seed, first, n, kind, self.heads, self.dims[kind], self.group, self.dtype
        return once(("vectors", *told), lambda: _vectors(*told))


def _vectors(seed: int, first: int, n: int, kind: int, H: int, D: int, group: int, dtype: np.dtype[Any]) -> Array:
    serials, heads = first + np.arange(n), np.arange(H)
    code = _code(serials[:, None] | heads << _HEAD | kind << _KIND)
    bits = (code[..., None] >> np.arange(BLOCK)) & 1
    rng = np.random.default_rng([seed, kind, first if n else 0])
    jitter = rng.uniform(0, JITTER, (*code.shape, D // BLOCK, BLOCK))
    jitter[..., _ONE - 1 :] = 0.0  # both ends of the range are reached
    x = np.where(bits[..., None, :].astype(bool), 1 - jitter, jitter) + LOW
    groups = np.arange(D // BLOCK) * BLOCK // group
    width = 2.0 ** ((serials[:, None, None] + heads[:, None] + kind + groups) % 3 - 1)
    return (x * width[..., None]).reshape(*code.shape, D).astype(dtype)


def _code(ident: Array) -> Array:
    """20 bits -> 32: with 10 of a multiplicative hash (Knuth's constant), a 0 and a 1."""
    hashed = (ident.astype(np.uint64) * np.uint64(2654435761) & np.uint64(0xFFFFFFFF)) >> np.uint64(22)
    return ident.astype(np.int64) | hashed.astype(np.int64) << _CHECK | 1 << _ONE


def decode(x: Array) -> Array:
    """Vectors [..., D] -> who each is: serial | head << 16 | kind << 19, or GARBAGE or BLANK, [...]."""
    if 0 in x.shape:
        return np.full(x.shape[:-1], BLANK)
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, BLOCK)
    low, high = blocks.min(-1), blocks.max(-1)
    with np.errstate(invalid="ignore", over="ignore"):
        bits = blocks > ((low + high) / 2)[..., None]
    words = np.packbits(bits, axis=-1, bitorder="little").view("<u4")[..., 0].astype(np.int64)
    word = words[..., 0]
    ident = word & (1 << _CHECK) - 1
    sound = (words == word[..., None]).all(-1) & (_code(ident) == word) & np.isfinite(low + high).all(-1)
    blank = (low == high).all(-1)
    return np.where(sound, ident, np.where(blank, BLANK, GARBAGE))


def parts(ident: int) -> tuple[int, int, int]:
    """Serial, head and kind of a decoded vector."""
    return ident & SERIALS - 1, ident >> _HEAD & 7, ident >> _KIND


def serials_of(idents: Array, kind: int) -> Array:
    """Serials of decoded vectors [B, H, S] that are of this kind and of the head in whose place they lie, else −1."""
    heads = np.arange(idents.shape[1])[:, None]
    right = (idents >= 0) & (idents >> _KIND == kind) & ((idents >> _HEAD & 7) == heads)
    return np.where(right, idents & SERIALS - 1, -1)


def quantisation_error(fed: Array, group: int, bits: int) -> Array:
    """How far a dequantised vector [..., D] may be from what was fed, after one quantisation.

    Half a step, where the step is the range of the group / (2^bits − 1); 0.8 of it because MLX moves the grid so that
    zero is on it, by which the end of the range may be cut off (mlx's affine_quantize), and the rounding of scale and
    bias in the dtype: each 2^−8 in bfloat16, of at most the range.
    """
    grouped = fed.astype(np.float64).reshape(*fed.shape[:-1], -1, group)
    width = grouped.max(-1, keepdims=True) - grouped.min(-1, keepdims=True)
    allowed = width * (0.8 / (2**bits - 1) + 2.0**-6)
    return np.broadcast_to(allowed, grouped.shape).reshape(fed.shape)
