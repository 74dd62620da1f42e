"""Bounds of softmax and attention: errors of scores are weighed by |vⱼ − o|, errors of sums by |vⱼ|.

A softmax forgives any error its keys share, and an error of a key without weight. Keeping both facts in the bound
is what lets one rounding too many be seen: with peaked scores the honest error nearly vanishes and the fault's does
not.

Nothing is assumed about the order in which keys are visited, so the number of times an online softmax rescales what it
has gathered so far is bounded by rank: after key j the running maximum can rise no more often than there are keys that
score above it.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    largest_partial,
    narrower,
    overflow,
    probabilistic,
    relative,
    rounding,
    stored,
    storing,
    storing_anywhere,
    summation,
    underflow,
    unit,
    worst_case,
)

# Elements of the largest temporary, [Hq, rows, S, Dv] in float64: 64 MiB.
CHUNK = 1 << 23


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
    rescalings = _rank(x, exact, visible)
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
        total = gathered + _total(p, p.sum(-1, keepdim=True), gathered, count, u)
        if narrow:
            total = total + storing_anywhere(1 + total, arith.intermediate)
        quotient = _over(each + p * total, total)
        return quotient + DIVIDE * u * (p + quotient) + 2 * underflow(arith) * visible

    return bounded(p, error, arith)


def _over(x: Tensor, loss: Tensor) -> Tensor:
    """x / (1 − loss), HUGE where the loss is total and x not zero."""
    return torch.where(x == 0, 0.0, torch.where(loss < 1, x / (1 - loss).clamp(min=1e-300), HUGE)).clamp(max=HUGE)


def _rank(scores: Tensor, delta: Tensor, visible: Tensor) -> Tensor:
    """How many visible keys may, as computed, score above each key: #{i ≠ j: sᵢ + δᵢ > sⱼ − δⱼ}."""
    high = torch.where(visible, scores + delta, -torch.inf)
    low = torch.where(visible, scores - delta, torch.inf)
    below = torch.searchsorted(high.sort(dim=-1).values, low, right=True)
    above = scores.shape[-1] - below - (visible & (delta > 0)).long()
    return torch.where(visible, above, 0).double()


def _additions(p: Tensor, u: float) -> tuple[Tensor, Tensor]:
    """Number of additions that count [..., 1], and the keys whose additions do not.

    fl(a + b) errs by at most u|a + b| and by at most |b|. Call keys of weight below u small. In any tree of additions a
    subtree of small keys errs by u times its own weight, joining it to the rest costs at most its weight, and only
    joins between parts that both hold a larger key cost u times the whole: one less of them than there are larger keys.
    """
    small = p < u
    return (~small).sum(-1, keepdim=True).double().sub(1).clamp(min=0), small


def _total(p: Tensor, whole: Tensor, gathered: Tensor, count: Count, u: float) -> Tensor:
    """Error of adding up weights p, in units of their exact total, which no partial sum of theirs exceeds."""
    additions, small = _additions(p, u)
    n = (p > 0).sum(-1, keepdim=True).double()
    tail = (p * small).sum(-1, keepdim=True)
    sharp = summation(count(additions), whole + gathered, u) + tail * (1 + n * u) * (1 + gathered)
    return torch.minimum(sharp, summation(count((n - 1).clamp(min=0)), whole + gathered, u))


@dataclass(frozen=True, kw_only=True)
class _Keys:
    """Attention's exact intermediates, the sink, if any, as a last key with value zero."""

    scores: Tensor  # [Hq, L, S]
    visible: Tensor  # bool [Hq, L, S]
    p: Tensor  # [Hq, L, S]
    values: Tensor  # [Hq, S, Dv]
    output: Tensor  # [Hq, L, Dv]


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """What softmax may make of the exact probabilities, all [Hq, L, S]."""

    moved: Tensor  # weight of |vⱼ − o|: how far errors of score and exponential, shared by both sums, move pⱼ
    p: Tensor  # the most that pⱼ can become
    rescaled: Tensor  # roundings by rescaling of what pⱼ has gone into
    recomputed: Tensor  # what a denominator gathered online, in a sweep of its own, does not share with the numerator
    rounded: Tensor  # rounding of pⱼ itself, in the numerator only


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, sinks: Tensor | None, arith: Arithmetic
) -> Bounded:
    """q [Hq, L, Dh], k [Hkv, S, Dh], v [Hkv, S, Dv] -> attention [Hq, L, Dv] with its bound (ops.attention's
    arguments).

    Let score j be off by δⱼ. Because Σpⱼ(vⱼ − o) = 0,
        o(s + δ) − o(s) = Σ pⱼ(e^δⱼ − 1)(vⱼ − o) / Σ pⱼe^δⱼ,
    exactly; its magnitude is at most Σ pⱼ(e^|δⱼ| − 1)|vⱼ − o| / Σ pⱼe^−|δⱼ|, and at most max|vⱼ − o|, for o(s + δ)
    is a mean of the values. δ takes in all that the two sums share: the score's own error, the exponential's,
    rescaling's (`_scores`, `_weights`). Σpⱼvⱼ and Σpⱼ are then each added up with roundings of their own (`_sums`),
    which is where |vⱼ| enters.
    """
    keys = _keys(q, k, v, scale, mask, sinks)
    weights = [_weights(keys, _scores(keys, q, k, scale, sinks, count, arith), count, arith, scale) for count in COUNTS]
    moved = _moved(keys, torch.stack([w.moved for w in weights]))
    errors = [_sums(keys, *each, arith) for each in zip(weights, moved, COUNTS, strict=True)]
    bound, likely = (stored(error, keys.output, arith) for error in errors)
    return Bounded(expected=keys.output, bound=bound, likely=torch.minimum(likely, bound))


COUNTS: tuple[Count, Count] = (worst_case, probabilistic)


def _keys(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, sinks: Tensor | None) -> _Keys:
    scores = ops.attention_scores(q, k, scale, mask)
    values = ops.repeat_heads(v, q.shape[0])
    visible = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:2], 1)], dim=-1)
        values = torch.cat([values, values.new_zeros(values.shape[0], 1, values.shape[2])], dim=1)
        visible = torch.cat([visible, torch.ones_like(visible[..., :1])], dim=-1)
    p = ops.softmax(scores)
    return _Keys(scores=scores, visible=visible, p=p, values=values, output=p @ values)


def _scores(
    keys: _Keys, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None, count: Count, arith: Arithmetic
) -> Tensor:
    """Error of each score [Hq, L, S], with A = Σ|q·scale||k|, whatever of q and q·k is scaled, by scale or
    scale·log2 e.

    The inner product: Dh − 1 additions of subset sums; up to 2u·A for rounding q·scale and then the products (or one
    rounding of the scaled product, and products that are exact or not); u·|s| for a separate product with log2 e.
    An operand dtype rounds q·scale, which no longer is an input, and k. A narrower intermediate stores q·scale (or the
    unscaled scores, at no more than that) and the scores.
    """
    u = unit(arith.accumulate)
    keys_k = ops.repeat_heads(k, q.shape[0])
    scaled, k_abs = (q * scale).abs(), keys_k.abs().transpose(-1, -2)
    absolute = scaled @ k_abs
    exact = ((q * scale) @ keys_k.transpose(-1, -2)).abs()
    operands = torch.zeros_like(absolute)
    if arith.operand is not None:
        k_wide = k_abs + (rounding(k_abs, arith.operand) if narrower(arith.operand, arith.dtype) else 0)
        operands = ((scaled + storing_anywhere(scaled, arith.operand)) @ k_wide - absolute).clamp(min=0)
    if narrower(arith.intermediate, arith.accumulate):
        operands = operands + storing_anywhere(scaled * (1 + u), arith.intermediate) @ k_abs
    leaves = 2 * u * (1 + u) * (absolute + operands)
    partial = largest_partial(absolute + operands, exact + operands) + leaves
    terms = torch.tensor(max(q.shape[-1] - 1, 0), dtype=torch.float64)
    flush = underflow(arith) * (2 * q.shape[-1] + scaled.sum(-1, keepdim=True) + k_abs.sum(-2, keepdim=True))
    delta = operands + leaves + summation(count(terms), partial, u) + u * exact + flush
    delta = delta + overflow(partial, arith.accumulate)
    if narrower(arith.intermediate, arith.accumulate):
        delta = delta + storing(exact + delta, arith.intermediate)
    delta = torch.where(absolute == 0, 0.0, delta)
    if sinks is not None:
        sink = u * sinks.abs()
        if narrower(arith.intermediate, arith.accumulate):
            sink = sink + rounding(sinks, arith.intermediate)
        delta = torch.cat([delta, sink[:, None, None].expand_as(delta[..., :1])], dim=-1)
    return torch.where(keys.visible, delta, 0.0)


def _weights(keys: _Keys, delta: Tensor, count: Count, arith: Arithmetic, scale: float) -> _Weights:
    """What errors δ of the scores, the exponentials and the stores of their results make of the probabilities.

    With t = m − s, both as computed: the argument of the exponential, and of all rescalings together, since they
    telescope, is off by 4u·t (the subtraction; scale, log2 e and their product, errors all scores share, so that t and
    not s measures them). The exponential and each of up to rⱼ rescaling factors are off by EXP·u. A narrower
    intermediate stores scale, t, e and then e or p (`rounded`); an operand dtype rounds e or p. A softmax in two
    sweeps gathers its denominator online and computes each exponential anew for the numerator: then these errors
    are not shared, except those of a key that surely is the maximum, whose exponential is 1 (`recomputed`).
    """
    u = unit(arith.accumulate)
    narrow = narrower(arith.intermediate, arith.accumulate)
    scores = torch.where(keys.visible, keys.scores, 0.0)
    top = torch.where(keys.visible, scores + delta, -torch.inf).amax(-1, keepdim=True)
    t = torch.where(keys.visible, top - (scores - delta), 0.0)
    rank = count(_rank(keys.scores, delta, keys.visible))
    shift = 4 * u * t
    if narrow:
        factor = torch.tensor([abs(scale)], dtype=torch.float64)
        constant = (rounding(factor, arith.intermediate) / factor).nan_to_num(0.0)
        shift = shift + constant * t
        shift = shift + storing(t + shift, arith.intermediate)
    logarithm = (delta + shift + EXP * u * (1 + rank)).clamp(max=600.0)
    moved = keys.p * relative(logarithm)
    least = (keys.p * torch.exp(-logarithm)).sum(-1, keepdim=True)
    peak = keys.p.amax(-1, keepdim=True)
    if narrow:
        e = torch.exp(-(t - 2 * delta - shift).clamp(min=0))
        moved = moved + storing(e, arith.intermediate) * peak * keys.visible
        least = (least - (storing(e, arith.intermediate) * peak * keys.visible).sum(-1, keepdim=True)).clamp(min=1e-200)
    least = torch.where(least > 0, least, 1.0)
    moved = torch.where(keys.p + moved > 0, moved / least, 0.0)
    p = (keys.p / least + moved).clamp(max=1.0)
    rounded = torch.zeros_like(p)
    for dtype in [arith.operand, arith.intermediate if narrow else None]:
        if dtype is not None:
            rounded = rounded + storing_anywhere(p, dtype)
    again = torch.where(rank > 0, u * (EXP * (1 + rank) + 4 * t), 0.0)
    return _Weights(
        moved=moved.clamp(max=HUGE), p=p, rescaled=u * rank * p, recomputed=p * relative(again), rounded=rounded
    )


def _moved(keys: _Keys, weights: Tensor) -> Tensor:
    """weights [2, Hq, L, S] -> Σⱼ weightⱼ|vⱼ − o| [2, Hq, L, Dv], at most the distance of the farthest value."""
    heads, queries, size = keys.output.shape
    rows = max(1, CHUNK // max(1, heads * keys.values.shape[1] * size))
    parts = []
    for start in range(0, queries, rows):
        piece = slice(start, start + rows)
        distance = (keys.values[:, None] - keys.output[:, piece, None]).abs_()
        weight = weights[:, :, piece].permute(1, 2, 0, 3)
        moved = weight @ distance
        if bool((weight.sum(-1) > 1).any()):  # otherwise a weighted sum cannot exceed the largest distance
            farthest = (distance * keys.visible[:, piece, :, None]).amax(dim=2)
            moved = torch.minimum(moved, farthest[:, :, None])
        parts.append(moved.permute(2, 0, 1, 3))
    return torch.cat(parts, dim=2)


def _sums(keys: _Keys, weights: _Weights, moved: Tensor, count: Count, arith: Arithmetic) -> Tensor:
    """Error of Σpⱼvⱼ / Σpⱼ [Hq, L, Dv] given how far `moved` both sums have moved together.

    Numerator: a product each (u·Σp|v|), additions of subset sums, u for each rescaling of what is gathered,
    roundings of p and of v as operands. Denominator, in units of its total: additions, rescalings, and what it does
    not share; each unit costs |o|. Normalising p before the product costs DIVIDE·u·Σp|v|, which is more than after
    it, DIVIDE·u·|o|. A narrower intermediate stores the denominator, and the numerator or the probabilities.
    """
    u, eta = unit(arith.accumulate), underflow(arith)
    size = keys.values.abs()
    reach = keys.output.abs() + moved
    absolute = weights.p @ size
    partial = torch.maximum(largest_partial(absolute, reach), reach)
    additions, small = _additions(weights.p, u)
    n = keys.visible.sum(-1, keepdim=True).double()
    tail = (weights.p * small) @ size * (1 + n * u)
    sums = torch.minimum(
        summation(count(additions), partial, u) + tail, summation(count((n - 1).clamp(min=0)), partial, u)
    )
    numerator = sums + (1 + DIVIDE) * u * absolute + (weights.rescaled + weights.rounded) @ size
    if arith.operand is not None and narrower(arith.operand, arith.dtype):
        numerator = numerator + weights.p @ rounding(keys.values, arith.operand)
    numerator = numerator + eta * (2 * n + 2 * (keys.visible.double() @ size)) + overflow(partial, arith.accumulate)
    whole = weights.p.sum(-1, keepdim=True).clamp(max=1.0)
    denominator = _total(weights.p, whole, torch.zeros_like(whole), count, u)
    denominator = denominator + (weights.rescaled + weights.recomputed).sum(-1, keepdim=True)
    if narrower(arith.intermediate, arith.accumulate):
        numerator = numerator + storing_anywhere(reach + numerator, arith.intermediate)
        denominator = denominator + unit(arith.intermediate) * (whole + denominator)
    second_order = 1 + (1 + DIVIDE) * u
    total = moved + _over((numerator + reach * denominator) * second_order, denominator)
    return torch.where(keys.visible.double() @ size == 0, 0.0, total)  # no key, or none with a value: zeros
