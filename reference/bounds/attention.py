"""Bound of attention: errors of scores are weighed by |vⱼ − o|, errors of sums by |vⱼ|.

A softmax forgives any error its keys share, and an error of a key without weight. Keeping both facts in the bound
is what lets one rounding too many be seen: with peaked scores the honest error nearly vanishes and the fault's does
not.

Keys and values may be sums scale·code + bias that a kernel forms or distributes over its products; their magnitude
|scale·code| + |bias| then takes the place of theirs, and terms count twice (reference/bounds/products.py, `linear`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
from reference.bounds.scores import (
    Given,
    Keys,
    keys_of,
    lasting,
    operand_errors,
    product_errors,
    score_errors,
    with_sink,
)
from reference.bounds.softmax import additions_of, over, rank, total_error

# Elements of the largest temporary, [Hq, rows, S, Dv] in float64: 64 MiB.
CHUNK = 1 << 23


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """What softmax may make of the exact probabilities, all [Hq, L, S]."""

    moved: Tensor  # weight of |vⱼ − o|: how far errors of score and exponential, shared by both sums, move pⱼ
    p: Tensor  # the most that pⱼ can become
    rescaled: Tensor  # roundings by rescaling of what pⱼ has gone into
    recomputed: Tensor  # what a denominator gathered online, in a sweep of its own, does not share with the numerator
    rounded: Tensor  # rounding of pⱼ itself, in the numerator only


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    sinks: Tensor | None,
    arith: Arithmetic,
    *,
    bias: Tensor | None = None,
    abs_k: Tensor | None = None,
    abs_v: Tensor | None = None,
    likely: bool = True,
) -> Bounded:
    """q [Hq, L, Dh], k [Hkv, S, Dh], v [Hkv, S, Dv] -> attention [Hq, L, Dv] with its bound (ops.attention's
    arguments).

    bias, an additive mask that broadcasts to [Hq, L, S], may hold −inf, which hides a key like False in `mask`. abs_k
    and abs_v [as k, v] are |scale·code| + |bias| of quantised keys and values. A batch folds into the heads. Without
    `likely` that level, which costs as much again, is the bound itself.

    Let score j be off by δⱼ. Because Σpⱼ(vⱼ − o) = 0,
        o(s + δ) − o(s) = Σ pⱼ(e^δⱼ − 1)(vⱼ − o) / Σ pⱼe^δⱼ,
    exactly; its magnitude is at most Σ pⱼ(e^|δⱼ| − 1)|vⱼ − o| / Σ pⱼe^−|δⱼ|, and at most max|vⱼ − o|, for o(s + δ)
    is a mean of the values. δ takes in all that the two sums share: the score's own error, the exponential's,
    rescaling's (`score_errors`, `_weights`). Σpⱼvⱼ and Σpⱼ are then each added up with roundings of their own
    (`_sums`), which is where |vⱼ| enters.
    """
    heads = q.shape[0]
    keys = keys_of(q, k, v, scale, mask, sinks, bias)
    given = Given(
        q=q * scale,
        k=ops.repeat_heads(k, heads).transpose(-1, -2),
        size_k=None if abs_k is None else ops.repeat_heads(abs_k, heads).transpose(-1, -2),
        size_v=None if abs_v is None else with_sink(ops.repeat_heads(abs_v, heads), sinks, 0.0, dim=1),
        bias=None if bias is None else bias.expand(heads, q.shape[1], k.shape[1]),
        sinks=sinks,
    )
    counts = COUNTS if likely else COUNTS[:1]
    products = [product_errors(given, count, arith) for count in counts]
    if bias is not None:
        keys = replace(keys, visible=lasting(keys, products[0]))
    scores = [score_errors(keys, given, delta, arith) for delta in products]
    weights = [_weights(keys, delta, count, arith, scale) for delta, count in zip(scores, counts, strict=True)]
    moved = _moved(keys, torch.stack([w.moved for w in weights]))
    errors = [_sums(keys, *each, arith, given.size_v) for each in zip(weights, moved, counts, strict=True)]
    found = [stored(error, keys.output, arith) for error in errors]
    return Bounded(expected=keys.output, bound=found[0], likely=torch.minimum(found[0], found[-1]))


COUNTS: tuple[Count, Count] = (worst_case, probabilistic)


def _weights(keys: Keys, delta: Tensor, count: Count, arith: Arithmetic, scale: float) -> _Weights:
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
    above = count(rank(keys.scores, delta, keys.visible))
    shift = 4 * u * t
    if narrow:
        factor = torch.tensor([abs(scale)], dtype=torch.float64)
        constant = (rounding(factor, arith.intermediate) / factor).nan_to_num(0.0)
        shift = shift + constant * t
        shift = shift + storing(t + shift, arith.intermediate)
    logarithm = (delta + shift + EXP * u * (1 + above)).clamp(max=600.0)
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
    again = torch.where(above > 0, u * (EXP * (1 + above) + 4 * t), 0.0)
    return _Weights(
        moved=moved.clamp(max=HUGE), p=p, rescaled=u * above * p, recomputed=p * relative(again), rounded=rounded
    )


def _moved(keys: Keys, weights: Tensor) -> Tensor:
    """weights [n, Hq, L, S] -> Σⱼ weightⱼ|vⱼ − o| [n, Hq, L, Dv], at most the distance of the farthest value."""
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


def _sums(
    keys: Keys, weights: _Weights, moved: Tensor, count: Count, arith: Arithmetic, size_v: Tensor | None
) -> Tensor:
    """Error of Σpⱼvⱼ / Σpⱼ [Hq, L, Dv] given how far `moved` both sums have moved together.

    Numerator: a product each (u·Σp|v|), additions of subset sums, u for each rescaling of what is gathered,
    roundings of p and of v as operands. Denominator, in units of its total: additions, rescalings, and what it does
    not share; each unit costs |o|. Normalising p before the product costs DIVIDE·u·Σp|v|, which is more than after
    it, DIVIDE·u·|o|. A narrower intermediate stores the denominator, and the numerator or the probabilities.
    Quantised values (size_v) are twice as many terms with two roundings more each.
    """
    u, eta = unit(arith.accumulate), underflow(arith)
    narrow, quantised = narrower(arith.intermediate, arith.accumulate), size_v is not None
    size = keys.values.abs() if size_v is None else size_v
    terms = 2 if quantised else 1
    reach = keys.output.abs() + moved
    absolute = weights.p @ size
    partial = torch.maximum(largest_partial(absolute, reach), reach)
    larger, small = additions_of(weights.p, u)
    additions = terms * (larger + 1) - 1
    n = terms * keys.visible.sum(-1, keepdim=True).double()
    tail = (weights.p * small) @ size * (1 + n * u)
    sums = torch.minimum(
        summation(count(additions), partial, u) + tail, summation(count((n - 1).clamp(min=0)), partial, u)
    )
    leaves = (1 + DIVIDE + (2 if quantised else 0)) * u + (unit(arith.intermediate) if narrow and quantised else 0)
    numerator = sums + leaves * absolute + weights.rescaled @ size + weights.rounded @ keys.values.abs()
    numerator = numerator + weights.p @ operand_errors(size, arith, quantised)
    numerator = (
        numerator + terms * eta * (2 * n + 2 * (keys.visible.double() @ size)) + overflow(partial, arith.accumulate)
    )
    whole = weights.p.sum(-1, keepdim=True).clamp(max=1.0)
    denominator = total_error(weights.p, whole, torch.zeros_like(whole), count, u)
    denominator = denominator + (weights.rescaled + weights.recomputed).sum(-1, keepdim=True)
    if narrow:
        numerator = numerator + storing_anywhere(reach + numerator, arith.intermediate)
        denominator = denominator + unit(arith.intermediate) * (whole + denominator)
    second_order = 1 + (1 + DIVIDE) * u
    total = moved + over((numerator + reach * denominator) * second_order, denominator)
    return torch.where(keys.visible.double() @ size == 0, 0.0, total)  # no key, or none with a value: zeros
