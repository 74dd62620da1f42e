"""half and bfloat of the shim against NumPy and ml_dtypes: every conversion, and rounding after every operation."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.engine.metal.shim_module import call, load, source

Array = np.ndarray[Any, Any]
BF16 = ml_dtypes.bfloat16
ALL16 = np.arange(65536, dtype=np.uint16)
TYPES: dict[str, Any] = {"half": np.float16, "bfloat": BF16}


def run(name: str, out: Any, *arrays: Array) -> Array:
    result = np.empty(arrays[0].size, dtype=out)
    call(load(source("scalars.cpp")), name, *map(np.ascontiguousarray, arrays), result, result.size)
    return result


def assert_same_bits(actual: Array, expected: Array) -> None:
    """Equal bit for bit, any NaN counting as any other."""
    bits = {2: np.uint16, 4: np.uint32}[expected.dtype.itemsize]
    nan = np.isnan(expected.astype(np.float32))
    assert np.array_equal(np.isnan(actual.astype(np.float32)), nan)
    assert np.array_equal(actual.view(bits)[~nan], expected.view(bits)[~nan])


def floats(count: int, seed: int) -> Array:
    """Floats of every exponent, with halfway cases of both 16-bit types and specials."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 32, count, dtype=np.uint32)
    bits[: count // 4] = bits[: count // 4] & 0xFFFF0000 | 0x8000
    bits[count // 4 : count // 2] = bits[count // 4 : count // 2] & 0xFFFFE000 | 0x1000
    near = rng.standard_normal(count // 8).astype(np.float32) * np.float32(1000)
    special = np.array(
        [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.996, 65520, 2**-24, 2**-25, 3.4e38, 1e-45], np.float32
    )
    return np.concatenate([bits.view(np.float32), near, special])


@pytest.mark.parametrize("other", ["half", "bfloat"])
def test_every_16_bit_value_widens_and_crosses_over(other: str) -> None:
    values = ALL16.view(TYPES[other])
    assert_same_bits(run(f"{other}_to_float", np.float32, values), values.astype(np.float32))
    crossing = "bfloat" if other == "half" else "half"
    with np.errstate(all="ignore"):
        expected = values.astype(np.float32).astype(TYPES[crossing])
    assert_same_bits(run(f"{other}_to_{crossing}", TYPES[crossing], values), expected)


@pytest.mark.parametrize("to", ["half", "bfloat"])
def test_float_rounds_to_nearest_even(to: str) -> None:
    values = floats(200_000, 1)
    with np.errstate(all="ignore"):
        assert_same_bits(run(f"float_to_{to}", TYPES[to], values), values.astype(TYPES[to]))


@pytest.mark.parametrize("name", ["short", "int", "uint", "long", "ulong"])
def test_integers_round_once_to_bfloat(name: str) -> None:
    kind: Any = {"short": np.int16, "int": np.int32, "uint": np.uint32, "long": np.int64, "ulong": np.uint64}[name]
    info = np.iinfo(kind)
    rng = np.random.default_rng(2)
    wide = rng.integers(info.min, info.max, 4000, dtype=kind, endpoint=True) >> rng.integers(0, 63, 4000).astype(
        kind
    ) % (8 * kind().itemsize)
    # A tie of bfloat plus one in the last place: rounding by way of float would lose the one.
    ties = np.array(
        [v for e in range(9, 62) for v in (2**e + 2 ** (e - 8) + 1, 2**e + 2 ** (e - 8)) if v <= info.max], kind
    )
    values = np.concatenate([wide.astype(kind), ties, np.array([info.min, info.max, 0, 1], kind)])
    actual = run(f"{name}_to_bfloat", BF16, values)
    assert [float(v) for v in actual] == [nearest(Fraction(int(v)), 8) for v in values]


def nearest(exact: Fraction, digits: int) -> float:
    """`exact` rounded to `digits` significant bits, ties to even (normal range only)."""
    if exact == 0:
        return 0.0
    magnitude, exponent = abs(exact), 0
    while magnitude >= 1 << digits:
        magnitude, exponent = magnitude / 2, exponent + 1
    while magnitude < 1 << (digits - 1):
        magnitude, exponent = magnitude * 2, exponent - 1
    return float(round(magnitude) * Fraction(2) ** exponent) * (-1 if exact < 0 else 1)


def test_bfloat_to_integers_truncates() -> None:
    values = np.array([0.99, -0.99, 1.5, -1.5, 200.0, 255.0, 1e6, -(2.0**30)], np.float32).astype(BF16)
    assert np.array_equal(run("bfloat_to_int", np.int32, values), values.astype(np.float32).astype(np.int32))
    assert np.array_equal(run("bfloat_to_uchar", np.uint8, values[4:6]), np.array([200, 255], np.uint8))


def test_integers_to_half() -> None:
    values = np.arange(-70000, 70000, 7, dtype=np.int32)
    with np.errstate(over="ignore"):
        assert_same_bits(run("int_to_half", np.float16, values), values.astype(np.float16))


@pytest.mark.parametrize("name", ["half", "bfloat"])
@pytest.mark.parametrize("operation", ["add", "subtract", "multiply", "divide"])
def test_each_operation_rounds(name: str, operation: str) -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.integers(0, 65536, 100_000, dtype=np.uint16).view(TYPES[name]) for _ in range(2))
    with np.errstate(all="ignore"):
        expected = getattr(np, operation)(a.astype(np.float32), b.astype(np.float32)).astype(TYPES[name])
    assert_same_bits(run(f"{name}_{operation}", TYPES[name], a, b), expected)


@pytest.mark.parametrize("name", ["half", "bfloat"])
def test_chains_keep_no_excess_precision(name: str) -> None:
    rng = np.random.default_rng(4)
    a, b = (rng.standard_normal(50_000).astype(TYPES[name]) for _ in range(2))
    rounded = ((a * b).astype(TYPES[name]) + a).astype(TYPES[name]) - b
    wide = (a.astype(np.float32) * b.astype(np.float32) + a.astype(np.float32) - b.astype(np.float32)).astype(
        TYPES[name]
    )
    assert np.any(rounded.view(np.uint16) != wide.view(np.uint16))
    assert_same_bits(run(f"{name}_chain", TYPES[name], a, b), rounded)


@pytest.mark.parametrize(("name", "digits"), [("half", 11), ("bfloat", 8)])
def test_fma_rounds_once(name: str, digits: int) -> None:
    rng = np.random.default_rng(5)
    a, b = (rng.uniform(1, 2, 4000).astype(TYPES[name]) for _ in range(2))
    c = (rng.choice([1.0, -1.0], 4000) * 2.0 ** rng.integers(-13, 2, 4000)).astype(TYPES[name])
    # 1 + 2^-(digits-1) times 1 + 2^-1 ties in `digits` bits: a tiny addend must break the tie.
    a[0], b[0], c[0] = 1 + 2.0 ** (1 - digits), 1.5, 2.0**-14 if name == "half" else 2.0**-60
    actual = run(f"{name}_fma", TYPES[name], a, b, c)
    for i in range(a.size):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        assert float(actual[i]) == nearest(exact, digits), (a[i], b[i], c[i])
