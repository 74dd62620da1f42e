"""Adversarial operands, by name: what random normal numbers can't show."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# normal: N(0,1). large: ×30, past any clamp. small: ×1e-3. positive: no cancellation, so that a lost term shows.
# cancelling: pairs that almost cancel. wide: magnitudes over six decades. ties: few distinct values. steps: a different
# power of two for each row.
KINDS = ("normal", "large", "small", "positive", "cancelling", "wide", "ties", "steps")


def draw(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Values [*shape] of a kind in float64, different in every row; ValueError for an unknown kind."""
    x = rng.standard_normal(shape)
    if kind == "normal":
        return x
    if kind == "large":
        return 30 * x
    if kind == "small":
        return 1e-3 * x
    if kind == "positive":
        return np.abs(x) + 0.1
    if kind == "cancelling":
        half = shape[-1] // 2
        x[..., half : 2 * half] = -x[..., :half] * (1 + 2.0**-9)
        return x
    if kind == "wide":
        return x * 10.0 ** rng.integers(-3, 4, shape)
    if kind == "ties":
        return np.round(x)
    if kind == "steps":
        rows = int(np.prod(shape[:-1]))
        return x * 2.0 ** (np.arange(rows).reshape(*shape[:-1], 1) % 9 - 4)
    raise ValueError(f"no kind of values {kind!r}; there is {', '.join(KINDS)}")
