"""Bounds of inner products and sums: linear layers, matrix products, the MoE combine, residual additions."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.arithmetic import UNIT_ROUNDOFF, Arithmetic
from reference.bounds.core import (
    Bounded,
    Count,
    bounded,
    flushed,
    largest_partial,
    narrower,
    overflow,
    products_exact,
    rounding,
    storing,
    summation,
    underflow,
    unit,
)


def linear(x: Tensor, w: Tensor, arith: Arithmetic, abs_w: Tensor | None = None, factors: int = 0) -> Bounded:
    """x [..., k], w [m, k] -> x @ wᵀ [..., m] with its bound; see `matmul`.

    abs_w [m, k] ≥ |w| is for weights that are themselves a sum w = scale·code + bias the kernel may form or distribute
    over the product: pass |scale·code| + |bias|. Then there are 2k terms, x·scale·code and x·bias. A term takes up to
    three roundings besides additions (code·x or scale·code; ·scale or ·x; of w itself), and every order of adding, with
    scales applied to terms or to the partial sums of a group, has 2k − 1 additions of subsets of those terms. A weight
    made in the operand dtype is rounded twice there, the product and the sum; where scale is a product itself, its
    `factors` were rounded before, each u of what they make.
    """
    flat = x.reshape(-1, x.shape[-1])
    result = matmul(flat, w.T, arith) if abs_w is None else _distributed(flat, w.T, abs_w.T, arith, factors)
    shape = (*x.shape[:-1], w.shape[0])
    return Bounded(
        expected=result.expected.reshape(shape), bound=result.bound.reshape(shape), likely=result.likely.reshape(shape)
    )


def matmul(a: Tensor, b: Tensor, arith: Arithmetic) -> Bounded:
    """a [..., m, k], b [..., k, n] -> a @ b with its bound.

    n counts the terms of which neither factor is zero: products with zero and additions of zero are exact. Any order of
    adding has n − 1 additions, each of a subset sum, which is at most M = (Σ|a||b| + |a·b|)/2; products add u·Σ|a||b|
    unless they are exact in the accumulator (two float16, bfloat16 or tf32 factors in float32). The error E then
    satisfies E ≤ u·Σ|a||b| + (n−1)·u·(M + E), so E ≤ γₙ₋₁·(M + uΣ|a||b|) + uΣ|a||b| (Higham §3.1; M instead of
    Σ|a||b| is at most half, for sums that cancel). Rounding operands to a narrower dtype changes |a||b| by
    (|a|+Δa)(|b|+Δb) − |a||b|, with the Δ of each element: what is representable is not rounded.
    """
    expected = a @ b
    absolute = a.abs() @ b.abs()
    n = _terms(a, b)
    slack = _flushes(a, b, n, arith)
    return _inner(expected, absolute, n - 1, _operands(a, b, absolute, arith), slack, arith, products_exact(arith))


def _terms(a: Tensor, b: Tensor) -> Tensor:
    """Number of terms of each inner product without a zero factor; at least one. float32 counts exactly up to 2²⁴."""
    if bool((a != 0).all()) and bool((b != 0).all()):
        return torch.full((), float(max(a.shape[-1], 1)), dtype=torch.float64)
    return ((a != 0).float() @ (b != 0).float()).double().clamp(min=1)


def _flushes(a: Tensor, b: Tensor, n: Tensor, arith: Arithmetic) -> Tensor:
    """Flushing: each of n products and n additions loses up to η, a flushed operand η times its partner."""
    eta = underflow(arith)
    return eta * (2 * n + a.abs().sum(-1, keepdim=True) + b.abs().sum(-2, keepdim=True))


def _operands(a: Tensor, b: Tensor, absolute: Tensor, arith: Arithmetic) -> Tensor | None:
    """Change of Σ|a||b| when the operands are rounded to arith.operand, or None when that rounds nothing."""
    if arith.operand is None or not narrower(arith.operand, arith.dtype):
        return None
    widened = (a.abs() + rounding(a, arith.operand)) @ (b.abs() + rounding(b, arith.operand))
    return (widened - absolute).clamp(min=0)


def _inner(
    expected: Tensor,
    absolute: Tensor,
    additions: Tensor,
    operands: Tensor | None,
    slack: Tensor,
    arith: Arithmetic,
    exact_products: bool,
    leaf_roundings: float = 1.0,
) -> Bounded:
    """Bound of a sum with Σ|terms| = absolute, each term rounded leaf_roundings times unless exact, then added."""
    # Factors whose products are exact go through matrix units, which truncate their sums: an ulp, not half of one. Seen
    # on an NVIDIA H200: −1.359375·−23.625 + 0.00537109375·0.0361328125 in TF32 is 1.74 times off what rounding allows.
    u = unit(arith.accumulate) * (2 if exact_products else 1)
    slack = torch.where(absolute == 0, 0.0, slack)  # nothing but zeros was multiplied
    widened = absolute if operands is None else absolute + operands
    leaves = torch.zeros_like(absolute) if exact_products else leaf_roundings * u * (1 + u) ** 2 * widened
    partial = largest_partial(widened, expected.abs() + (0 if operands is None else operands)) + leaves

    def error(count: Count) -> Tensor:
        total = summation(count(additions), partial, u) + leaves + slack + overflow(partial, arith.accumulate)
        # float64's own summation, in whatever order it took.
        total = total + summation(count(additions + 1), absolute, unit("float64"))
        return total if operands is None else total + operands

    return bounded(expected, error, arith)


def _distributed(a: Tensor, b: Tensor, abs_b: Tensor, arith: Arithmetic, factors: int) -> Bounded:
    """As matmul, for b whose elements are sums of two terms with absolute values adding up to abs_b; see `linear`."""
    expected = a @ b
    absolute = a.abs() @ abs_b
    n = _terms(a, abs_b)
    operands = None
    if arith.operand is not None:
        # The product scale·code and its sum with the bias are each rounded to the operand dtype, at no more than abs_b.
        made = abs_b * (1 + unit(arith.operand)) ** factors
        for _ in ("product", "sum"):
            made = made + storing(made, arith.operand)
        narrowed = rounding(a, arith.operand) if narrower(arith.operand, arith.dtype) else torch.zeros_like(a)
        operands = ((a.abs() + narrowed) @ made - absolute).clamp(min=0)
    if narrower(arith.intermediate, arith.accumulate):
        # Each product of x and a dequantised weight is stored before it is added (seen in MLX's CUDA qmv kernels).
        products = unit(arith.intermediate) * (absolute if operands is None else absolute + operands)
        operands = products if operands is None else operands + products
    slack = 3 * _flushes(a, abs_b, n, arith)
    return _inner(expected, absolute, 2 * n - 1, operands, slack, arith, False, leaf_roundings=3.0)


def add(a: Tensor, b: Tensor, arith: Arithmetic) -> Bounded:
    """a, b [...] -> a + b with its bound: one addition in the accumulator and the store.

    When the output is as wide as the accumulator the addition is the store, and costs half an ulp.
    """
    expected = a + b
    one_rounding = not narrower(arith.output, arith.accumulate)
    u = UNIT_ROUNDOFF["float64"] if one_rounding else unit(arith.accumulate)
    error = u * expected.abs() + flushed(a, arith) + flushed(b, arith)
    return bounded(expected, lambda count: error, arith, exact=one_rounding)


def weighted_sum(values: Tensor, weights: Tensor, extra: Tensor | None, arith: Arithmetic) -> Bounded:
    """values [T, K, D], weights [T, K], extra [T, D] or None -> Σₖ wₖ·vₖ + extra [T, D] with its bound.

    An inner product of K terms and, exact, one more: K products rounded (weights are float32), as many additions as
    there are terms less one. A narrower intermediate stores the weights, each product, and the sum before extra is
    added.
    """
    products = values * weights[..., None]
    absolute, routed = products.abs().sum(dim=1), products.sum(dim=1)
    n = (products != 0).sum(dim=1).double()
    stores: Tensor | None = None
    if narrower(arith.intermediate, arith.accumulate):
        weight = rounding(weights, arith.intermediate)[..., None] * values.abs()
        stores = (weight + storing(products.abs() + weight, arith.intermediate)).sum(dim=1)
        if extra is not None:
            summed = summation(n, absolute + stores, unit(arith.accumulate))
            stores = stores + storing(routed.abs() + stores + summed, arith.intermediate)
    slack = underflow(arith) * (2 * n + values.abs().sum(1) + weights.abs().sum(1, keepdim=True))
    if extra is not None:
        routed, absolute, n = routed + extra, absolute + extra.abs(), n + (extra != 0)
        slack = slack + flushed(extra, arith)
    return _inner(routed, absolute, (n - 1).clamp(min=0), stores, slack, arith, False)
