"""thread_elements() is a lane's own affair: it works in a branch that other lanes don't take."""

from __future__ import annotations

import numpy as np
import pytest

from engine.metal.library import compile

SOURCE = """
#include <metal_simdgroup_matrix>
using namespace metal;
kernel void tail(device const float* a, device const float* b, device float* out, device float* whole,
                 constant int& rows, uint lane [[thread_index_in_simdgroup]]) {
  const int row = ((lane / 4) & 4) + (lane / 2) % 4, column = ((lane / 4) & 2) * 2 + (lane % 2) * 2;
  simdgroup_float8x8 left, right, twos = make_filled_simdgroup_matrix<float, 8>(2.0f), unit(1.0f), product;
  simdgroup_load(left, a, 8);
  simdgroup_load(right, b, 10, ulong2(1, 0), true);
  simdgroup_multiply(product, left, right);
  simdgroup_multiply_accumulate(product, product, unit, twos);
  if (row < rows) {
    out[8 * row + column] = product.thread_elements()[0];
    out[8 * row + column + 1] = product.thread_elements()[1];
  }
  simdgroup_store(product, whole, 8, 0, true);
}
"""


@pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])
def test_thread_elements_in_a_branch(checked: bool) -> None:
    rng, rows = np.random.default_rng(5), 3
    a, b = rng.integers(-4, 5, (8, 8)).astype(np.float32), rng.integers(-4, 5, (8, 10)).astype(np.float32)
    out, whole = np.zeros((8, 8), np.float32), np.zeros((8, 8), np.float32)
    kernel = compile(SOURCE, checked=checked)["tail"]
    run = kernel.launch({0: a, 1: b, 2: out, 3: whole, 4: np.int32(rows)}, threadgroups=1, threads=32)
    assert run.faults == ()
    assert run.stats.simdgroup_matrix_operations == 5
    expected = a @ b[:, 1:9].T + 2
    assert (whole == expected.T).all()
    assert (out == np.where(np.arange(8)[:, None] < rows, expected, 0)).all()
