"""Math of the shim: floating-point functions against NumPy in float64, integer functions against Python's integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.engine.metal.shim_module import call, load, source

Array = np.ndarray[Any, Any]
# libm's float functions stay within 1 ULP of the exact value; compositions (exp10, sinpi, rsqrt) within 2.
ULPS = 2.0


def run(name: str, *arrays: Array) -> Array:
    out = np.empty_like(arrays[0])
    call(load(source("math.cpp")), name, *arrays, out, out.size)
    return out


def exact(name: str, x: Array) -> Array:
    special: dict[str, Any] = {
        "exp10": lambda v: 10.0**v, "sinpi": lambda v: np.sin(np.pi * np.remainder(v, 2)),
        "cospi": lambda v: np.cos(np.pi * np.remainder(v, 2)), "rsqrt": lambda v: 1 / np.sqrt(v),
        "round": lambda v: np.trunc(v + np.copysign(0.5, v)), "fract": lambda v: v - np.floor(v),
        "saturate": lambda v: np.clip(v, 0, 1), "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan,
        "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh,
    }  # fmt: skip
    function: Any = special.get(name) or getattr(np, name)
    result: Array = function(x.astype(np.float64))
    return result


ONE = [
    "exp", "exp2", "exp10", "log", "log2", "log10", "sin", "cos", "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan",
    "asinh", "acosh", "atanh", "sinpi", "cospi", "sqrt", "rsqrt", "ceil", "floor", "trunc", "rint", "round", "fract",
    "fabs", "abs", "sign", "saturate",
]  # fmt: skip

POSITIVE = (1e-6, 1e6)
DOMAINS = {
    "log": POSITIVE, "log2": POSITIVE, "log10": POSITIVE, "sqrt": POSITIVE, "rsqrt": POSITIVE,
    "asin": (-1, 1), "acos": (-1, 1), "atanh": (-0.99, 0.99), "acosh": (1, 100),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE)
def test_functions_of_one_argument(name: str) -> None:
    rng = np.random.default_rng(6)
    low, high = DOMAINS.get(name, (-20, 20))
    x = rng.uniform(low, high, 2000).astype(np.float32)
    expected = exact(name, x)
    spacing = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    # sin(pi x) near an integer x is as exact as pi in double: an absolute error of 2^-50 counts.
    allowed = ULPS * spacing + (2.0**-50 if name in ("sinpi", "cospi") else 0)
    assert np.all(np.abs(run(f"float_{name}", x).astype(np.float64) - expected) <= allowed)
    assert np.array_equal(run(f"vec_{name}", x).view(np.uint32), run(f"float_{name}", x).view(np.uint32))
    with np.errstate(all="ignore"):
        h = x.astype(np.float16)
        rounded = exact(name, h).astype(np.float16)
    assert np.all(np.abs(steps(run(f"half_{name}", h)) - steps(rounded)) <= 1)


def steps(h: Array) -> Array:
    """Half-precision values as integers that count representable values from 0 (both zeros are 0)."""
    bits = h.view(np.uint16).astype(int)
    return np.where(bits & 0x8000, -(bits & 0x7FFF), bits)


def test_functions_of_two_arguments() -> None:
    rng = np.random.default_rng(7)
    x, y = (rng.uniform(-9, 9, 1000).astype(np.float32) for _ in range(2))
    positive = np.abs(x) + np.float32(0.5)
    assert np.array_equal(run("float_fmod", x, y), np.fmod(x, y))
    assert np.array_equal(run("float_copysign", x, y), np.copysign(x, y))
    assert np.array_equal(run("float_nextafter", x, y), np.nextafter(x, y))
    assert np.array_equal(run("float_fdim", x, y), np.maximum(x - y, 0))
    assert np.array_equal(run("float_step", x, y), np.where(y < x, 0, 1))
    for name, a, function in (("pow", positive, np.power), ("powr", positive, np.power), ("atan2", x, np.arctan2)):
        expected = function(a.astype(np.float64), y.astype(np.float64))
        allowed = ULPS * np.spacing(np.abs(expected).astype(np.float32))
        assert np.all(np.abs(run(f"float_{name}", a, y) - expected) <= allowed)


def test_minimum_and_maximum_ignore_nan() -> None:
    x = np.array([np.nan, 1, np.nan, -2, np.inf], np.float32)
    y = np.array([3, np.nan, np.nan, 5, -np.inf], np.float32)
    for low, high in (("float_min", "float_max"), ("float_fmin", "float_fmax")):
        assert np.array_equal(run(low, x, y), np.fmin(x, y), equal_nan=True)
        assert np.array_equal(run(high, x, y), np.fmax(x, y), equal_nan=True)


def test_the_rest_of_the_floating_point_functions() -> None:
    out = np.zeros(23, np.float32)
    call(load(source("math.cpp")), "rest", np.array([2.75], np.float32), out)
    expected = [
        0.6875, 2, 0.75, 2, np.sin(2.75), np.cos(2.75), 22, 1, 1.5, 0.15625, 1, 4,
        2.75, 2, 32, 5, 0.8, 1, 5, 1, 8.5625, 0, 1,
    ]  # fmt: skip
    np.testing.assert_allclose(out, expected, rtol=3e-7)


def integers(a: int, b: int, c: int, bits: int, signed: bool) -> list[int]:
    """What MSL says of one triple, in the order of shim/math.cpp."""
    mask = (1 << bits) - 1
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, mask)
    u = a & mask
    turn = (b & mask) % bits

    def saturate(value: int) -> int:
        return min(max(value, low), high)

    field = (u >> 3) & 15
    trailing = bits if u == 0 else (u & -u).bit_length() - 1
    return [
        u.bit_count(), bits - u.bit_length(), trailing, int(f"{u:0{bits}b}"[::-1], 2),
        (u << turn | u >> (bits - turn)) & mask, (a * b) >> bits, saturate(a + b), saturate(a - b),
        (a + b) >> 1, (a + b + 1) >> 1, ((a * b) >> bits) + c, saturate(a * b + c), abs(a - b),
        field - 16 if signed and field & 8 else field,
        (u & ~(31 << 2)) | (b & 31) << 2, min(max(a, -5 if signed else (-5 & mask)), 9),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["char", "uchar", "short", "ushort", "int", "uint", "long", "ulong"])
def test_integer_functions(name: str) -> None:
    bits = {"char": 8, "short": 16, "int": 32, "long": 64}[name.removeprefix("u")]
    signed = not name.startswith("u")
    kind = np.dtype(f"{'i' if signed else 'u'}{bits // 8}")
    info = np.iinfo(kind)
    rng = np.random.default_rng(8)
    a, b, c = (rng.integers(info.min, info.max, 300, dtype=kind, endpoint=True) for _ in range(3))
    a[:6], b[:6] = [0, 1, info.max, info.min, info.max, info.min], [0, info.max, info.max, info.min, info.min, info.max]
    out = np.zeros((300, 16), dtype=kind)
    call(load(source("math.cpp")), f"{name}_integers", a, b, c, out, 300)
    mask = (1 << bits) - 1
    for i in range(300):
        expected = [v & mask for v in integers(int(a[i]), int(b[i]), int(c[i]), bits, signed)]
        assert [int(v) & mask for v in out[i]] == expected, (a[i], b[i], c[i])
