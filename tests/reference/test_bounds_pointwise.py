"""Bounds of RMSNorm, RoPE and SwiGLU: honest code is inside, one rounding too many is outside."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reference import bounds, ops
from reference.arithmetic import Arithmetic, round_to
from tests.reference.honest import DTYPES, STYLES, Style, excess, rms_norm, rope, rounded, swiglu

BETWEEN = {"float32": "bfloat16", "float16": "bfloat16", "bfloat16": "float16"}
HALF = {"float32": "bfloat16", "float16": "float16", "bfloat16": "bfloat16"}


def rows(kind: str, shape: tuple[int, ...], dtype: str, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    if kind == "peaked":
        x[..., ::13] *= 1000
    elif kind == "x30":
        x = x * 30
    elif kind == "tiny":
        x = x * {"float16": 1e-6, "bfloat16": 1e-37, "float32": 1e-37}[dtype]
    elif kind == "huge":
        x = x * {"float16": 1e4, "bfloat16": 1e18, "float32": 1e18}[dtype]
    elif kind == "constant":
        x = torch.full_like(x, 0.3)
    elif kind == "flat":  # nearly constant: a constant row itself may happen to need no rounding
        x = 0.3 + 0.01 * x
    elif kind == "zero":
        x = 0 * x
    return rounded(x, dtype)


KINDS = ("normal", "peaked", "x30", "tiny", "huge", "constant", "zero")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_honest_rms_norm_is_inside(kind: str, dtype: str) -> None:
    for seed, size in enumerate((1, 3, 64, 300)):
        x = rows(kind, (7, size), dtype, seed)
        weight = rows(("normal", "x30")[seed % 2], (size,), dtype, 100 + seed)
        for stored in (False, True):
            for eps in (1e-6, 1e-3):
                arith = Arithmetic.claim(dtype, intermediate="input" if stored else "float32")
                result = bounds.rms_norm(x, weight, eps, arith)
                for style in STYLES:
                    actual = rms_norm(x, weight, eps, dtype, style, stored)
                    assert excess(actual, result).max() <= 1, (size, eps, stored, style)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "peaked", "flat"])
def test_a_rounding_too_many_in_rms_norm_is_outside(kind: str, dtype: str) -> None:
    x, weight = rows(kind, (16, 128), dtype, 1), rows("normal", (128,), dtype, 2)
    plain = bounds.rms_norm(x, weight, 1e-6, Arithmetic.claim(dtype))
    low = HALF[dtype]
    normal = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
    faults = {
        "normalised": round_to(normal, low) * weight,
        "power": x * round_to(torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * 1.003, low) / 1.003 * weight,
        "output": round_to((normal * weight).float().double(), BETWEEN[dtype]),
        "unit weight": normal * (weight + 1),
    }
    for name, actual in faults.items():
        assert excess(actual.to(DTYPES[dtype]), plain).max() > 1.04, name
    # Squares that are summed in half: sequential sums of 128 terms lose several of its ulps.
    half = rms_norm(x, weight, 1e-6, dtype, Style(accumulate=DTYPES[low]))
    if not (
        kind == "peaked" and dtype == "float16"
    ):  # their squares overflow float16, which no bound lets through either
        assert excess(half, plain).max() > 2
    else:
        assert excess(half, plain).max() >= 1
    stored = bounds.rms_norm(x, weight, 1e-6, Arithmetic.claim(dtype, intermediate="input"))
    assert excess(half, stored).max() > 1.2


def test_rms_norm_epsilon_counts_when_the_row_is_small() -> None:
    x, weight = rows("normal", (8, 64), "float32", 0) * 2**-10, torch.ones(64).double()
    result = bounds.rms_norm(x, weight, 1e-6, Arithmetic.claim("float32"))
    assert excess(rms_norm(x, weight, 1e-6, "float32", Style()), result).max() <= 1
    assert excess(rms_norm(x, weight, 1e-5, "float32", Style()), result).max() > 1e3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "x30", "tiny", "constant"])
def test_honest_rope_is_inside(kind: str, dtype: str) -> None:
    for seed, (size, base) in enumerate([(2, 1e4), (64, 1e4), (48, 5e5), (128, 1e6), (80, 100.0)]):
        positions = torch.tensor([0, 1, 2, 255, 257, 4000, 40001, 1_000_003])
        x = rows(kind, (len(positions), 2, size), dtype, seed)
        for stored in (False, True):
            arith = Arithmetic.claim(dtype, intermediate="input" if stored else "float32")
            result = bounds.rope(x, positions, base, arith)
            assert (result.bound[0] <= 1e-2 * (1 + x[0].abs())).all()
            for style in STYLES:
                actual = rope(x, positions, base, dtype, style, stored)
                assert excess(actual, result).max() <= 1, (size, base, stored, style)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "peaked", "flat"])
def test_a_rounding_too_many_in_rope_is_outside(kind: str, dtype: str) -> None:
    positions = torch.tensor([0, 3, 29, 300, 511])
    x = rows(kind, (5, 4, 64), dtype, 3)
    plain = bounds.rope(x, positions, 1e4, Arithmetic.claim(dtype))
    stored = bounds.rope(x, positions, 1e4, Arithmetic.claim(dtype, intermediate="input"))
    low = HALF[dtype]
    angles = ops.rope_angles(positions, 64, 1e4)[:, None]
    a, b = x.chunk(2, -1)

    def turned(cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    table = turned(round_to(angles.cos(), low), round_to(angles.sin(), low))
    assert excess(table.to(DTYPES[dtype]), plain).max() > 1.2
    narrow = turned(round_to(angles, low).cos(), round_to(angles, low).sin())  # ml-explore/mlx#2792: angles in half
    assert excess(narrow.to(DTYPES[dtype]), plain).max() > 100
    assert excess(narrow.to(DTYPES[dtype]), stored).max() > 10
    between = round_to(turned(angles.cos(), angles.sin()).float().double(), BETWEEN[dtype])
    assert excess(between.to(DTYPES[dtype]), plain).max() > 1.04
    assert excess(ops.rope(x, positions + 1, 1e4).to(DTYPES[dtype]), stored).max() > 100
    interleaved = ops.rope(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), positions, 1e4)
    interleaved = interleaved.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    assert excess(interleaved.to(DTYPES[dtype]), stored).max() > 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_honest_swiglu_is_inside(kind: str, dtype: str) -> None:
    for seed, size in enumerate((1, 40, 300)):
        gate, up = rows(kind, (6, size), dtype, seed), rows("normal", (6, size), dtype, 50 + seed)
        up[0] *= 64
        for stored in (False, True):
            for limit in (None, 7.0):
                arith = Arithmetic.claim(dtype, intermediate="input" if stored else "float32")
                result = bounds.swiglu(gate, up, limit, arith)
                for style in STYLES:
                    actual = swiglu(gate, up, limit, dtype, style, stored)
                    assert excess(actual, result).max() <= 1, (size, limit, stored, style)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "x30", "flat"])
def test_a_rounding_too_many_in_swiglu_is_outside(kind: str, dtype: str) -> None:
    gate, up = rows(kind, (64, 64), dtype, 5), rows("normal", (64, 64), dtype, 6)
    plain = bounds.swiglu(gate, up, 7.0, Arithmetic.claim(dtype))
    stored = bounds.swiglu(gate, up, 7.0, Arithmetic.claim(dtype, intermediate="input"))
    low, g, v = HALF[dtype], gate.clamp(max=7.0), up.clamp(-7, 7)
    faults = {
        "sigmoid": g * round_to(torch.sigmoid(g), low) * v,
        "silu": round_to(ops.silu(g), low) * v,
        "output": round_to((ops.silu(g) * v).float().double(), BETWEEN[dtype]),
    }
    for name, actual in faults.items():
        assert excess(actual.to(DTYPES[dtype]), plain).max() > 1.04, name
    # All of 1/(1 + exp(−g)) in half is what a stored intermediate may be, as mx.sigmoid computes it for half inputs.
    exponential = round_to(1 + round_to(torch.exp(-g), low), low)
    halved = excess((round_to(g * round_to(1 / exponential, low), low) * v).to(DTYPES[dtype]), stored).max()
    assert halved > 1.005 if dtype == "float32" else halved <= 1
    if kind == "x30" and dtype != "float16":  # the argument g·log2(e) is never stored; in float16 exp overflows first
        exponential = 1 + torch.exp2(round_to(-g * math.log2(math.e), low))
        assert excess((g / exponential * v).to(DTYPES[dtype]), stored).max() > 1.5
    if kind == "x30":
        assert excess(ops.swiglu(gate, up, None).to(DTYPES[dtype]), stored).max() > 100  # the limit is not applied
    assert excess((g * torch.sigmoid(1.702 * g) * v).to(DTYPES[dtype]), stored).max() > 1.5  # gelu's approximation


@pytest.mark.parametrize("dtype", DTYPES)
def test_tightness_of_pointwise_ops(dtype: str) -> None:
    """Honest errors fill a good part of each bound: one loosened much would fail here."""
    x, weight, up = rows("normal", (30, 4), dtype, 1), rows("normal", (4,), dtype, 2), rows("normal", (30, 4), dtype, 3)
    arith = Arithmetic.claim(dtype)
    # In float32 a sloppy exponential, quotient or root hardly ever err most at once.
    least = 0.9 if dtype != "float32" else 0.28
    sloppy = [style for style in STYLES if style.sloppy]
    norm, gated = bounds.rms_norm(x, weight, 1e-6, arith), bounds.swiglu(x, up, None, arith)
    assert max(excess(rms_norm(x, weight, 1e-6, dtype, s), norm).max() for s in sloppy) > least
    assert max(excess(swiglu(x, up, None, dtype, s), gated).max() for s in sloppy) > least
