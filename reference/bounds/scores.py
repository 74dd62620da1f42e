"""Errors of attention's scores: the products of queries and keys, an additive mask, sinks.

Keys may be sums scale·code + bias that a kernel forms or distributes over its products; their magnitude |scale·code| +
|bias| then takes the place of theirs, and terms count twice (reference/bounds/products.py, `linear`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reference import ops
from reference.arithmetic import Arithmetic
from reference.bounds.core import (
    Count,
    largest_partial,
    narrower,
    overflow,
    rounding,
    storing,
    storing_anywhere,
    summation,
    underflow,
    unit,
)

# exp(−104) is less than half the least subnormal of float32; no format here has a smaller one.
VANISHED = 128.0


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Attention's exact intermediates, the sink, if any, as a last key with value zero."""

    scores: Tensor  # [Hq, L, S]
    visible: Tensor  # bool [Hq, L, S]
    p: Tensor  # [Hq, L, S]
    values: Tensor  # [Hq, S, Dv]
    output: Tensor  # [Hq, L, Dv]


@dataclass(frozen=True, kw_only=True)
class Given:
    """Attention's arguments, keys and values by query head; size_k and size_v are None unless these are quantised."""

    q: Tensor  # [Hq, L, Dh], scaled
    k: Tensor  # [Hq, Dh, S]
    size_k: Tensor | None
    size_v: Tensor | None
    bias: Tensor | None  # [Hq, L, S]
    sinks: Tensor | None  # [Hq]


def keys_of(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, sinks: Tensor | None, bias: Tensor | None
) -> Keys:
    scores = ops.attention_scores(q, k, scale, mask)
    if bias is not None:
        scores = scores + bias
    visible = ~torch.isneginf(scores)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:2], 1)], dim=-1)
    values = with_sink(ops.repeat_heads(v, q.shape[0]), sinks, 0.0, dim=1)
    visible = with_sink(visible, sinks, True, dim=2)
    p = ops.softmax(scores)
    return Keys(scores=scores, visible=visible, p=p, values=values, output=p @ values)


def with_sink(x: Tensor, sinks: Tensor | None, value: float, dim: int) -> Tensor:
    """x with one more key, the sink's, along `dim`, where everything is `value`."""
    return x if sinks is None else torch.cat([x, torch.full_like(x.narrow(dim, 0, 1), value)], dim=dim)


def lasting(keys: Keys, delta: Tensor) -> Tensor:
    """The visible keys [Hq, L, S] but those so far below another that every exponential of them is zero.

    An additive mask hides a key by a large finite number, which may round to −inf. δ is the error of the products;
    adding and storing changes a score by 2·2⁻⁸ of itself at most, the roundoff of the coarsest format twice.
    """
    delta = torch.cat([delta, torch.zeros_like(keys.scores[..., delta.shape[-1] :])], dim=-1)
    scores = torch.where(keys.visible, keys.scores, -torch.inf)
    slack = torch.where(keys.visible, 2.0**-6 * keys.scores.abs() + delta, 0.0)
    surely = (scores - slack).amax(-1, keepdim=True)
    return keys.visible & ~(scores + slack < surely - VANISHED)


def product_errors(given: Given, count: Count, arith: Arithmetic) -> Tensor:
    """Error of each scaled product q·k [Hq, L, S], with A = Σ|q·scale||k|, whatever of q and q·k is scaled, by scale
    or scale·log2 e.

    The inner product: Dh − 1 additions of subset sums; up to 2u·A for rounding q·scale and then the products (or one
    rounding of the scaled product, and products that are exact or not); u·|s| for a separate product with log2 e.
    An operand dtype rounds q·scale, which no longer is an input, and k. A narrower intermediate stores q·scale (or the
    unscaled scores, at no more than that) and the scores. Quantised keys are twice as many terms with two roundings
    more, and as operands scale·code and its sum with the bias are both rounded.
    """
    u = unit(arith.accumulate)
    scaled, size = given.q.abs(), given.k.abs() if given.size_k is None else given.size_k
    absolute, exact = scaled @ size, (given.q @ given.k).abs()
    narrow, quantised = narrower(arith.intermediate, arith.accumulate), given.size_k is not None
    operands = torch.zeros_like(absolute)
    if arith.operand is not None:
        wide = size + operand_errors(size, arith, quantised)
        operands = ((scaled + storing_anywhere(scaled, arith.operand)) @ wide - absolute).clamp(min=0)
    if narrow:
        operands = operands + storing_anywhere(scaled * (1 + u), arith.intermediate) @ size
    if narrow and quantised:
        # Each product of q and a dequantised key is stored before it is added (seen in MLX's CUDA qmv kernels).
        operands = operands + unit(arith.intermediate) * (absolute + operands)
    leaves = (4 if quantised else 2) * u * (1 + u) ** 3 * (absolute + operands)
    partial = largest_partial(absolute + operands, exact + operands) + leaves
    additions = (2 if quantised else 1) * given.q.shape[-1] - 1
    terms = torch.tensor(max(additions, 0), dtype=torch.float64)
    flush = underflow(arith) * (2 * given.q.shape[-1] + scaled.sum(-1, keepdim=True) + size.sum(-2, keepdim=True))
    delta = operands + leaves + summation(count(terms), partial, u) + u * exact + (3 if quantised else 1) * flush
    delta = delta + overflow(partial, arith.accumulate)
    if narrow:
        delta = delta + storing(exact + delta, arith.intermediate)
    return torch.where(absolute == 0, 0.0, delta)


def operand_errors(size: Tensor, arith: Arithmetic, quantised: bool) -> Tensor:
    """Error of keys or values [...] as operands of a product; quantised ones are made in the operand's dtype."""
    if arith.operand is None:
        return torch.zeros_like(size)
    if quantised:
        half = storing(size, arith.operand)
        return half + storing(size + half, arith.operand)
    return rounding(size, arith.operand) if narrower(arith.operand, arith.dtype) else torch.zeros_like(size)


def score_errors(keys: Keys, given: Given, delta: Tensor, arith: Arithmetic) -> Tensor:
    """Error of each score [Hq, L, S] whose product is off by `delta`, the sink's at the end; zero where not visible.

    An additive mask is multiplied by log2 e, or not, and added: u·|b| and u·|s + b|. A narrower intermediate stores
    the mask, unless it is representable, and the sum.
    """
    u, narrow = unit(arith.accumulate), narrower(arith.intermediate, arith.accumulate)
    if given.bias is not None:
        bias = torch.where(torch.isneginf(given.bias), 0.0, given.bias)
        summed = torch.where(keys.visible, keys.scores, 0.0)[..., : bias.shape[-1]].abs()
        added = u * bias.abs() + (rounding(bias, arith.intermediate) if narrow else 0)
        added = delta + added + u * (summed + delta + added)
        delta = torch.where(bias == 0, delta, added + (storing(summed + added, arith.intermediate) if narrow else 0))
    if given.sinks is not None:
        sink = u * given.sinks.abs()
        if narrow:
            sink = sink + rounding(given.sinks, arith.intermediate)
        delta = torch.cat([delta, sink[:, None, None].expand_as(delta[..., :1])], dim=-1)
    return torch.where(keys.visible, delta, 0.0)
