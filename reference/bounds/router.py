"""Bounds of a MoE router: its scores, and its weights for experts that have been chosen.

The choice itself has no bound: two scores further apart than the sum of their bounds must be chosen in order,
closer ones are a tie (audits judge that).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference import ops
from reference.arithmetic import Arithmetic, round_to
from reference.bounds.core import DIVIDE, EXP, SQRT, Bounded, Count, bounded, narrower, summation, underflow, unit
from reference.bounds.pointwise import sigmoid_error, sigmoid_stored
from reference.bounds.softmax import softmax

# softplus(x) = x beyond the threshold, and eˣ below its negative, leave out e^−20 ≈ 2e-9 relative; a candidate that
# goes on with log1p(eˣ) is as right. Half of it through the square root.
BRANCH = math.exp(-ops.SOFTPLUS_THRESHOLD) / 2


def router_scores(logits: Tensor, scoring: str, arith: Arithmetic) -> Bounded:
    """logits [T, E] -> ops.router_scores [T, E] with its bound.

    sigmoid: see `sigmoid_error`. sqrtsoftplus: e = exp(x) is off by (2|x| + EXP)·u, log1p(e) by σ(x) of that over
    softplus(x), and by EXP·u of its own (max(x, 0) + log1p(exp(−|x|)) errs less, and by one u for the sum); the square
    root halves it and adds SQRT·u. A narrower intermediate stores eˣ and softplus; for sigmoid see `sigmoid_stored`. An
    eˣ that is flushed changes the root by what is left of it.
    """
    if scoring == "softmax":
        return softmax(logits, arith)
    u, eta = unit(arith.accumulate), underflow(arith)
    expected = ops.router_scores(logits, scoring)
    if scoring == "topk_softmax":
        return bounded(expected, lambda count: torch.zeros_like(expected), arith)
    if scoring == "sigmoid":
        stored = sigmoid_stored(logits, arith)
        return bounded(expected, lambda count: expected * sigmoid_error(logits, u) + stored + 2 * eta, arith)
    narrow = unit(arith.intermediate) if narrower(arith.intermediate, arith.accumulate) else 0.0

    def error(count: Count) -> Tensor:
        softplus = expected * expected
        share = torch.sigmoid(logits) / softplus.clamp(min=1e-300)
        rho = torch.expm1(((2 * logits.abs() + EXP) * u + narrow).clamp(max=600.0)) * share + (EXP + 1) * u + narrow
        rho = torch.where(logits > ops.SOFTPLUS_THRESHOLD, EXP * u, rho)
        root = rho / 2 * (1 + rho) + BRANCH
        flush = torch.minimum(2 * eta / expected.clamp(min=1e-300), expected)
        return expected * (root + (1 + root) * SQRT * u) + flush

    return bounded(expected, error, arith)


def router_weights(
    logits: Tensor, ids: Tensor, scoring: str, bias: Tensor | None, norm: bool, scale: float, arith: Arithmetic
) -> Bounded:
    """logits [T, E], ids [T, K] -> weights [T, K] of the given experts, with their bound; bias steers only the choice.

    With scores sᵢ off by eᵢ and D = Σs, sᵢ/D moves by ((1 − qᵢ)eᵢ + qᵢ·Σⱼ≠ᵢ eⱼ)/(D − Σe), q = s/D: what the scores
    share cancels. A denominator held up by its floor does not move with them. Then K − 1 additions, the addition or
    rounding of the constant, the division, the factor as a constant and the product with it.
    """
    u, eta = unit(arith.accumulate), underflow(arith)
    scores = router_scores(logits, scoring, _inside(arith))
    chosen = scores.expected.gather(-1, ids)
    expected = ops.router_weights(logits, ids, scoring, norm, scale)
    constant = _factor(scale, arith)
    if scoring == "topk_softmax":
        inner = softmax(chosen, _inside(arith))
        return bounded(
            expected, lambda count: abs(scale) * inner.bound * (1 + constant) + constant * expected.abs(), arith
        )
    errors = scores.bound.gather(-1, ids)

    def error(count: Count) -> Tensor:
        if not norm:
            moved, share = errors, chosen
        else:
            total = ops.router_denominator(chosen, scoring)
            share = chosen / total
            floored = total > chosen.sum(-1, keepdim=True) * (1 + 1e-9)
            own = torch.where(floored, errors, (1 - share).clamp(min=0) * errors)
            others = share * (errors.sum(-1, keepdim=True) - errors)
            moved = (own + others) / (total - errors.sum(-1, keepdim=True)).clamp(min=1e-300)
            terms = torch.full_like(total, float(ids.shape[-1] - 1))
            steps = summation(count(terms), torch.ones_like(total), u) + u
            moved = moved + (share + moved) * (steps / (1 - steps) + DIVIDE * u * (1 + 2 * steps)) + eta
        return abs(scale) * (moved * (1 + constant) + share * constant) + eta

    return bounded(expected, error, arith)


def _factor(scale: float, arith: Arithmetic) -> float:
    """Relative error of a product with the constant `scale`: the product's rounding and the constant's own, if any."""
    if scale in (0.0, 1.0):
        return 0.0
    stored = round_to(torch.tensor([scale], dtype=torch.float64), arith.accumulate).item()
    return unit(arith.accumulate) + abs(stored / scale - 1)


def _inside(arith: Arithmetic) -> Arithmetic:
    """The same arithmetic for a step whose result is not stored as the output but kept in the accumulator."""
    return Arithmetic(
        dtype=arith.dtype,
        operand=arith.operand,
        accumulate=arith.accumulate,
        intermediate=arith.intermediate,
        output=arith.accumulate,
    )
