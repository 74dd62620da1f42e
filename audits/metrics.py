"""How far one tensor is from another: figures for the whole tensor and for its worst token.

Nothing here passes or fails. A figure never hides a NaN: non-finite elements are counted apart, are outside every
bound, and make the sums NaN on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
PERCENTILES = (50, 99, 100)
# Mantissa bits stored and smallest normal exponent, by dtype (IEEE 754; bfloat16 as truncated binary32).
_ULP_FORMATS = {"float64": (52, -1022), "float32": (23, -126), "float16": (10, -14), "bfloat16": (7, -126)}


@dataclass(frozen=True, kw_only=True)
class Element:
    """One element: its index, both values, the error and what was allowed."""

    index: tuple[int, ...]
    actual: float
    expected: float
    error: float
    bound: float


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Figures of `actual` against `expected`; `worst_token` is the row with the largest share of its bound (or
    error).
    """

    count: int
    max_abs: float
    rms: float
    rel_l2: float
    nmse: float
    ulp: dict[int, float]  # percentile -> units in the last place of the actual tensor's dtype
    nonfinite: int
    outside: int  # elements outside their bound
    share_outside: float
    ratio: float  # largest error / bound, 0/0 counted as 0
    worst: Element
    worst_token: int
    worst_token_outside: int
    worst_token_rel_l2: float


def ulp_distance(actual: Array, expected: Array, dtype: str) -> Array:
    """|actual − expected| in units in the last place that `dtype` has at `expected` (float64 in, float64 out)."""
    bits, low = _ULP_FORMATS.get(dtype, _ULP_FORMATS["float64"])
    exponent = np.where(expected == 0, low, np.maximum(np.frexp(np.abs(expected))[1] - 1, low))
    distance: Array = np.abs(actual - expected) / np.ldexp(1.0, exponent - bits)
    return distance


def measure(actual: Array, expected: Array, bound: Array | None = None) -> Metrics:
    """Metrics of two arrays of one shape [T, …]; `bound` (same shape) is what each element was allowed.

    Without a bound every differing element is outside. Infinities of the same sign are equal only where `bound` is
    infinite too (an overflow that honest arithmetic may have); NaN is never equal to anything.
    """
    dtype = str(actual.dtype)
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    b = np.zeros(a.shape) if bound is None else bound.astype(np.float64)
    with np.errstate(all="ignore"):
        error = np.abs(a - e)
        # An overflow to the right infinity is inside an infinite bound; any other non-finite element is outside all.
        overflow = np.isinf(a) & np.isinf(b) & (np.sign(a) == np.sign(e))
        error = np.where(overflow, 0.0, np.where(np.isfinite(a), error, np.nan))
        outside = ~(error <= b)
        ratio = np.where(error == 0, 0.0, np.where(b > 0, error / b, np.inf))
        ratio = np.where(np.isnan(ratio), np.inf, ratio)
        total = np.sum(error * error)
        nmse = float(total / max(np.sum(e * e), 1e-300))
        rows = error.reshape(len(a), -1)
        row_power = np.sqrt(np.sum(e.reshape(len(a), -1) ** 2, axis=1))
        row_rel = np.sqrt(np.sum(rows * rows, axis=1)) / np.maximum(row_power, 1e-300)
        ulps = ulp_distance(a, e, dtype)
    rank = ratio if bound is not None else np.where(np.isnan(error), np.inf, error)
    place = np.unravel_index(int(np.argmax(rank)), a.shape)
    token = int(place[0]) if a.ndim else 0
    row_outside = outside.reshape(len(a), -1).sum(axis=1)
    return Metrics(
        count=a.size,
        max_abs=float(np.max(error)),
        rms=float(np.sqrt(total / a.size)),
        rel_l2=float(np.sqrt(nmse)),
        nmse=nmse,
        ulp={p: float(np.percentile(ulps, p, method="higher")) for p in PERCENTILES},
        nonfinite=int(np.sum(~np.isfinite(a))),
        outside=int(outside.sum()),
        share_outside=float(outside.mean()),
        ratio=float(np.max(ratio)),
        worst=Element(
            index=tuple(int(i) for i in place),
            actual=float(a[place]),
            expected=float(e[place]),
            error=float(error[place]),
            bound=float(b[place]),
        ),
        worst_token=token,
        worst_token_outside=int(row_outside[token]),
        worst_token_rel_l2=float(row_rel[token]),
    )
