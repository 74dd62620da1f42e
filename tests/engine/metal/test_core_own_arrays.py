"""Writes outside a thread's own array reach nothing, as on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from engine.metal.library import compile

SOURCE = """
kernel void padded(device const float* x, device float* out, constant int& size, uint i [[thread_position_in_grid]]) {
  float own[4] = {1, 2, 3, 4}, kept[4] = {5, 6, 7, 8};
  float pair[4][2] = {{0}};
  const int n = size - int(i) * 4;  // far below zero in most threads
  for (int j = 0; j < n && j < 4; j++) { own[j] = x[4 * i + j]; }
  for (int j = n; j < 4; j++) own[j] = -1;
  for (int j = n; j < 9; j++) { pair[j][1] = own[j]; own[j] += 0; }
  device float* kept_out = out + 4 * i;
  for (int j = i * 0; j < 4; j++) { kept_out[j] = own[j] + 10 * kept[j] + 100 * pair[j][1]; }
}
"""


@pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])
def test_a_loop_that_starts_below_an_array_changes_nothing_else(checked: bool) -> None:
    size, threads = 9, 3200
    x, out = np.arange(1, size + 1, dtype=np.float32), np.zeros((threads, 4), np.float32)
    kernel = compile(SOURCE, checked=checked)["padded"]
    run = kernel.launch({0: x, 1: out, 2: np.int32(size)}, grid=threads, threads=32, outputs=(1,))
    assert run.faults == ()
    own = np.full((threads, 4), -1, np.float32)
    own.flat[:size] = x
    written = np.arange(4 * threads).reshape(threads, 4) >= size
    assert (out == own + 10 * np.array([5, 6, 7, 8]) + 100 * np.where(written, own, 0)).all()
