"""Honest low-precision evaluations: every operation rounds for real, in an order and style that can be chosen.

These are what the bounds must hold. A `Style` fixes everything that the stated arithmetic leaves open: the order of
sums, fused multiply-add, how an exponential or a quotient is formed and in which direction a sloppy one errs,
flushing of subnormals. Planted faults are made of the same parts, with one rounding more.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from reference import ops
from reference.arithmetic import round_to
from reference.bounds import Bounded

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ORDERS = ("sequential", "reverse", "pairwise", "blocked", "lanes", "ascending", "descending", "shuffled")
LOG2E = 1.4426950408889634
U32 = 2.0**-24
LEAST = 2.0**-126


@dataclass(frozen=True, kw_only=True)
class Style:
    """What an implementation may choose. sloppy: 0, correctly rounded functions; ±1, each errs as far as allowed,
    that way;
    2, in random directions."""

    order: str = "sequential"
    fma: bool = False
    exp2: bool = False
    sloppy: int = 0
    flush: bool = False
    accumulate: torch.dtype = torch.float32


STYLES = (
    *(Style(order=order) for order in ORDERS),
    Style(fma=True),
    Style(order="descending", fma=True, sloppy=1),
    Style(order="blocked", fma=True, exp2=True, sloppy=-1, flush=True),
    Style(order="lanes", exp2=True, sloppy=2, flush=True),
    Style(order="ascending", exp2=True, sloppy=1),
    Style(order="descending", exp2=True, sloppy=-1),
)


def rounded(x: Tensor, dtype: str) -> Tensor:
    """x float64 rounded to `dtype`, still float64: what a bound takes as exact input."""
    return x.to(DTYPES[dtype]).double() if dtype in DTYPES else round_to(x, dtype)


def excess(actual: Tensor, result: Bounded, level: str = "bound") -> Tensor:
    """|actual − expected| / bound per element: ≤ 1 is inside. NaN is never; an infinity only where the bound is
    infinite
    and the sign right."""
    bound: Tensor = getattr(result, level)
    actual = actual.double()
    error = (actual - result.expected).abs()
    ratio = torch.where(error == 0, 0.0, error / bound)
    legal = (
        torch.isinf(bound) & ~torch.isnan(actual) & ~(torch.isinf(actual) & (actual.sign() != result.expected.sign()))
    )
    ratio = torch.where(legal, 0.0, ratio)
    return torch.where(torch.isnan(actual) | torch.isnan(ratio), torch.inf, ratio)


def flush(x: Tensor, style: Style) -> Tensor:
    """x with float32 subnormals set to zero, if the style flushes."""
    return torch.where(x.abs() < LEAST, torch.zeros_like(x), x) if style.flush and x.dtype == torch.float32 else x


def total(terms: Tensor, style: Style) -> Tensor:
    """Sum over the last axis, a rounding after each addition, in the style's order."""
    terms = _ordered(terms, style)
    if style.order == "pairwise":
        while terms.shape[-1] > 1:
            if terms.shape[-1] % 2:
                terms = torch.nn.functional.pad(terms, (0, 1))
            terms = flush(terms[..., ::2] + terms[..., 1::2], style)
        return terms[..., 0]
    if style.order in ("blocked", "lanes"):
        width = 8
        terms = torch.nn.functional.pad(terms, (0, -terms.shape[-1] % width))
        terms = terms.unflatten(-1, (-1, width))
        terms = _running(terms if style.order == "blocked" else terms.transpose(-1, -2), style)
    return _running(terms, style)


def _running(terms: Tensor, style: Style) -> Tensor:
    result = terms[..., 0]
    for i in range(1, terms.shape[-1]):
        result = flush(result + terms[..., i], style)
    return result


def _ordered(terms: Tensor, style: Style) -> Tensor:
    if style.order == "reverse":
        return terms.flip(-1)
    if style.order == "ascending":  # negative terms first: the partial sums go as far out as they can
        return terms.sort(dim=-1).values
    if style.order == "descending":
        return terms.sort(dim=-1, descending=True).values
    if style.order == "shuffled":
        return terms[..., torch.randperm(terms.shape[-1], generator=torch.Generator().manual_seed(7))]
    return terms


def dot(a: Tensor, b: Tensor, style: Style) -> Tensor:
    """Σ a·b over the last axis, both in the accumulator's dtype."""
    if not style.fma:
        return total(flush(a * b, style), style)
    a, b = torch.broadcast_tensors(a, b)
    if style.order in ("descending", "ascending"):
        index = (a.double() * b.double()).argsort(dim=-1, descending=style.order == "descending")
        a, b = a.gather(-1, index), b.gather(-1, index)
    result = (a[..., 0].double() * b[..., 0].double()).to(a.dtype)
    for i in range(1, a.shape[-1]):
        result = flush((result.double() + a[..., i].double() * b[..., i].double()).to(a.dtype), style)
    return result


def _err(x: Tensor, ulps: float, style: Style) -> Tensor:
    """x float64 -> the accumulator's dtype, off by `ulps` half-ulp units (u) before it is rounded."""
    if style.sloppy == 0:
        return x.to(style.accumulate)
    u = torch.finfo(style.accumulate).eps / 2
    sign: Tensor | float = style.sloppy
    if style.sloppy == 2:
        sign = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(3)).double() * 2 - 1
    return flush((x * (1 + sign * ulps * u)).to(style.accumulate), style)


def exp(x: Tensor, style: Style) -> Tensor:
    """exp(x): as such, or as exp2(x·log2 e); off by up to 4u beyond the argument; exp(0) = 1."""
    if style.exp2:
        x = x * torch.tensor(LOG2E, dtype=x.dtype)
        exact = torch.exp2(x.double())
    else:
        exact = torch.exp(x.double())
    return torch.where(x == 0, torch.ones_like(x), _err(exact, 3, style))


def divide(a: Tensor, b: Tensor, style: Style) -> Tensor:
    """a / b within 2.5 ulp, or (fma styles) a times the rounded reciprocal; exact for a power of two either way."""
    if style.fma:
        return flush(a * (1 / b), style)
    exact = a.double() / b.double()
    power = torch.frexp(b.double()).mantissa.abs() == 0.5
    return torch.where(power, exact.to(style.accumulate), _err(exact, 4, style))


def linear(x: Tensor, w: Tensor, dtype: str, style: Style, output: str | None = None) -> Tensor:
    """x [T, k], w [m, k] float64 that hold `dtype` values -> [T, m]."""
    acc = style.accumulate
    return dot(x[:, None].to(acc), w[None].to(acc), style).to(DTYPES[output or dtype])


def softmax(x: Tensor, dtype: str, style: Style, online: bool = False, stored: bool = False) -> Tensor:
    """Softmax of x [..., S]; online gathers maximum and total in one sweep; stored keeps every step in `dtype`."""
    acc, low = style.accumulate, DTYPES[dtype]

    def keep(y: Tensor) -> Tensor:
        return y.to(low).to(acc) if stored else y

    y = x.to(acc)
    top = y.amax(-1, keepdim=True)
    e = keep(exp(keep(y - top), style))
    sums = _gather(y, style) if online else keep(total(e, style)[..., None])
    return divide(e, sums, style).to(low)


def _gather(scores: Tensor, style: Style) -> Tensor:
    """Σ exp(scores − max) [..., 1] in one sweep, rescaled whenever the running maximum rises."""
    running = torch.full_like(scores[..., :1], -torch.inf)
    sums = torch.zeros_like(running)
    for i in range(scores.shape[-1]):
        score = scores[..., i : i + 1]
        new = torch.maximum(running, score)
        seen = torch.where(torch.isneginf(new), torch.zeros_like(new), new)
        scaled = flush(sums * exp(running - seen, style), style)
        sums, running = flush(scaled + exp(score - seen, style), style), new
    return sums


def attention_scores(q: Tensor, k: Tensor, scale: float, style: Style, where: str) -> Tensor:
    """Scores [Hq, L, S] in the accumulator, scaled in q ("q"), after the product ("s"), or with log2 e ("log2")."""
    acc = style.accumulate
    q, k = q.to(acc), ops.repeat_heads(k, q.shape[0]).to(acc)
    factor = torch.tensor(scale, dtype=acc) * torch.tensor(LOG2E if where == "log2" else 1.0, dtype=acc)
    if where == "s":
        return dot(q[:, :, None], k[:, None], style) * factor
    return dot(flush(q * factor, style)[:, :, None], k[:, None], style)


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor,
    sinks: Tensor | None,
    dtype: str,
    style: Style,
    block: int = 8,
    splits: int = 1,
    operand: str | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Online softmax over blocks of keys, in base 2, `splits` ranges merged at the end; sink first. Fully masked:
    zeros.

    operand rounds q·scale, probabilities (numerator only), keys and values as a tensor core's operands would be.
    """
    acc = style.accumulate

    def narrow(x: Tensor) -> Tensor:
        return x if operand is None else round_to(x.double(), operand).to(acc)

    scaled = narrow(flush(q.to(acc) * (torch.tensor(scale, dtype=acc) * torch.tensor(LOG2E, dtype=acc)), style))
    keys, values = (narrow(ops.repeat_heads(x, q.shape[0]).to(acc)) for x in (k, v))
    scores = dot(scaled[:, :, None], keys[:, None], style)
    if bias is not None:
        scores = scores + bias.to(acc) * torch.tensor(LOG2E, dtype=acc)
    scores = scores.masked_fill(~mask, -torch.inf)
    base2 = Style(order=style.order, sloppy=style.sloppy, flush=style.flush, accumulate=acc)
    parts = []
    edges = torch.linspace(0, k.shape[1], min(splits, k.shape[1]) + 1).long().tolist()
    for first, last in itertools.pairwise(edges):
        m = torch.full((*scores.shape[:2], 1), -torch.inf, dtype=acc)
        d, o = torch.zeros_like(m), torch.zeros(*scores.shape[:2], v.shape[-1], dtype=acc)
        if sinks is not None and first == 0:
            m = (sinks.to(acc) * torch.tensor(LOG2E, dtype=acc))[:, None, None].expand_as(m)
            d = torch.ones_like(d)
        for start in range(first, last, block):
            piece = slice(start, min(start + block, last))
            e, new, factor = _rescale(scores[..., piece], m, base2)
            d = flush(flush(d * factor, style) + total(e, style)[..., None], style)
            products = dot(narrow(e)[:, :, None], values[:, piece].transpose(-1, -2)[:, None], style)
            o, m = flush(flush(o * factor, style) + products, style), new
        parts.append((m, d, o))
    m, d, o = parts[0]
    for other, more_d, more_o in parts[1:]:
        new = torch.maximum(m, other)
        a, b = _power(m - new, new, base2), _power(other - new, new, base2)
        m, d, o = new, flush(d * a + more_d * b, style), flush(o * a + more_o * b, style)
    return torch.where(d > 0, divide(o, torch.where(d > 0, d, 1), style), torch.zeros_like(o)).to(DTYPES[dtype])


def _power(x: Tensor, top: Tensor, style: Style) -> Tensor:
    """2ˣ, zero where nothing has been seen yet (top is −inf)."""
    value = torch.where(x == 0, torch.ones_like(x), _err(torch.exp2(x.double()), 3, style))
    return torch.where(torch.isneginf(top), torch.zeros_like(value), value)


def _rescale(scores: Tensor, m: Tensor, style: Style) -> tuple[Tensor, Tensor, Tensor]:
    new = torch.maximum(m, scores.amax(-1, keepdim=True))
    return _power(scores - new, new, style), new, _power(m - new, new, style)


def unfused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor,
    sinks: Tensor | None,
    dtype: str,
    style: Style,
    stored: bool = False,
    where: str = "q",
    late: bool = False,
    online: bool = False,
    probabilities: str | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Scores, softmax, product as separate steps; stored keeps each result in `dtype`; late divides after the product;
    online gathers the denominator in a sweep of its own.

    probabilities, a dtype, rounds them once more (a fault).
    """
    acc, low = style.accumulate, DTYPES[dtype]

    def keep(x: Tensor) -> Tensor:
        return x.to(low).to(acc) if stored else x

    if stored and where == "q":
        scaled = keep(keep(torch.tensor(scale, dtype=acc)) * q.to(acc))
        keys = ops.repeat_heads(k, q.shape[0]).to(acc)
        scores = keep(dot(scaled[:, :, None], keys[:, None], style))
    else:
        scores = keep(attention_scores(q, k, scale, style, where))
    if bias is not None:
        added = keep(bias.to(acc)) * torch.tensor(LOG2E if where == "log2" else 1.0, dtype=acc)
        scores = keep(scores + added)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = keep(sinks.to(acc)) * torch.tensor(LOG2E if where == "log2" else 1.0, dtype=acc)
        scores = torch.cat([scores, sink[:, None, None].expand(*scores.shape[:2], 1)], -1)
    top = scores.amax(-1, keepdim=True)
    top = torch.where(torch.isneginf(top), torch.zeros_like(top), top)
    shifted = keep(scores - top)
    e = _power(shifted, top, style) if where == "log2" else keep(exp(shifted, style))
    d = keep(_gather(scores, style) if online else total(e, style)[..., None])
    d = torch.where(d > 0, d, torch.ones_like(d))
    values = ops.repeat_heads(v, q.shape[0]).to(acc).transpose(-1, -2)[:, None]
    p = e if late else keep(divide(e, d, style))
    if probabilities is not None:
        p = round_to(p.double(), probabilities).to(acc)
    o = keep(dot(p[..., : v.shape[1]][:, :, None], values, style))
    return (divide(o, d, style) if late else o).to(low)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: str, style: Style, stored: bool = False) -> Tensor:
    """RMSNorm by rsqrt, or (fma styles) by a square root and a division; stored keeps x·r in `dtype`."""
    acc = style.accumulate
    y, w = flush(x.to(acc), style), weight.to(acc)
    squares = dot(y, y, style)[..., None]
    mean = divide(squares, torch.full_like(squares, x.shape[-1]), style) + torch.tensor(eps, dtype=acc)
    if style.fma:
        normal = divide(y, torch.sqrt(mean), style)
    elif style.order == "reverse" and not stored:
        return (y * (_err(mean.double() ** -0.5, 3, style) * w)).to(DTYPES[dtype])
    else:
        normal = y * _err(mean.double() ** -0.5, 3, style)
    normal = flush(normal, style)
    return (flush((normal.to(DTYPES[dtype]).to(acc) if stored else normal) * w, style)).to(DTYPES[dtype])


def rope(x: Tensor, positions: Tensor, base: float, dtype: str, style: Style, stored: bool = False) -> Tensor:
    """RoPE with float32 angles, frequencies by exp2 or by a power; stored keeps cos, sin and products in `dtype`."""
    acc, half = style.accumulate, x.shape[-1] // 2

    def keep(y: Tensor) -> Tensor:
        return flush(y.to(DTYPES[dtype]).to(acc) if stored else y, style)

    j = divide(torch.arange(half).to(acc), torch.tensor(float(half), dtype=acc), style)
    if style.exp2:
        exponent = -j * torch.tensor(base, dtype=acc).double().log2().to(acc)
        frequency = _err(torch.exp2(exponent.double()), 3, style)
    else:
        frequency = _err(torch.tensor(base, dtype=torch.float64) ** -j.double(), 3, style)
    theta = (positions.to(acc)[:, None] * frequency)[:, None].double()
    slip = torch.where(theta == 0, 0.0, 3 * U32 * (style.sloppy if abs(style.sloppy) == 1 else 0))
    cos, sin = keep((theta.cos() + slip).to(acc)), keep((theta.sin() + slip).to(acc))
    a, b = x.to(acc).chunk(2, -1)
    if style.fma and not stored:
        first = ((a * cos).double() - b.double() * sin.double()).to(acc)
        second = ((b * cos).double() + a.double() * sin.double()).to(acc)
    else:
        first, second = keep(a * cos) - keep(b * sin), keep(b * cos) + keep(a * sin)
    return torch.cat([first, second], -1).to(DTYPES[dtype])


def sigmoid(x: Tensor, style: Style) -> Tensor:
    """1/(1 + exp(−x)); the styles with fma use 1 − 1/(1 + exp(x)) for x > 0, as MLX does."""
    if not style.fma:
        return divide(torch.ones_like(x), 1 + exp(-x, style), style)
    small = divide(torch.ones_like(x), 1 + exp(x.abs(), style), style)
    return torch.where(x < 0, small, 1 - small)


def swiglu(gate: Tensor, up: Tensor, limit: float | None, dtype: str, style: Style, stored: bool = False) -> Tensor:
    """silu(gate)·up; stored keeps the sigmoid and the silu in `dtype`."""
    acc = style.accumulate
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    g, v = flush(gate.to(acc), style), flush(up.to(acc), style)

    def keep(y: Tensor) -> Tensor:
        return flush(y.to(DTYPES[dtype]).to(acc) if stored else y, style)

    if style.order == "reverse" and not stored:
        return flush(divide(g, 1 + exp(-g, style), style) * v, style).to(DTYPES[dtype])
    return flush(keep(g * keep(sigmoid(g, style))) * v, style).to(DTYPES[dtype])
