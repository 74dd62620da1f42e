"""The search for IQ2_XXS blocks: eight values at a time as a point of a fixed grid, with signs of even parity.

A group of 32 values has four grid points (of 256, coordinates 8, 25 and 43), four sets of signs and a 4-bit code c; its
step is d·(2c + 1)/8 with one float16 d a block of 256. Seven signs are stored and the eighth makes the number of minus
signs even, so a vector with an odd number has one value of the wrong sign: the one that costs least at the
chosen point. For a step h, the error of a vector x at point g is Σwx² − 2h·B + h²·N with N = Σwg² and
B = Σw|x|g, less 2·min w|x|g for odd signs; B and N don't depend on h. n blocks, 8 groups, 4 vectors, 8 values.
Grid and signs: the `gguf` package's tables.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from gguf.quants import IQ2_XXS

Array = np.ndarray[Any, np.dtype[Any]]
# Where a group's largest value is put: on the grid's three coordinates, and around where a Gaussian group's best lies.
_PLACES = (43.0, 25.0, 8.0, 36.0, 39.0, 47.0, 52.0, 57.0, 62.0, 68.0)
_TOP_CODE = 15


@functools.cache
def _grid() -> Array:
    """(256, 8) float32 coordinates."""
    IQ2_XXS.init_grid()  # type: ignore[no-untyped-call]
    assert IQ2_XXS.grid is not None
    return np.ascontiguousarray(IQ2_XXS.grid.reshape(256, 8).astype(np.float32))


@functools.cache
def _sign_codes() -> Array:
    """(256,) the 7-bit code of each even set of minus signs, one bit a value."""
    codes = np.zeros(256, np.uint32)
    codes[np.frombuffer(IQ2_XXS.ksigns, np.uint8)] = np.arange(128)
    return codes


def fit_iq2_xxs(x: Array, weight: Array | None) -> tuple[Array, Array]:
    """(n, 256) → (n, 66) blocks: float16 d, then for each group four point ids and a word of signs and scale."""
    w = np.ones_like(x) if weight is None else weight
    vectors, weights = x.reshape(-1, 8), w.reshape(-1, 8)
    gain, norm = _products(vectors, weights)
    step = _group_steps(np.abs(x).reshape(-1, 32).max(axis=-1), gain, norm).reshape(-1, 8)
    d, code = _scales(step, gain, norm)
    point = _nearest((d[:, None] * (2 * code + 1) / 8).ravel(), gain, norm)
    d, code = _refit(d, code, point, gain, norm)
    minus = _signs(vectors, weights, point)
    return _pack(d, code, point, minus), _decode(d, code, point, minus)


def _products(x: Array, w: Array) -> tuple[Array, Array]:
    """(v, 8) values and weights → B and N at every point, (v, 256) each."""
    grid = _grid()
    magnitude = w * np.abs(x)
    gain = magnitude @ grid.T
    odd = np.flatnonzero((x < 0).sum(axis=-1) % 2)
    least = np.full((len(odd), 256), np.inf, np.float32)
    for j in range(8):
        np.minimum(least, np.multiply.outer(magnitude[odd, j], grid[:, j]), out=least)
    gain[odd] -= 2 * least
    return gain, w @ np.square(grid).T


def _nearest(step: Array, gain: Array, norm: Array) -> Array:
    """(v/4,) steps → (v,) the point of the smallest error, which has the largest 2B − h·N."""
    point: Array = (2 * gain - np.repeat(step, 4)[:, None] * norm).argmax(axis=-1)
    return point


def _sums(point: Array, gain: Array, norm: Array) -> tuple[Array, Array]:
    """ΣB and ΣN over the four vectors of a group at the chosen points, (v/4,) float64 each."""
    chosen = point[:, None]
    b, n = (np.take_along_axis(a, chosen, axis=-1).reshape(-1, 4).sum(axis=-1, dtype=np.float64) for a in (gain, norm))
    return b, n


def _ratio(a: Array, b: Array) -> Array:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _group_steps(largest: Array, gain: Array, norm: Array) -> Array:
    """(g,) float64: each group's best real step. With the step at B/N a group's error falls by B²/N."""
    best, steps = np.full(len(largest), -1.0), np.zeros(len(largest))
    for place in _PLACES:
        b, n = _sums(_nearest(largest / np.float32(place), gain, norm), gain, norm)
        step = _ratio(b, n)
        wins = b * step > best
        best, steps = np.where(wins, b * step, best), np.where(wins, step, steps)
    return steps


def _to_half(value: Array) -> Array:
    """float64 → float32 of the nearest float16, positive if the value is."""
    rounded = np.minimum(value, 65504).astype(np.float16)
    return np.where((value > 0) & (rounded == 0), np.float16(6e-8), rounded).astype(np.float32)


def _scales(steps: Array, gain: Array, norm: Array) -> tuple[Array, Array]:
    """(n, 8) real steps → d (n,) and codes (n, 8): the largest step at each of the four top codes, then neighbours."""
    # The error less Σwx², so 0 is what d = 0 has: the format's only zero, and better for rows of mostly zeros.
    best = np.zeros(len(steps))
    best_d, best_code = np.zeros(len(steps), np.float32), np.zeros(steps.shape, np.float32)
    for top in range(_TOP_CODE, _TOP_CODE - 4, -1):
        d = _to_half(8 * steps.max(axis=-1) / (2 * top + 1))
        near = np.rint(_ratio(8 * steps, np.broadcast_to(d[:, None].astype(np.float64), steps.shape)) / 2 - 0.5)
        error, code = np.full(steps.shape, np.inf), np.zeros(steps.shape, np.float32)
        for k in (0, -1, 1):
            trial = np.clip(near + k, 0, _TOP_CODE).astype(np.float32)
            h = (d[:, None] * (2 * trial + 1) / 8).ravel()
            b, n = _sums(_nearest(h, gain, norm), gain, norm)
            found = (h * (h * n - 2 * b)).reshape(steps.shape)
            error, code = np.minimum(error, found), np.where(found < error, trial, code)
        wins = error.sum(axis=-1) < best
        best = np.where(wins, error.sum(axis=-1), best)
        best_d, best_code = np.where(wins, d, best_d), np.where(wins[:, None], code, best_code)
    return best_d, best_code


def _refit(d: Array, code: Array, point: Array, gain: Array, norm: Array) -> tuple[Array, Array]:
    """The least-squares d for the chosen codes and points, where its float16 lowers the error."""
    b, n = (a.reshape(code.shape) for a in _sums(point, gain, norm))
    factor = (2 * code + 1).astype(np.float64) / 8
    b, n = (factor * b).sum(axis=-1), (factor**2 * n).sum(axis=-1)
    new = _to_half(_ratio(b, n))
    return np.where(new * (new * n - 2 * b) < d * (d * n - 2 * b), new, d), code


def _signs(x: Array, w: Array, point: Array) -> Array:
    """(v, 8) bool minus signs, an even number in each vector: the cheapest one is turned where they are odd."""
    minus = x < 0
    odd = np.flatnonzero(minus.sum(axis=-1) % 2)
    turned = (w[odd] * np.abs(x[odd]) * _grid()[point[odd]]).argmin(axis=-1)
    minus[odd, turned] ^= True
    return minus


def _pack(d: Array, code: Array, point: Array, minus: Array) -> Array:
    signs = _sign_codes()[np.packbits(minus, axis=-1, bitorder="little")[:, 0]].reshape(-1, 4)
    word = (signs << np.array([0, 7, 14, 21], np.uint32)).sum(axis=-1, dtype=np.uint32)
    word |= code.astype(np.uint32).ravel() << np.uint32(28)
    ids = point.astype(np.uint8).reshape(-1, 4)
    groups = np.concatenate([ids, word.astype("<u4")[:, None].view(np.uint8)], axis=-1)
    return np.concatenate([d.astype("<f2")[:, None].view(np.uint8), groups.reshape(len(d), 64)], axis=-1)


def _decode(d: Array, code: Array, point: Array, minus: Array) -> Array:
    step = np.repeat((d[:, None] * (np.float32(0.5) + code) * np.float32(0.25)).ravel(), 4)
    values: Array = step[:, None] * _grid()[point] * np.where(minus, np.float32(-1), np.float32(1))
    return values.reshape(len(d), 256)
