"""Bound of sampling penalties."""

from __future__ import annotations

import torch
from torch import Tensor

from reference import ops
from reference.arithmetic import Arithmetic
from reference.bounds.core import DIVIDE, Bounded, Count, bounded, narrower, storing, underflow, unit


def penalties(
    logits: Tensor, counts: Tensor, repetition: float, presence: float, frequency: float, arith: Arithmetic
) -> Bounded:
    """logits [..., V], counts [..., V] of each id in the history -> ops.penalties [..., V] with its bound.

    What is not in the history is not touched, so its bound is zero. Otherwise: the constant, rounded, and the product
    or quotient with it, (1 + DIVIDE)·u of the result; the subtraction of the presence penalty and of count times the
    frequency penalty, each constant and each result rounded once. A narrower intermediate stores the three results.
    """
    u, eta = unit(arith.accumulate), underflow(arith)
    expected = ops.penalties(logits, counts, repetition, presence, frequency)
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition).abs()
    taken = frequency * counts

    def error(count: Count) -> Tensor:
        first = (0.0 if repetition == 1 else 1 + DIVIDE) * u * scaled + eta
        steps = 2 * u * (abs(presence) + abs(frequency) * counts) + 2 * u * (scaled + abs(presence) + taken.abs())
        if narrower(arith.intermediate, arith.accumulate):
            largest = scaled + abs(presence) + taken.abs()
            steps = steps + 4 * storing(largest, arith.intermediate)
        return torch.where(counts > 0, first + steps, 0.0)

    result = bounded(expected, error, arith)
    untouched = counts == 0
    return Bounded(
        expected=result.expected,
        bound=torch.where(untouched, 0.0, result.bound),
        likely=torch.where(untouched, 0.0, result.likely),
    )
