"""Probes: how a run's intermediates leave the engine.

The model hands each intermediate to a Tap under its name, inside the very expression that goes on to use it. With no
tap nothing is recorded, kept alive or evaluated: the graph is the same one. A Step collects lazily and gives
everything away after the single evaluation of its step, so that looking doesn't change when or in what order MLX
computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Tap = Callable[[str, Array], None]
Probe = Callable[[str, mx.array], None]


def to_numpy(x: mx.array) -> Array:
    """`x` as a NumPy array of the same shape and bits; bfloat16 arrives as `ml_dtypes.bfloat16`."""
    if x.dtype == mx.bfloat16:
        return np.array(x.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(x)


def scoped(probe: Probe | None, prefix: str) -> Probe | None:
    """`probe` with `prefix.` before every name; None stays None."""
    if probe is None:
        return None
    return lambda name, x: probe(f"{prefix}.{name}", x)


class Step:
    """The probes of one step: `note` keeps (1, T, …) arrays lazily, `flush` gives them to the tap as NumPy (T, …)."""

    def __init__(self) -> None:
        self._kept: list[tuple[str, mx.array]] = []

    def note(self, name: str, x: mx.array) -> None:
        """Keep `x`, whose first axis is a batch of one, for the evaluation of this step."""
        self._kept.append((name, x.squeeze(0)))

    @property
    def arrays(self) -> list[mx.array]:
        """What the step's evaluation must cover."""
        return [x for _, x in self._kept]

    def flush(self, tap: Tap) -> None:
        """Hand every kept array over, in the order of computation."""
        for name, x in self._kept:
            tap(name, to_numpy(x))
