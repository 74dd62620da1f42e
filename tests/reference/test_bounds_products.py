"""Bounds of linear, matmul, the MoE combine and additions: honest code is inside, one rounding too many is outside."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reference import bounds
from reference.arithmetic import Arithmetic, round_to
from tests.reference.honest import DTYPES, STYLES, Style, dot, excess, flush, linear, rounded, total

KINDS = ("normal", "positive", "cancelling", "peaked", "sparse", "huge", "tiny", "constant")


def operands(kind: str, rows: int, k: int, columns: int, dtype: str, seed: int) -> tuple[Tensor, Tensor]:
    """x [rows, k], w [columns, k] of one kind of trouble, rounded to dtype."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=g, dtype=torch.float64)
    w = torch.randn(columns, k, generator=g, dtype=torch.float64)
    if kind == "positive":
        x, w = x.abs(), w.abs()
    elif kind == "cancelling":  # the second half takes back what the first half gave, but for a little
        half = k // 2
        x[:, half : 2 * half] = x[:, :half]
        w[:, half : 2 * half] = -w[:, :half] * (1 + 1e-3 * torch.randn(columns, half, generator=g, dtype=torch.float64))
    elif kind == "peaked":
        x[:, ::17] *= 1000
    elif kind == "sparse":
        x = x * (torch.rand(rows, k, generator=g) < 0.05)
    elif kind == "huge":  # some outputs overflow
        x, w = x * 30, w * {"float16": 100, "bfloat16": 1e18, "float32": 1e18}[dtype]
    elif kind == "tiny":  # outputs are subnormal, or so are inputs
        x, w = (
            x * {"float16": 1e-6, "bfloat16": 1e-25, "float32": 1e-25}[dtype],
            w * (0.1 if dtype == "float16" else 1e-13),
        )
    elif kind == "constant":
        x, w = torch.full_like(x, 0.1), torch.full_like(w, 0.1)
    return rounded(x, dtype), rounded(w, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_honest_linear_is_inside_in_any_order(kind: str, dtype: str) -> None:
    for seed, k in enumerate((1, 2, 7, 64, 255)):
        x, w = operands(kind, 6, k, 9, dtype, seed)
        result = bounds.linear(x, w, Arithmetic.claim(dtype))
        for style in STYLES:
            assert excess(linear(x, w, dtype, style), result).max() <= 1, (k, style)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_honest_accumulation_in_half_is_inside_when_it_is_claimed(dtype: str) -> None:
    arith = Arithmetic.claim(dtype, accumulate="input")
    # Not "huge": a half accumulator that overflows on the way ends in NaN, which no bound excuses.
    for kind in ("normal", "positive", "cancelling", "tiny"):
        for k in (1, 7, 200):
            x, w = operands(kind, 6, k, 9, dtype, k)
            result = bounds.linear(x, w, arith)
            for style in STYLES[:9]:
                half = Style(order=style.order, fma=style.fma, accumulate=DTYPES[dtype])
                assert excess(linear(x, w, dtype, half), result).max() <= 1, (kind, k, half)


def test_a_bound_without_meaning_is_enormous_but_never_nan() -> None:
    x, w = operands("positive", 3, 300, 4, "bfloat16", 0)
    x[0] = 0
    result = bounds.linear(x, w, Arithmetic.claim("bfloat16", accumulate="input"))  # 300·2⁻⁸ > 1
    assert (result.bound[0] == 0).all()
    assert (result.bound[1:] > 1e30).all()
    assert (result.likely[1:] < 10 * result.expected[1:]).all()  # 6·√300·2⁻⁸ < 1


@pytest.mark.parametrize(("dtype", "operand"), [("float32", "tf32"), ("float32", "float16"), ("float16", "bfloat16")])
def test_claimed_operand_rounding_is_inside_and_unclaimed_outside(dtype: str, operand: str) -> None:
    for kind in ("normal", "cancelling", "peaked", "sparse"):
        x, w = operands(kind, 16, 64, 64, dtype, 5)
        for style in STYLES:
            actual = linear(round_to(x, operand), round_to(w, operand), dtype, style)
            assert excess(actual, bounds.linear(x, w, Arithmetic.claim(dtype, operand=operand))).max() <= 1, (
                kind,
                style,
            )
            assert excess(actual, bounds.linear(x, w, Arithmetic.claim(dtype))).max() > 2, (kind, style)


def test_an_operand_dtype_that_holds_the_inputs_changes_nothing() -> None:
    x, w = operands("normal", 8, 64, 8, "bfloat16", 1)
    plain = bounds.linear(x, w, Arithmetic.claim("bfloat16"))
    assert torch.equal(bounds.linear(x, w, Arithmetic.claim("bfloat16", operand="bfloat16")).bound, plain.bound)
    assert torch.equal(bounds.linear(x, w, Arithmetic.claim("bfloat16", operand="tf32")).bound, plain.bound)


# The widest format in use that is narrower than the input's; there is none below bfloat16.
NARROW = {"float32": "tf32", "float16": "bfloat16"}
BETWEEN = {"float32": "float16", "float16": "bfloat16", "bfloat16": "float16"}


def _half_partials(x: Tensor, w: Tensor, dtype: str) -> Tensor:
    """Split-K that parks each partial sum of 64 terms in `dtype`."""
    parts = [linear(a, b, dtype, Style()).float() for a, b in zip(x.split(64, 1), w.split(64, 1), strict=True)]
    return total(torch.stack(parts, -1), Style()).to(DTYPES[dtype])


FAULTS: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "operand": lambda x, w, d: linear(round_to(x, NARROW[d]), w, d, Style()),
    "accumulator": lambda x, w, d: linear(x, w, d, Style(accumulate=DTYPES[d] if d != "float32" else torch.float16)),
    "partials": lambda x, w, d: _half_partials(x, w, d if d != "float32" else "float16").to(DTYPES[d]),
    "output": lambda x, w, d: linear(x, w, "float32", Style()).to(DTYPES[BETWEEN[d]]).to(DTYPES[d]),
    "dropped term": lambda x, w, d: linear(x[:, :-1], w[:, :-1], d, Style()),
}


@pytest.mark.parametrize(("fault", "dtype"), [(f, d) for f in FAULTS for d in DTYPES if f != "operand" or d in NARROW])
@pytest.mark.parametrize("kind", ["normal", "positive", "peaked", "sparse"])
def test_a_rounding_too_many_in_linear_is_outside(kind: str, fault: str, dtype: str) -> None:
    x, w = operands(kind, 32, 256, 64, dtype, 11)
    assert excess(FAULTS[fault](x, w, dtype), bounds.linear(x, w, Arithmetic.claim(dtype))).max() > 1.05


def test_tightness_of_linear() -> None:
    """The widest honest error comes close to the bound: a bound loosened by half would fail here."""
    for dtype in DTYPES:
        x, w = operands("normal", 32, 2, 64, dtype, 3)
        assert excess(linear(x, w, dtype, Style()), bounds.linear(x, w, Arithmetic.claim(dtype))).max() > 0.8, dtype


def quantised(dtype: str, seed: int, k: int = 128, group: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [8, k], codes [16, k/group, group], scale and bias [16, k/group, 1], all exact in dtype."""
    g = torch.Generator().manual_seed(seed)
    x = rounded(torch.randn(8, k, generator=g, dtype=torch.float64), dtype)
    codes = torch.randint(0, 16, (16, k // group, group), generator=g).double()
    scale = rounded(0.01 * torch.rand(16, k // group, 1, generator=g).double() + 0.001, dtype)
    return x, codes, scale, rounded(-7.5 * scale, dtype)


def _grouped(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, style: Style) -> Tensor:
    """Σ_groups scale·(Σ x·code) + bias·Σx, float32."""
    groups = x.float().unflatten(1, codes.shape[1:])[:, None]
    inner, sums = dot(groups, codes.float()[None], style), total(groups, style)
    return total(torch.cat([inner * scale.float()[..., 0], bias.float()[..., 0] * sums], -1), style)


@pytest.mark.parametrize("dtype", DTYPES)
def test_affine_weights_may_be_formed_or_distributed(dtype: str) -> None:
    x, codes, scale, bias = quantised(dtype, 0)
    w, abs_w = (scale * codes + bias).flatten(1), (scale * codes + bias.abs()).flatten(1)
    result = bounds.linear(x, w, Arithmetic.claim(dtype), abs_w=abs_w)
    formed = (scale.float() * codes.float() + bias.float()).flatten(1)
    for style in STYLES:
        assert excess(dot(x.float()[:, None], formed[None], style).to(DTYPES[dtype]), result).max() <= 1, style
        assert excess(_grouped(x, codes, scale, bias, style).to(DTYPES[dtype]), result).max() <= 1, style


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_affine_weights_rounded_to_half_need_the_operand_claim(dtype: str) -> None:
    x, codes, scale, bias = quantised(dtype, 1)
    w, abs_w = (scale * codes + bias).flatten(1), (scale * codes + bias.abs()).flatten(1)
    once = rounded(w, dtype)
    twice = rounded(rounded(scale * codes, dtype) + bias, dtype).flatten(1)
    for weights in (once, twice):
        actual = linear(x, weights, dtype, Style())
        assert excess(actual, bounds.linear(x, w, Arithmetic.claim(dtype, operand="input"), abs_w=abs_w)).max() <= 1
    assert excess(linear(x, twice, dtype, Style()), bounds.linear(x, w, Arithmetic.claim(dtype), abs_w=abs_w)).max() > 2


def test_the_rounding_of_a_factor_is_allowed_only_when_it_is_said() -> None:
    """d·scale·code − min, each step stored in bfloat16: of many weights, some are rounded the same way throughout."""
    g = torch.Generator().manual_seed(0)
    d = round_to(1 + torch.rand(100_000, 1, generator=g, dtype=torch.float64), "float16")
    scale, code = (torch.randint(1, 64, d.shape, generator=g).double() for _ in range(2))
    least = round_to(torch.rand(d.shape, generator=g, dtype=torch.float64), "bfloat16")
    made = round_to(d, "bfloat16")
    for factor in (scale, code):
        made = round_to(made * factor, "bfloat16")
    made = round_to(made - least, "bfloat16")
    w, magnitude, one = d * scale * code - least, d * scale * code + least, torch.ones(1, 1, dtype=torch.float64)
    arith = Arithmetic.claim("bfloat16", operand="input", output="float32")
    unsaid, said = (bounds.linear(one, w, arith, magnitude, factors).bound for factors in (0, 2))
    error = (made - w).abs().T
    assert bool((error > unsaid).any())
    assert bool((error <= said).all())


def test_matmul_takes_batches_and_agrees_with_linear() -> None:
    x, w = operands("normal", 6, 33, 8, "float16", 2)
    arith = Arithmetic.claim("float16")
    batched = bounds.matmul(torch.stack([x, 2 * x]), w.T.expand(2, -1, -1), arith)
    assert torch.equal(batched.bound[0], bounds.linear(x, w, arith).bound)
    assert torch.equal(bounds.linear(x.unflatten(0, (2, 3)), w, arith).bound.flatten(0, 1), batched.bound[0])


def combine(values: Tensor, weights: Tensor, extra: Tensor | None, dtype: str, style: Style, stored: bool) -> Tensor:
    """The MoE combine, honestly; stored keeps weights, products and the routed sum in dtype."""

    def keep(x: Tensor) -> Tensor:
        return x.to(DTYPES[dtype]).float() if stored else x

    v, w = values.float().transpose(-1, -2), keep(weights.float())[:, None]
    routed = total(keep(v * w), style) if stored else dot(v, w, style)
    return (routed if extra is None else keep(routed) + extra.float()).to(DTYPES[dtype])


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_honest_combine_is_inside(dtype: str, stored: bool) -> None:
    arith = Arithmetic.claim(dtype, intermediate="input" if stored else "float32")
    for seed, size in enumerate((1e-6, 1.0, 30.0, 9000.0)):
        g = torch.Generator().manual_seed(seed)
        values = rounded(size * torch.randn(5, 6, 40, generator=g, dtype=torch.float64), dtype)
        weights = rounded(torch.rand(5, 6, generator=g, dtype=torch.float64), "float32")
        weights[0, 2:] = 0
        shared = rounded(size * torch.randn(5, 40, generator=g, dtype=torch.float64), dtype)
        for extra in (None, shared):
            result = bounds.weighted_sum(values, weights, extra, arith)
            for style in STYLES:
                actual = combine(values, weights, extra, dtype, style, stored)
                assert excess(actual, result).max() <= 1, (size, style, extra is None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rounding_too_many_in_the_combine_is_outside(dtype: str) -> None:
    g = torch.Generator().manual_seed(4)
    values = rounded(torch.randn(16, 6, 64, generator=g, dtype=torch.float64), dtype)
    weights = rounded(torch.rand(16, 6, generator=g, dtype=torch.float64), "float32")
    extra = rounded(torch.randn(16, 64, generator=g, dtype=torch.float64), dtype)
    result = bounds.weighted_sum(values, weights, extra, Arithmetic.claim(dtype))
    low = "bfloat16" if dtype == "float32" else dtype
    narrowed = combine(values, rounded(weights, low), extra, dtype, Style(), False)
    assert excess(narrowed, result).max() > 2
    products = (values * rounded(weights, "float32")[..., None]).to(DTYPES[low]).float()
    assert excess((products.sum(1) + extra.float()).to(DTYPES[dtype]), result).max() > 2
    routed = combine(values, weights, None, low, Style(), False).float()
    assert excess((routed + extra.float()).to(DTYPES[dtype]), result).max() > 1.5
    # All of it in half, which the claim of half intermediates allows, but for the sum's accumulator.
    stored = bounds.weighted_sum(values, weights, extra, Arithmetic.claim(dtype, intermediate="input"))
    unshared = combine(values, weights, None, dtype, Style(), True)
    assert excess(unshared, stored).max() > 10  # the shared expert is missing


@pytest.mark.parametrize("dtype", DTYPES)
def test_addition_errs_by_half_an_ulp(dtype: str) -> None:
    g = torch.Generator().manual_seed(1)
    for size in (1.0, 1e4, {"float16": 1e-7}.get(dtype, 1e-38)):
        a, b = (rounded(size * torch.randn(40, 50, generator=g, dtype=torch.float64), dtype) for _ in range(2))
        b[0] = -a[0]
        result = bounds.add(a, b, Arithmetic.claim(dtype))
        assert (result.bound[0] <= 2.0**-120).all()
        for style in (Style(), Style(flush=True)):
            actual = flush(flush(a.float(), style) + flush(b.float(), style), style).to(DTYPES[dtype])
            assert excess(actual, result).max() <= 1, size
        if size == 1.0:
            between = {"float32": "tf32", "float16": "bfloat16", "bfloat16": "float16"}[dtype]
            assert excess(rounded(round_to(a + b, between), dtype), result).max() > 1.05
            assert excess((a + b).to(DTYPES[dtype]), result).max() > 0.95


def test_store_of_an_overflow_allows_the_right_infinity_only() -> None:
    a = torch.tensor([65504.0, 65504.0, 65504.0, 60000.0]).double()
    b = torch.tensor([65504.0, 16.0, 15.0, 1.0]).double()
    result = bounds.add(a, b, Arithmetic.claim("float16"))
    assert torch.isinf(result.bound).tolist() == [True, True, False, False]
    assert excess((a + b).half(), result).max() <= 1
    assert excess(torch.tensor([-math.inf, math.nan, math.inf, math.inf]), result).min() > 1
