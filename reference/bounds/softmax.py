"""Bound of softmax, and what attention shares with it: rescaling of an online sum, the sum of weights.

Nothing is assumed about the order in which keys are visited, so the number of times an online softmax rescales what it
has gathered so far is bounded by rank: after key j the running maximum can rise no more often than there are keys that
score above it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference import ops
from reference.arithmetic import Arithmetic
from reference.bounds.core import (
    DIVIDE,
    EXP,
    HUGE,
    Bounded,
    Count,
    bounded,
    narrower,
    relative,
    storing,
    storing_anywhere,
    summation,
    underflow,
    unit,
)


def softmax(x: Tensor, arith: Arithmetic) -> Bounded:
    """x [..., S] -> softmax(x) [..., S] with its bound; x may hold −inf.

    With t = m − x: eᵢ = exp(−t) errs by EXP·u and, through its argument, by 3u·t (the subtraction, the product with
    log2 e, that constant); exp(0) is exact. The total D errs by the eⱼ's errors, weighted pⱼ, by its additions, and by
    (EXP + 1)·u for each of at most rⱼ rescalings of a total gathered online (their arguments telescope into t).
    p = e/D then gives |Δpᵢ| ≤ (Δeᵢ + pᵢ·ΔD)/(1 − ΔD) plus the division. A narrower intermediate stores t, e and D.
    """
    u = unit(arith.accumulate)
    p = ops.softmax(x)
    visible = ~torch.isneginf(x)
    top = torch.where(visible, x, -torch.inf).amax(-1, keepdim=True)
    t = torch.where(visible, top - x, 0.0)
    exact = torch.zeros_like(x)
    rescalings = rank(x, exact, visible)
    narrow = narrower(arith.intermediate, arith.accumulate)

    def error(count: Count) -> Tensor:
        delta = torch.where(t > 0, 3 * u * t + EXP * u, 0.0)
        if narrow:
            delta = delta + storing(t, arith.intermediate)
        each = p * relative(delta)
        if narrow:
            e = torch.where(t > 0, torch.exp(-t) * (1 + relative(delta)), 0.0)
            each = each + storing(e, arith.intermediate) * p.amax(-1, keepdim=True)
        gathered = (each + (p + each) * relative((EXP + 1) * u * count(rescalings))).sum(-1, keepdim=True)
        total = gathered + total_error(p, p.sum(-1, keepdim=True), gathered, count, u)
        if narrow:
            total = total + storing_anywhere(1 + total, arith.intermediate)
        quotient = over(each + p * total, total)
        return quotient + DIVIDE * u * (p + quotient) + 2 * underflow(arith) * visible

    return bounded(p, error, arith)


def over(x: Tensor, loss: Tensor) -> Tensor:
    """x / (1 − loss), HUGE where the loss is total and x not zero."""
    return torch.where(x == 0, 0.0, torch.where(loss < 1, x / (1 - loss).clamp(min=1e-300), HUGE)).clamp(max=HUGE)


def rank(scores: Tensor, delta: Tensor, visible: Tensor) -> Tensor:
    """How many visible keys may, as computed, score above each key: #{i ≠ j: sᵢ + δᵢ > sⱼ − δⱼ}."""
    high = torch.where(visible, scores + delta, -torch.inf)
    low = torch.where(visible, scores - delta, torch.inf)
    below = torch.searchsorted(high.sort(dim=-1).values, low, right=True)
    above = scores.shape[-1] - below - (visible & (delta > 0)).long()
    return torch.where(visible, above, 0).double()


def additions_of(p: Tensor, u: float) -> tuple[Tensor, Tensor]:
    """Number of additions that count [..., 1], and the keys whose additions do not.

    fl(a + b) errs by at most u|a + b| and by at most |b|. Call keys of weight below u small. In any tree of additions a
    subtree of small keys errs by u times its own weight, joining it to the rest costs at most its weight, and only
    joins between parts that both hold a larger key cost u times the whole: one less of them than there are larger keys.
    """
    small = p < u
    return (~small).sum(-1, keepdim=True).double().sub(1).clamp(min=0), small


def total_error(p: Tensor, whole: Tensor, gathered: Tensor, count: Count, u: float) -> Tensor:
    """Error of adding up weights p, in units of their exact total, which no partial sum of theirs exceeds."""
    additions, small = additions_of(p, u)
    n = (p > 0).sum(-1, keepdim=True).double()
    tail = (p * small).sum(-1, keepdim=True)
    sharp = summation(count(additions), whole + gathered, u) + tail * (1 + n * u) * (1 + gathered)
    return torch.minimum(sharp, summation(count((n - 1).clamp(min=0)), whole + gathered, u))
