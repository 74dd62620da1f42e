"""Masks of attention cases: which keys each query sees, told as a bool, an additive or a "causal" mask.

A mask has the planes it needs and no more: [L, S], [1, 1, L, S], [B, 1, L, S], [1, Hq, L, S], [B, Hq, L, S],
[B, 1, 1, S] or [B, Hq, 1, S], with other contents in every plane, so that one taken for another shows; "same" is
[B, Hq, L, S] with one plane's contents in all. An additive mask has the dtype of the queries.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from audits.domain import Case
from audits.frameworks import DTYPES

Array = np.ndarray[Any, np.dtype[Any]]

FORMS = ("none", "causal", "bool", "additive")
# Of what they show: block: the last half. front: the first third. edges: both ends, but for a hole of three quarters.
PATTERNS = ("random", "causal", "window", "padding", "block", "all", "empty", "front", "edges")
PLANES = ("LS", "B1LS", "1HLS", "BHLS", "B11S", "11LS", "BH1S", "same")
# What an additive mask holds: "-inf": 0 or −inf. "bias": finite numbers alone (the pattern says nothing). "mixed": such
# numbers, or −inf. "lowest": 0 or the least finite number. "large": 0 or −1e4, which hides by its size.
FILLS = ("-inf", "bias", "mixed", "lowest", "large")
LARGE = -1e4


def mask_of(case: Case, rng: np.random.Generator) -> Array | str | None:
    """The mask of a case, as it is passed: None, "causal" or an array."""
    form = case["mask"]
    if form in ("none", "causal"):
        return None if form == "none" else "causal"
    seen = _planes(_pattern(case, rng), case["plane"])
    if form == "bool":
        return seen
    dtype = DTYPES[case["dtype"]]
    fill, biases = case["fill"], np.asarray(2 * rng.standard_normal(seen.shape))
    hidden = {"large": LARGE, "lowest": lowest(np.dtype(dtype))}.get(fill, -np.inf)
    values = biases if fill in ("bias", "mixed") else np.zeros(seen.shape)
    if fill != "bias":
        values = np.where(seen, values, hidden)
    return np.asarray(values).astype(dtype)


def lowest(dtype: np.dtype[Any]) -> float:
    """The least finite number of a floating dtype."""
    return float(ml_dtypes.finfo(dtype).min)  # type: ignore[no-untyped-call]  # knows bfloat16, which NumPy's doesn't


def _pattern(case: Case, rng: np.random.Generator) -> Array:
    """Which keys are seen, bool [B, Hq, L, S].

    Every query sees one, but for the pattern "empty", and for queries before the first key (L > S).
    """
    B, Hq, L, S = case["B"], case["Hkv"] * case["r"], case["L"], case["S"]
    pattern = case["pattern"]
    row, column = np.arange(L)[:, None] + (S - L), np.arange(S)
    b, h = np.arange(B)[:, None, None, None], np.arange(Hq)[:, None, None]
    everything = np.ones((B, Hq, L, S), bool)
    if pattern == "all":
        return everything
    if pattern in ("causal", "window"):
        # Planes differ by the width of their window, the last in every batch row and head having the case's own.
        width = case["W"] + (B - 1 - b) + (Hq - 1 - h)
        seen = everything & (column <= row)
        near = column > row - width if pattern == "window" else column >= (b + h) % max(S - L, 1)
        return np.asarray(seen & near)
    if pattern == "padding":
        first = rng.integers(0, max(S - L, 0) + 1, (B, 1, 1, 1))
        return np.asarray(everything & (column >= first) & (column <= np.maximum(row, first)))
    if pattern == "block":
        return np.asarray(everything & (column >= np.minimum((S + b + h) // 2, S - 1)))
    if pattern == "front":
        return np.asarray(everything & (column <= np.minimum((S + b + h) // 3, S - 1)))
    if pattern == "edges":
        return np.asarray(everything & ((column <= (S + b + h) // 8) | (column >= S - 1 - S // 8)))
    seen = rng.random((B, Hq, L, S)) < 0.6
    # Some query of the first plane, which is the only one of a mask without batch and heads, sees one key alone.
    seen[..., rng.integers(0, L), :] = False
    np.put_along_axis(seen, rng.integers(0, S, (B, Hq, L, 1)), True, axis=-1)
    if pattern == "empty":
        seen[:, :, rng.integers(0, L)] = False
        seen[b[..., 0, 0], 0, -1] = False
    return seen


def _planes(seen: Array, plane: str) -> Array:
    if plane == "LS":
        return np.asarray(seen[0, 0].copy())
    if plane == "B1LS":
        return seen[:, :1].copy()
    if plane == "1HLS":
        return seen[:1].copy()
    if plane == "11LS":
        return seen[:1, :1].copy()
    if plane == "same":
        return np.broadcast_to(seen[:1, :1], seen.shape).copy()
    if plane in ("B11S", "BH1S"):
        return seen[:, : 1 if plane == "B11S" else None, -1:].copy()
    return seen


def read(mask: Array | str | None, shape: tuple[int, int, int, int]) -> tuple[Array | None, Array | None]:
    """What a mask says for `shape` [B, Hq, L, S]: bool (True = visible) and biases float64, None for nothing said."""
    L, S = shape[2:]
    if mask is None:
        return None, None
    if isinstance(mask, str):
        return np.broadcast_to(np.arange(S) <= np.arange(L)[:, None] + (S - L), shape), None
    if mask.dtype == np.bool_:
        return np.broadcast_to(mask, shape), None
    return None, np.broadcast_to(mask.astype(np.float64), shape)


def visible(mask: Array | str | None, shape: tuple[int, int, int, int]) -> Array:
    """Which keys a query can give weight to [B, Hq, L, S]: an additive mask hides by what is −1e4 or less."""
    seen, bias = read(mask, shape)
    if bias is not None:
        return np.asarray(bias > LARGE / 2)
    return np.ones(shape, bool) if seen is None else seen


def additive(mask: Array | str | None) -> bool:
    """Whether a mask holds what is added to scores."""
    return isinstance(mask, np.ndarray) and mask.dtype != np.bool_


def blind(mask: Array | str | None, shape: tuple[int, int, int, int]) -> tuple[Array, Array]:
    """Queries [B, Hq, L] that see no key: by False or −inf, and by finite numbers below half of the least one."""
    seen, bias = read(mask, shape)
    nowhere = np.zeros(shape[:3], bool)
    if bias is not None:
        assert isinstance(mask, np.ndarray)
        hidden = np.asarray(np.isneginf(bias).all(-1))
        return hidden, np.asarray((bias <= lowest(mask.dtype) / 2).all(-1) & ~hidden)
    return (nowhere if seen is None else np.asarray(~seen.any(-1))), nowhere
