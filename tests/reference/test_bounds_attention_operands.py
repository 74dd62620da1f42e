"""Bounds of attention with additive masks and with quantised keys and values: honest code inside, faults outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reference import bounds
from reference.arithmetic import Arithmetic, round_to
from tests.reference.honest import DTYPES, STYLES, Style, excess, flash, rounded, unfused
from tests.reference.test_bounds_attention import Case, case

FILLS = ("biases", "mixed", "lowest", "large", "shifted")
HALF_CLAIMS = {"operand": "input", "intermediate": "input"}


def additive(fill: str, c: Case, dtype: str, seed: int) -> Tensor:
    """An additive mask [Hq, L, S] of one kind, exact in `dtype`; every query sees its last key."""
    g = torch.Generator().manual_seed(seed)
    shape = (c.q.shape[0], c.q.shape[1], c.k.shape[1])
    biases = rounded(2 * torch.randn(shape, generator=g, dtype=torch.float64), dtype)
    seen = torch.rand(shape, generator=g) < 0.5
    seen[..., -1] = True
    if fill == "biases":
        return biases
    if fill == "shifted":
        return torch.full(shape, -1024.0, dtype=torch.float64)
    hidden = {"mixed": -torch.inf, "lowest": torch.finfo(DTYPES[dtype]).min, "large": -1e4}[fill]
    values = biases if fill == "mixed" else torch.zeros_like(biases)
    return rounded(torch.where(seen, values, float(hidden)), dtype)


def bounded(c: Case, bias: Tensor, arith: Arithmetic) -> bounds.Bounded:
    return bounds.attention(c.q, c.k, c.v, c.scale, None, c.sinks, arith, bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", FILLS)
def test_honest_additive_masks_are_inside(fill: str, dtype: str) -> None:
    for seed, kind in enumerate(("normal", "peaked", "ties")):
        c = case(kind, dtype, seed, S=37, L=3, mask="all", sink=seed == 1)
        bias = additive(fill, c, dtype, seed)
        plain, stored = bounded(c, bias, Arithmetic.claim(dtype)), Arithmetic.claim(dtype, intermediate="input")
        for i, style in enumerate(STYLES[seed::3]):
            fused = flash(*c.arguments(), dtype, style, block=(1, 4, 32)[i % 3], splits=(1, 3)[i % 2], bias=bias)
            assert excess(fused, plain).max() <= 1, (kind, style)
            steps = unfused(*c.arguments(), dtype, style, where=("q", "s", "log2")[i % 3], bias=bias)
            assert excess(steps, plain).max() <= 1, (kind, style)
            if dtype != "float32":
                low = unfused(*c.arguments(), dtype, style, stored=True, bias=bias)
                assert excess(low, bounded(c, bias, stored)).max() <= 1, (kind, style)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_hidden_by_large_numbers_cost_nothing(dtype: str) -> None:
    """A key at −1e4 or at the least number has no weight in any arithmetic: the bound is that of a bool mask."""
    c = case("normal", dtype, 4, S=33, L=3, mask="all")
    arith = Arithmetic.claim(dtype, **({} if dtype == "float32" else HALF_CLAIMS))
    for fill in ("lowest", "large"):
        bias = additive(fill, c, dtype, 4)
        masked = bounds.attention(c.q, c.k, c.v, c.scale, bias == 0, None, arith)
        found = bounded(c, bias, arith)
        assert torch.equal(found.expected, masked.expected)
        assert (found.bound <= masked.bound * (1 + 1e-12)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_least_numbers_may_be_any_mean_but_not_nan(dtype: str) -> None:
    c = case("normal", dtype, 5, S=9, L=2, mask="all")
    bias = torch.full((4, 2, 9), float(torch.finfo(DTYPES[dtype]).min), dtype=torch.float64)
    result = bounded(c, bias, Arithmetic.claim(dtype, **({} if dtype == "float32" else HALF_CLAIMS)))
    mean = torch.repeat_interleave(c.v, 2, dim=0).mean(1, keepdim=True).expand(-1, 2, -1)
    assert excess(mean, result).max() <= 1
    assert excess(c.v.repeat_interleave(2, dim=0)[:, :1].expand_as(mean), result).max() <= 1
    assert excess(mean * torch.nan, result).min() > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_that_is_rounded_or_scaled_is_outside(dtype: str) -> None:
    c = case("normal", dtype, 6, S=33, L=4, mask="all")
    bias = additive("biases", c, dtype, 6)
    result = bounded(c, bias, Arithmetic.claim(dtype))
    for wrong in (round_to(bias, "bfloat16") if dtype != "bfloat16" else bias * 1.02, bias * c.scale, bias * 0):
        assert excess(unfused(*c.arguments(), dtype, Style(), bias=wrong), result).max() > 1.05


def test_without_the_likely_level_the_bound_stays() -> None:
    c = case("normal", "float16", 7)
    arith = Arithmetic.claim("float16")
    whole = c.bounded(arith)
    half = bounds.attention(*c.arguments(), arith, likely=False)
    assert torch.equal(half.likely, half.bound)
    # Some processors add a float64 product's terms in another order at another time: 33 keys here, none negative.
    torch.testing.assert_close(half.bound, whole.bound, rtol=33 * 2.0**-53, atol=0)


def packed(c: Case, dtype: str, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Codes, scales and biases of keys and values of c's shapes (groups of 4), exact in `dtype`."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for x in (c.k, c.v):
        grouped = (*x.shape[:-1], x.shape[-1] // 4)
        codes = torch.randint(0, 16, (*grouped, 4), generator=g).double()
        scale = rounded(0.2 * (torch.rand(*grouped, 1, generator=g).double() + 0.2), dtype)
        bias = rounded(-7 * scale + 0.3 * torch.randn(*grouped, 1, generator=g, dtype=torch.float64), dtype)
        found.append({"codes": codes, "scale": scale, "bias": bias})
    return found[0], found[1]


def exact(part: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    product = part["scale"] * part["codes"]
    return (product + part["bias"]).flatten(-2), (product.abs() + part["bias"].abs()).flatten(-2)


def formed(part: dict[str, Tensor], dtype: str) -> Tensor:
    """The numbers as a kernel makes them in `dtype`: both steps round."""
    product = (part["scale"] * part["codes"]).to(DTYPES[dtype])
    return (product + part["bias"].to(DTYPES[dtype])).flatten(-2).double()


@pytest.mark.parametrize("dtype", DTYPES)
def test_honest_quantised_attention_is_inside(dtype: str) -> None:
    for seed in range(3):
        c = case("normal", dtype, seed, S=29, L=3, Dh=16, Dv=12, sink=seed == 1)
        keys, values = packed(c, dtype, seed)
        (k, abs_k), (v, abs_v) = exact(keys), exact(values)
        rest = (c.scale, c.mask, c.sinks)
        for claims in ({}, HALF_CLAIMS):
            arith = Arithmetic.claim(dtype, **({} if dtype == "float32" else claims))
            result = bounds.attention(c.q, k, v, *rest, arith, abs_k=abs_k, abs_v=abs_v)
            made = dtype if claims and dtype != "float32" else "float32"
            for style in STYLES[seed::3]:
                actual = unfused(c.q, formed(keys, made), formed(values, made), *rest, dtype, style)
                assert excess(actual, result).max() <= 1, (style, made)
                fused = flash(c.q, formed(keys, made), formed(values, made), *rest, dtype, style, splits=2)
                assert excess(fused, result).max() <= 1, (style, made)


@pytest.mark.parametrize("dtype", DTYPES)
def test_faults_of_quantised_attention_are_outside(dtype: str) -> None:
    c = case("normal", dtype, 2, S=29, L=3, Dh=16, Dv=12)
    keys, values = packed(c, dtype, 2)
    (k, abs_k), (v, abs_v) = exact(keys), exact(values)
    arith = Arithmetic.claim(dtype, **({} if dtype == "float32" else HALF_CLAIMS))
    result = bounds.attention(c.q, k, v, c.scale, c.mask, None, arith, abs_k=abs_k, abs_v=abs_v)
    faults = {
        "keys without biases": (exact({**keys, "bias": 0 * keys["bias"]})[0], v),
        "values without biases": (k, exact({**values, "bias": 0 * values["bias"]})[0]),
        "another group's scales": (k, exact({**values, "scale": values["scale"].roll(1, dims=-2)})[0]),
        "codes off by one": (k, exact({**values, "codes": (values["codes"] - 1).clamp(min=0)})[0]),
    }
    for name, (wrong_k, wrong_v) in faults.items():
        actual = unfused(c.q, wrong_k, wrong_v, c.scale, c.mask, None, dtype, Style())
        assert excess(actual, result).max() > 1.05, name
