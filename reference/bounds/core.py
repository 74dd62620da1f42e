"""What all bounds share: the record they return, the two ways of counting roundings, and the store at the end.

Model of arithmetic (Higham, Accuracy and Stability, §2.2 and §2.8): fl(x op y) = (x op y)(1 + δ) + η with |δ| ≤ u and
|η| ≤ UNDERFLOW. Nothing is assumed about the order of a sum, about fused multiply-add, or about how an exponential is
rescaled on the way; exp(0) = 1 and multiplication or division by a power of two are exact.

The exact result is itself computed in float64; its error is carried by adding 2⁻⁵³ to every unit roundoff.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.arithmetic import (
    FORMATS,
    LARGEST,
    OVERFLOW,
    SMALLEST_NORMAL,
    SMALLEST_SUBNORMAL,
    UNDERFLOW,
    UNIT_ROUNDOFF,
    Arithmetic,
    half_ulp,
    round_to,
)

# Relative errors of elementary functions in units of u. One ulp is at most 2u.
EXP = 4.0  # exp, exp2, log1p: 2 ulp beyond the error of the argument (OpenCL 3.0 full profile: 3; CUDA expf: 2)
DIVIDE = 5.0  # x / y within 2.5 ulp (Metal fast math, OpenCL); a reciprocal within 1 ulp and a product take less
RSQRT = 4.0  # 2 ulp (OpenCL, Metal; CUDA rsqrtf: 2 ulp)
SQRT = 5.0  # x·rsqrt(x)
TRIG = 4.0  # sin and cos, absolute: 4 ulp below one is 4u (OpenCL 3.0 full profile)

# Stands for infinity where it may meet a zero: no sum in any format but float64 reaches it.
HUGE = 1e290


@dataclass(frozen=True, kw_only=True)
class Bounded:
    """An exact result and how far honest arithmetic may be from it, per element; float64 tensors of one shape.

    bound: worst case; beyond it a rounding happened that was not stated. Infinite where overflow is legal.
    likely: n roundings counted as 6·√n (Higham & Mary 2019, theorem 2.4, λ = 6: one in 10⁸ under their model);
    reported.
    """

    expected: Tensor
    bound: Tensor
    likely: Tensor


Count = Callable[[Tensor], Tensor]


def worst_case(n: Tensor) -> Tensor:
    """n roundings that all point the same way."""
    return n


def probabilistic(n: Tensor) -> Tensor:
    """n independent roundings of mean zero: 6·√n of them, where that is fewer."""
    return torch.minimum(n, 6 * n.sqrt())


def unit(dtype: str) -> float:
    """Unit roundoff of `dtype`, widened by that of the float64 the exact result is computed in."""
    return UNIT_ROUNDOFF[dtype] + UNIT_ROUNDOFF["float64"]


def quotient(divisor: int) -> float:
    """Relative error, in u, of a division by a constant: none for a power of two, whose reciprocal is exact."""
    return 0.0 if divisor & (divisor - 1) == 0 else DIVIDE


def narrower(dtype: str, than: str) -> bool:
    """Whether storing a value of format `than` as `dtype` can round it."""
    a, b = FORMATS[dtype], FORMATS[than]
    return a.precision < b.precision or a.least_exponent > b.least_exponent


def summation(n: Tensor, partial: Tensor, u: float) -> Tensor:
    """Error of n additions, each of whose exact results is at most `partial` in magnitude: γₙ·partial.

    Each addition computes ŝ with |ŝ| ≤ partial + E and errs by at most u|ŝ|, E the error so far; so E ≤
    n·u·(partial + E), which gives γₙ·partial (Higham §4.2, running error, with the order taken out by bounding all
    partial sums at once). Where n·u ≥ 1 the result is HUGE, and zero where partial is.
    """
    nu = n * u
    factor = torch.where(nu < 1, nu / (1 - nu).clamp(min=1e-300), HUGE)
    return torch.where(partial == 0, 0.0, factor * partial)


def largest_partial(absolute: Tensor, total: Tensor) -> Tensor:
    """Greatest magnitude that any partial sum, over any subset of terms, can have: (Σ|xᵢ| + |Σxᵢ|)/2.

    With P the sum of the positive terms and N of the negative ones, a subset sums to something in [−N, P], P + N =
    Σ|xᵢ| and |P − N| = |Σxᵢ|. Half of Σ|xᵢ| when the sum cancels: the classic bound is twice as wide there.
    """
    return (absolute + total.abs()) / 2


def rounding(x: Tensor, dtype: str) -> Tensor:
    """Error of rounding exact x [...] to `dtype`: zero if x is representable, else half an ulp; HUGE beyond range."""
    error = torch.where(round_to(x, dtype) == x, 0.0, half_ulp(x.abs(), dtype))
    return torch.where(x.abs() >= OVERFLOW[dtype], HUGE, error)


def storing_anywhere(magnitude: Tensor, dtype: str) -> Tensor:
    """As `storing`, for a value that may be stored times any constant (log2 e, a softmax's total): u·magnitude or so.

    The constant moves the value within its binade, so half an ulp becomes the whole u; among subnormals, half their
    spacing, and never more than the value.
    """
    error = (UNIT_ROUNDOFF[dtype] * magnitude).clamp(min=SMALLEST_SUBNORMAL[dtype] / 2)
    return torch.where(magnitude >= OVERFLOW[dtype], HUGE, torch.minimum(error, magnitude))


def storing(magnitude: Tensor, dtype: str) -> Tensor:
    """Error of rounding an inexact value, at most `magnitude`, to `dtype`: half an ulp; HUGE beyond range."""
    return torch.where(magnitude >= OVERFLOW[dtype], HUGE, half_ulp(magnitude.clamp(max=LARGEST["float32"]), dtype))


def stored(error: Tensor, expected: Tensor, arith: Arithmetic, exact: bool = False) -> Tensor:
    """Adds to `error` the store of a result computed in `arith.accumulate` as `arith.output`.

    A result already in the output format is not rounded again; `exact` says that it was never rounded, so that the
    store is the one rounding there is. Near zero a flush costs up to the least normal number. Beyond the output's
    range an infinity is legal and the error is infinite.
    """
    reach = expected.abs() + error
    total = error
    if exact or narrower(arith.output, arith.accumulate):
        total = error + half_ulp(reach.clamp(max=LARGEST["float32"]), arith.output)
    if FORMATS[arith.output].flushes:
        least = SMALLEST_NORMAL[arith.output]
        flushed = (reach > 0) & (expected.abs() - error < least)
        total = torch.where(flushed, torch.maximum(total, error + least), total)
    return torch.where(reach >= OVERFLOW[arith.output], torch.inf, total)


def bounded(expected: Tensor, error: Callable[[Count], Tensor], arith: Arithmetic, exact: bool = False) -> Bounded:
    """The Bounded of a result whose error before the store is `error(count)`, for either way of counting."""
    bound = stored(error(worst_case), expected, arith, exact)
    likely = stored(error(probabilistic), expected, arith, exact)
    return Bounded(expected=expected, bound=bound, likely=torch.minimum(likely, bound))


def overflow(partial: Tensor, dtype: str) -> Tensor:
    """HUGE where a sum accumulated in `dtype` may pass its range on the way, else zero."""
    return torch.where(partial >= LARGEST[dtype], HUGE, torch.zeros_like(partial))


def products_exact(arith: Arithmetic) -> bool:
    """Whether the product of two operands needs no rounding in the accumulator: twice their precision fits into it."""
    operand = FORMATS[arith.dtype].precision
    if arith.operand is not None:
        operand = min(operand, FORMATS[arith.operand].precision)
    return 2 * operand <= FORMATS[arith.accumulate].precision


def underflow(arith: Arithmetic) -> float:
    """What one operation in the accumulator may lose near zero."""
    return UNDERFLOW[arith.accumulate]


def flushed(x: Tensor, arith: Arithmetic) -> Tensor:
    """What is lost when an exact input is flushed on the way into the accumulator: all of it, if subnormal there."""
    if not FORMATS[arith.accumulate].flushes:
        return torch.zeros_like(x)
    return torch.where(x.abs() < SMALLEST_NORMAL[arith.accumulate], x.abs(), 0.0)


def relative(exponent: Tensor) -> Tensor:
    """exp(|exponent|) − 1, the relative change of a quantity whose logarithm changes by that much; at most HUGE."""
    return torch.expm1(exponent.clamp(max=math.log(HUGE)))
