"""Repetition, presence and frequency penalties on logits, and the counts of what a row has said so far.

The input is raw logits (DOMAIN), before any log-softmax. The repetition penalty divides a positive logit and multiplies
the others: log-probabilities are never positive, so on those it would only ever multiply, and a likely token would be
hardly penalised at all. Records of how a token was chosen have DOMAIN (engine.batching.Batcher.provenance).

The formula is that of Keskar et al., "CTRL" (2019, section 4.1) with the sign taken into account, then OpenAI's
presence and frequency penalties. B rows, V vocabulary, T tokens of history.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

# What `penalties` must be given, for records of how a token was chosen.
DOMAIN = "raw logits"


def penalties(
    logits: mx.array,
    history: mx.array,
    *,
    repetition: ArrayLike = 1.0,
    presence: ArrayLike = 0.0,
    frequency: ArrayLike = 0.0,
) -> mx.array:
    """Raw logits [B, V] or [V] and history [B, T] or [T] of ids → logits of the same shape and dtype, penalised.

    For an id that occurs n > 0 times: v = v/repetition if v > 0 else v·repetition, then v − presence − frequency·n, in
    float32, rounded once to the input's dtype. Every other logit keeps its bits. Ids outside 0 to V − 1 are padding and
    count for nothing. Each penalty is a number or one number a row; raises ValueError for shapes that don't fit, a
    repetition that isn't positive, or a penalty that isn't finite.
    """
    _check_logits(logits)
    if history.ndim != logits.ndim or history.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"history has shape {history.shape} with logits of shape {logits.shape}; the same rows are expected"
        )
    if history.shape[-1] == 0:
        return logits
    V = logits.shape[-1]
    counts = count(history if history.ndim == 2 else history[None], V)
    return penalise(logits, counts.reshape(logits.shape), repetition=repetition, presence=presence, frequency=frequency)


def penalise(
    logits: mx.array,
    counts: mx.array,
    *,
    repetition: ArrayLike = 1.0,
    presence: ArrayLike = 0.0,
    frequency: ArrayLike = 0.0,
) -> mx.array:
    """`penalties` from counts [B, V] or [V] int32 instead of a history, as `count` and `Counts` keep them."""
    _check_logits(logits)
    if counts.shape != logits.shape:
        raise ValueError(f"counts have shape {counts.shape}; that of the logits, {logits.shape}, is expected")
    rp = _column(repetition, logits, "repetition")
    if not (rp > 0).all():
        raise ValueError(f"repetition is {repetition!r}; numbers above 0 are expected (1: no penalty)")
    pp, fp = _column(presence, logits, "presence"), _column(frequency, logits, "frequency")
    if (rp == 1).all() and not pp.any() and not fp.any():
        return logits
    v = logits.astype(mx.float32)
    v = mx.where(v > 0, v / mx.array(rp), v * mx.array(rp))
    v = v - mx.array(pp) - mx.array(fp) * counts.astype(mx.float32)
    return mx.where(counts > 0, v.astype(logits.dtype), logits)


def count(history: mx.array, V: int) -> mx.array:
    """[B, T] ids → [B, V] int32: how often each id occurs in its row; ids outside 0 to V − 1 are left out."""
    if not mx.issubdtype(history.dtype, mx.integer):
        raise ValueError(f"history is {history.dtype}; integer ids are expected")
    B, T = history.shape
    counts = mx.zeros((B, V + 1), mx.int32)
    if T:
        counts = counts.at[mx.arange(B)[:, None], _inside(history, V)].add(1)
    return counts[:, :V]


class Counts:
    """[B, V] int32 counts on the device, kept token by token; equal to `count` of the whole history, bit for bit.

    Each change is scheduled at once, so that no graph grows from step to step.
    """

    def __init__(self, history: mx.array, V: int) -> None:
        self._set(count(history, V))

    def add(self, tokens: mx.array) -> None:
        """Count one more id a row, [B]; an id outside the vocabulary counts for nothing."""
        B, V = self.array.shape
        if tokens.shape != (B,):
            raise ValueError(f"tokens have shape {tokens.shape}; one id a row, ({B},), is expected")
        spare = mx.zeros((B, 1), mx.int32)
        wide = mx.concatenate([self.array, spare], axis=1).at[mx.arange(B), _inside(tokens, V)].add(1)
        self._set(wide[:, :V])

    def filter(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self._set(self.array[mx.array(list(rows), dtype=mx.int32)])

    def extend(self, other: Counts) -> None:
        """Append the rows of `other`, which counts the same vocabulary."""
        if other.array.shape[1] != self.array.shape[1]:
            raise ValueError(f"the other counts {other.array.shape[1]} ids; {self.array.shape[1]} are expected")
        self._set(mx.concatenate([self.array, other.array]))

    def _set(self, array: mx.array) -> None:
        # A slice would keep the column of the strangers alive with it.
        self.array = mx.contiguous(array)
        mx.async_eval(self.array)  # type: ignore[no-untyped-call]  # MLX gives it no types.


def _inside(ids: mx.array, V: int) -> mx.array:
    """`ids` with every stranger as V, the column that is thrown away."""
    wide = ids.astype(mx.int64)  # a narrow type would wrap V itself
    return mx.where((wide >= 0) & (wide < V), wide, V).astype(mx.int32)


def _check_logits(logits: mx.array) -> None:
    if logits.ndim not in (1, 2) or not mx.issubdtype(logits.dtype, mx.floating):
        raise ValueError(f"logits are {logits.dtype} of shape {logits.shape}; floating [B, V] or [V] are expected")


def _column(value: ArrayLike, logits: mx.array, name: str) -> NDArray[np.float32]:
    """One number a row as a column that broadcasts over the vocabulary, or a single one for all."""
    array = np.asarray(value, dtype=np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} is {value!r}; finite numbers are expected")
    if array.ndim == 0:
        return array
    if logits.ndim != 2 or array.shape != logits.shape[:1]:
        raise ValueError(f"{name} has shape {array.shape}; a number, or one for each of {logits.shape[:-1]} rows")
    return array[:, None]
