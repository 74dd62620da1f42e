"""Simdgroup functions, matrices and atomics of the shim, run as kernels (shim/simdgroup.metal) on the host."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engine.metal import library
from tests.engine.metal.shim_module import source

Array = np.ndarray[Any, Any]
TYPES: dict[str, Any] = {
    "float": np.float32, "half": np.float16, "bfloat": ml_dtypes.bfloat16,
    "int": np.int32, "ushort": np.uint16, "long": np.int64,
}  # fmt: skip


@functools.cache
def compiled() -> library.Library:
    return library.compile(source("simdgroup.metal"))


def launch(name: str, *buffers: Array, threadgroups: int = 1, threads: int = 32, seed: int | None = None) -> None:
    """Run a kernel; arrays of bfloat travel as their bits. Faults fail the test."""
    bound = {i: b.view(np.uint16) if b.dtype == ml_dtypes.bfloat16 else b for i, b in enumerate(buffers)}
    run = compiled()[name].launch(bound, threadgroups=(threadgroups, 1, 1), threads=(threads, 1, 1), schedule_seed=seed)
    assert run.faults == ()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("seed", [None, 1])
def test_reductions_and_prefixes(name: str, seed: int | None) -> None:
    # Small integers, of which sums and products are exact in every type.
    x = np.array([1, 2, 1, 1, 1, 1, 3, 1] + [1] * 23 + [2]).astype(TYPES[name])
    out = np.zeros((32, 8), dtype=TYPES[name])
    launch(f"reduce_{name}", x, out, seed=seed)
    n = x.astype(np.int64)
    expected = np.stack(
        [np.full(32, n.sum()), np.full(32, n.prod()), np.full(32, n.min()), np.full(32, n.max()),
         n.cumsum(), n.cumsum() - n, n.cumprod(), n.reshape(8, 4).sum(1).repeat(4)], axis=1
    )  # fmt: skip
    assert np.array_equal(out.astype(np.int64), expected)


def test_a_half_sum_rounds_to_half() -> None:
    x = np.full(32, 0.1, np.float16)
    out = np.zeros((32, 8), np.float16)
    launch("reduce_half", x, out)
    running = np.float16(0)
    for value in x:
        running = np.float16(running + value)
    assert out[31, 4] == running != np.float16(x.astype(np.float32).sum())


def test_shuffles_and_votes() -> None:
    x = np.arange(32, dtype=np.int32)
    out = np.zeros((32, 16), np.int32)
    launch("shuffle", x, out)
    up, down = x - 3, x + 3
    ballot = sum(1 << i for i in range(0, 32, 3))
    expected = np.stack(
        [x[::-1], x ^ 5, np.where(up < 0, x, up), np.where(down > 31, x, down), up % 32, down % 32,
         # What is filled in comes from the lane that the data would have come from, round the group.
         np.where(up < 0, -(up % 32), up), np.where(x % 8 + 3 > 7, -(x // 8 * 8 + (x + 3) % 8), down),
         np.full(32, 7), np.zeros(32), np.full(32, np.int64(ballot).astype(np.int32)), np.full(32, 3),
         x ^ 1, x // 4 * 4 + 2, np.full(32, 32), np.full(32, 31)], axis=1
    )  # fmt: skip
    assert np.array_equal(out, expected)


def test_lanes_that_take_no_part_do_not_count() -> None:
    x = np.arange(32, dtype=np.int32) + 10
    out = np.full((32, 4), -1, np.int32)
    launch("partial", x, out)
    lanes = [0, 1, 3, 4, 5, 6, 7]
    taken = x[lanes]
    columns = [np.full(7, taken.sum()), np.full(7, -10), taken.cumsum() - taken, np.full(7, 0b11111011)]
    expected = np.stack(columns, axis=1)
    assert np.array_equal(out[lanes], expected)
    assert np.all(np.delete(out, lanes, axis=0) == -1)


def product(a: Array, b: Array, c: Array, dtype: Any) -> Array:
    """c + a b over k in order; each step rounded to float32 and then to `dtype`."""
    result = c.astype(dtype)
    for k in range(8):
        step = (a[:, k : k + 1].astype(np.float32) * b[k : k + 1].astype(np.float32)).astype(np.float32)
        result = (result.astype(np.float32) + step).astype(dtype)
    return result


PAIRS = [("float", "float"), ("half", "float"), ("half", "half"), ("bfloat", "float")]


@pytest.mark.parametrize(("operand", "to"), PAIRS)
def test_simdgroup_matrices(operand: str, to: str) -> None:
    rng = np.random.default_rng(9)
    a, b = (rng.standard_normal(shape).astype(TYPES[operand]) for shape in ((9, 16), (8, 8)))
    out, elements = np.zeros((4, 8, 8), TYPES[to]), np.zeros((32, 2), TYPES[to])
    launch(f"multiply_{operand}_{to}", a, b, out, elements)
    left, right = a[1:, 8:], b.T
    accumulated = product(left, right, np.full((8, 8), 0.5), TYPES[to])
    plain = product(left, right, np.zeros((8, 8)), TYPES[to])
    assert np.array_equal(out[0], accumulated)
    assert np.array_equal(out[1], plain.T)
    assert np.array_equal(out[2], accumulated * TYPES[to](2))
    assert np.array_equal(out[3], plain)
    for lane in range(32):
        # The layout that mlx/backend/metal/kernels/steel/gemm/mma.h (get_coord) relies on.
        quad = lane // 4
        row, column = (quad & 4) + (lane // 2) % 4, (quad & 2) * 2 + (lane % 2) * 2
        assert np.array_equal(elements[lane], accumulated[row, column : column + 2])


def test_atomics_over_threadgroups() -> None:
    n = 8 * 64
    counts, sums, extremes = np.zeros(5, np.uint32), np.full(2, 1, np.float32), np.zeros(2, np.int32)
    launch("atomics", counts, sums, extremes, threadgroups=8, threads=64)
    xor = np.bitwise_xor.reduce(np.arange(n))
    assert counts.tolist() == [n, 0xFFFFFFFF, xor, 2**32 - 2 * n, n * (n - 1) // 2]
    assert sums.tolist() == [1 + n / 2, n - 1]
    assert extremes.tolist() == [1 - n, n - 1]
