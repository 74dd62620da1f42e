"""Switching between threads: what a thread has in registers, its stack and its place among the others survive it."""

import numpy as np
import pytest

from engine.metal.library import Library, compile

SOURCE = r"""
#include <metal_stdlib>
using namespace metal;
#define MEET threadgroup_barrier(mem_flags::mem_threadgroup)

// More values of each kind than there are registers for it, read before the barriers and used behind them.
kernel void survive(device const uint* whole, device const float4* real, device uint* ints, device float4* floats,
                    device uint* bits, uint i [[thread_index_in_threadgroup]],
                    uint count [[threads_per_threadgroup]]) {
  threadgroup uint place[1024];
  uint n[40];
  float4 f[40];
  bool4 less[12];
  for (int j = 0; j < 40; j++) n[j] = whole[i + j] * 3 + j, f[j] = real[i + j] + float(j);
  for (int j = 0; j < 12; j++) less[j] = f[j] < f[j + 1];
  place[i] = i;
  MEET;
  uint other = place[count - 1 - i];
  MEET;
  uint lanes = simd_sum(1);
  uint sum = other * 1000 + lanes;
  float4 total = 0;
  uint set = 0;
  for (int j = 0; j < 40; j++) sum += n[j] * (j + 1), total += f[j] * float(j + 1);
  for (int j = 0; j < 12; j++) set = set * 2 + less[j].x + less[j].w * 4096;
  ints[i] = sum, floats[i] = total, bits[i] = set;
}

// One call site of the barrier, in frames of different depths; some threads end at every step.
__attribute__((noinline)) uint deeper(threadgroup atomic_uint* met, uint depth, uint value) {
  if (depth) return deeper(met, depth - 1, value + 1) + 1;
  atomic_fetch_add_explicit(met, 1u, memory_order_relaxed);
  MEET;
  uint now = atomic_load_explicit(met, memory_order_relaxed);
  MEET;
  return now + value;
}
kernel void leave(device uint* out, uint i [[thread_index_in_threadgroup]]) {
  threadgroup atomic_uint met;
  if (i == 0) atomic_store_explicit(&met, 0u, memory_order_relaxed);
  MEET;
  uint sum = 0;
  for (uint step = 0; step <= i / 8; step++) sum += deeper(&met, i % 8, step);
  out[i] = sum;
}
"""


@pytest.fixture(scope="module")
def lib() -> Library:
    return compile(SOURCE)


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("threads", [1, 2, 33, 1024])
def test_registers_survive_a_switch(lib: Library, threads: int, seed: int | None) -> None:
    rng = np.random.default_rng(threads)
    whole = rng.integers(0, 2**32, threads + 40, dtype=np.uint32)
    real = rng.integers(-8, 8, (threads + 40, 4)).astype(np.float32)
    ints, floats, bits = np.empty(threads, np.uint32), np.empty((threads, 4), np.float32), np.empty(threads, np.uint32)
    buffers = {0: whole, 1: real, 2: ints, 3: floats, 4: bits}
    run = lib["survive"].launch(buffers, threadgroups=1, threads=threads, outputs=(2, 3, 4), schedule_seed=seed)
    assert not run.faults
    assert run.stats.barriers == 2
    i, j = np.arange(threads), np.arange(40)
    n = whole[i[:, None] + j].astype(np.uint64) * 3 + j.astype(np.uint64)
    f = real[i[:, None] + j] + j[:, None].astype(np.float32)
    lanes = np.minimum(32, threads - i // 32 * 32)
    sums = (n * (j + 1).astype(np.uint64)).sum(1) + ((threads - 1 - i) * 1000 + lanes).astype(np.uint64)
    np.testing.assert_array_equal(ints, sums.astype(np.uint32))  # modulo 2**32
    np.testing.assert_array_equal(floats, (f * (j[:, None] + 1)).sum(1))  # small integers: exact in any order
    less, weights = f[:, :12] < f[:, 1:13], 2 ** np.arange(11, -1, -1)
    np.testing.assert_array_equal(bits, less[..., 0] @ weights + less[..., 3] @ weights * 4096)


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("threads", [8, 100, 1024])
def test_threads_that_end_leave_the_others_in_step(threads: int, checked: bool) -> None:
    out = np.empty(threads, np.uint32)
    run = compile(SOURCE, checked=checked)["leave"].launch({0: out}, threadgroups=1, threads=threads, outputs=(0,))
    i, steps = np.arange(threads), (threads + 7) // 8
    # In checked mode a barrier that some threads have ended before is divergence.
    assert {fault.kind for fault in run.faults} <= ({"barrier-divergence"} if checked else set())
    assert run.stats.barriers == 1 + 2 * steps
    met = np.cumsum([threads - 8 * step for step in range(steps)])
    expected = [sum(int(met[s]) + s + 2 * (at % 8) for s in range(at // 8 + 1)) for at in i]
    np.testing.assert_array_equal(out, np.array(expected, np.uint32))
