"""Bounds of the ops between the matrix products: RMSNorm, RoPE and SwiGLU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reference import ops
from reference.arithmetic import OVERFLOW, UNDERFLOW, UNIT_ROUNDOFF, Arithmetic
from reference.bounds.core import (
    DIVIDE,
    EXP,
    HUGE,
    RSQRT,
    TRIG,
    Bounded,
    Count,
    bounded,
    narrower,
    overflow,
    products_exact,
    quotient,
    storing,
    summation,
    underflow,
    unit,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float, arith: Arithmetic) -> Bounded:
    """x [..., D], weight [D] -> RMSNorm [..., D] with its bound.

    v = Σx²/D + eps: D − 1 additions of non-negative terms (only those that are not zero), the squares unless exact, one
    division by D, the constant and the addition of eps; relative error ρ. Then (1 − ρ)^−½ − 1 (about ρ/2), RSQRT
    and x·r (or a square root, u, and a division, DIVIDE), and the product with the weight. A narrower intermediate
    stores x·r.
    """
    u, eta = unit(arith.accumulate), underflow(arith)
    expected = ops.rms_norm(x, weight, eps)
    squares = (x * x).sum(-1, keepdim=True)
    mean = squares / x.shape[-1]
    n = (x != 0).sum(-1, keepdim=True).double().clamp(min=1)
    power = 1 / torch.sqrt(mean + eps)
    normal = (x * power).abs()

    def error(count: Count) -> Tensor:
        squared = 0.0 if products_exact(arith) else u
        summed = mean * (summation(count(n - 1), 1.0 + squared * torch.ones_like(n), u) + squared)
        absolute = summed + quotient(x.shape[-1]) * u * (mean + summed) + 3 * eta + u * eps
        rho = (absolute + u * (mean + eps + absolute)) * power**2
        root = torch.where(rho < 1, (1 - rho).clamp(min=1e-300).rsqrt() - 1, HUGE)
        steps = max(RSQRT + 1, 1 + DIVIDE) * u
        relative = root + (1 + root) * steps
        first = normal * relative + eta * (1 + power)
        if narrower(arith.intermediate, arith.accumulate):
            first = first + storing(normal + first, arith.intermediate)
        total = first * weight.abs() * (1 + u) + u * expected.abs() + eta * (1 + normal)
        total = torch.where((x == 0) | (weight == 0), 0.0, total)
        return total + overflow(squares * (1 + summation(n, torch.ones_like(n), u)), arith.accumulate)

    return bounded(expected, error, arith)


def rope(x: Tensor, positions: Tensor, base: float, arith: Arithmetic) -> Bounded:
    """x [T, H, Dh], positions [T] -> RoPE [T, H, Dh] with its bound; a position that is scaled may be fractional.

    The inverse frequency is exp2 of −j·log2(base)·2/Dh, rounded twice (the logarithm, the product; a division by
    Dh/2 is exact for a power of two, else DIVIDE), which its exponent ln(base)·2j/Dh carries into it, or a power as
    good; EXP for the function. The angle θ is that times the position, u more, and times a scale, 2u more (the scale's
    own rounding and the product), unless all positions are whole. A wrong angle turns the pair (y₁,
    y₂) it should have given by Δθ: |Δy₁| ≤ |y₂|·Δθ + |y₁|·Δθ²/2. Then cos and sin, TRIG·u absolute each, two
    products and an addition. A narrower intermediate stores cos and sin (never the angle), the products, and their sum.
    """
    u, eta = unit(arith.accumulate), underflow(arith)
    expected = ops.rope(x, positions, base)
    half = x.shape[-1] // 2
    angles = ops.rope_angles(positions, x.shape[-1], base)[:, None, :]
    exponent = math.log(base) * torch.arange(half, dtype=torch.float64) / half
    roundings = 2 + quotient(half)
    product = 1 if bool((positions == positions.round()).all()) else 3
    turn = (angles.abs() * ((exponent * roundings + EXP + product) * u) * (1 + 8 * u)).repeat(1, 1, 2)
    cos, sin = angles.cos().abs().repeat(1, 1, 2), angles.sin().abs().repeat(1, 1, 2)
    first, second = x.abs(), x.abs().roll(half, dims=-1)
    radius = torch.hypot(first, second)
    turned = torch.minimum(expected.abs().roll(half, dims=-1) * turn + expected.abs() * turn**2 / 2, 2 * radius)
    trig = TRIG * u * torch.ones_like(cos)
    across = first * cos + second * sin

    def error(count: Count) -> Tensor:
        functions = trig * (first + second)
        products = across + functions
        stores = torch.zeros_like(across)
        if narrower(arith.intermediate, arith.accumulate):
            near = torch.minimum(cos + trig + turn, 1 + trig), torch.minimum(sin + trig + turn, 1 + trig)
            table = [storing(value, arith.intermediate) for value in near]
            stores = first * table[0] + second * table[1]
            terms = first * (near[0] + table[0]), second * (near[1] + table[1])
            stores = stores + storing(terms[0], arith.intermediate) + storing(terms[1], arith.intermediate)
        arithmetic = 2 * u * (products + stores + turned)
        # A rotation by exactly nothing is exact: cos(0) = 1, sin(0) = 0.
        still = (angles == 0).repeat(1, 1, 2).expand_as(x)
        total = torch.where(still, 0.0, turned + functions + stores + arithmetic)
        return total + eta * (3 + first + second) * (radius > 0) + overflow(products, arith.accumulate)

    return bounded(expected, error, arith)


def swiglu(gate: Tensor, up: Tensor, limit: float | None, arith: Arithmetic) -> Bounded:
    """gate, up [...] -> silu(gate)·up [...] with its bound; the clamp at `limit` is exact.

    σ = 1/(1 + e), e = exp(−g): e is off by (2|g| + EXP)·u (log2 e and the product with it), of which σ feels the part
    1 − σ; then the addition and the division. For g > 0 also 1 − 1/(1 + exp(g)), which costs one u more. g·σ and ·up: u
    each. Near zero σ may be flushed, at η·|g·up|. A narrower intermediate stores e and 1 + e (`sigmoid_stored`), σ and
    silu(g).
    """
    u, eta = unit(arith.accumulate), underflow(arith)
    expected = ops.swiglu(gate, up, limit)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    g, v, sigma = gate.abs(), up.abs(), torch.sigmoid(gate)

    def error(count: Count) -> Tensor:
        off = sigma * sigmoid_error(gate, u) + 2 * eta
        if narrower(arith.intermediate, arith.accumulate):
            off = off + sigmoid_stored(gate, arith)
            off = off + storing(sigma + off, arith.intermediate)
        silu = g * off * (1 + u) + u * g * sigma + eta
        if narrower(arith.intermediate, arith.accumulate):
            silu = silu + storing(g * sigma + silu, arith.intermediate)
        total = silu * v * (1 + u) + u * expected.abs() + eta * (1 + v + g)
        return torch.where((g == 0) | (v == 0), 0.0, total) + overflow(expected.abs(), arith.accumulate)

    return bounded(expected, error, arith)


def sigmoid_error(x: Tensor, u: float) -> Tensor:
    """Relative error of sigmoid(x) computed as 1/(1 + exp(−x)) or, for x > 0, 1 − 1/(1 + exp(x)); see `swiglu`."""
    part = torch.sigmoid(-x)
    first = part * torch.expm1(((2 * x.abs() + EXP) * u).clamp(max=600.0))
    return first + (1 + first) * (2 + DIVIDE) * u


def sigmoid_stored(x: Tensor, arith: Arithmetic) -> Tensor:
    """What sigmoid(x) may lose when e = exp(±x) and 1 + e are stored in a narrower intermediate.

    A relative error ε of e changes σ by σ(1 − σ)·ε, and one of 1 + e by at most σ·ε (in 1 − 1/(1 + exp(x)) by less).
    exp(|x|) beyond the intermediate's range is an infinity, and y = 1/(1 + exp(|x|)) = min(σ, 1 − σ) is 0: so in
    float16 from |x| = 11.1 on (mx.sigmoid).
    """
    if not narrower(arith.intermediate, arith.accumulate):
        return torch.zeros_like(x)
    u = UNIT_ROUNDOFF[arith.intermediate]
    sigma, y = torch.sigmoid(x), torch.sigmoid(-x.abs())
    overflows = x.abs() >= math.log(OVERFLOW[arith.intermediate]) - 2 * u * x.abs()
    stored = (sigma + y * (1 - y)) * u / (1 - 2 * u) + UNDERFLOW[arith.intermediate]
    return torch.where(overflows, y + stored, stored)
