"""Spellings that MLX's .metal files use and its headers don't, in kernels of our own, checked and not."""

from __future__ import annotations

import numpy as np
import pytest

from engine.metal.errors import CompileError
from engine.metal.library import Library, compile

SOURCE = r"""
#ifndef __METAL_MEMORY_SCOPE_SYSTEM__
#define __METAL_MEMORY_SCOPE_SYSTEM__ 3
namespace metal {
constexpr constant metal::thread_scope thread_scope_system =
    static_cast<thread_scope>(__METAL_MEMORY_SCOPE_SYSTEM__);
}
#endif
#include <metal_atomic>
using namespace metal;

constant int jump [[function_constant(01)]];
constant int shift [[function_constant(010)]];

template <typename T, int N> struct Strides { T at[N]; };

template <typename T, int N>
[[kernel]] void gather(const device T* in [[buffer(0)]], device T* out [[buffer(1)]],
                       const constant Strides<int, N>& strides [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  out[i] = in[i * strides.at[N - 1] * jump + shift];
}
#define instantiate_gather(name, type, n) \
  template [[host_name("gather_" #name "_" #n)]] [[kernel]] void gather( \
      const device type* in [[buffer(0)]], device type* out [[buffer(1)]], \
      const constant Strides<int, n>& strides [[buffer(2)]], uint i [[thread_position_in_grid]]);
instantiate_gather(float, float, 1)
instantiate_gather(float, float, 2)
instantiate_gather(half, half, 2)

[[kernel]] void weighted(const device float* in, device float* out, constant const int64_t strides[3],
                         constant const float weights[2][2] [[buffer(5)]], uint i [[thread_position_in_grid]]) {
  out[i] = in[i * strides[2]] * weights[1][0];
}

[[kernel]] void turned(const device float* in, device float* out, uint i [[thread_position_in_threadgroup]],
                       uint n [[threads_per_threadgroup]]) {
  threadgroup float staged[64] = {0};
  staged[i] = in[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = staged[n - 1 - i];
}

[[kernel]] void zeros(device float* out, uint i [[thread_position_in_threadgroup]]) {
  threadgroup float staged[64] = {0.0f};
  out[i] = staged[i];
}

[[kernel]] void braces(const device uint* in, device uint4* out, uint i [[thread_position_in_grid]]) {
  uint4 three = {in[i], in[i] + 1, in[i] ^ 5};
  uint4 one = {in[i]};
  out[2 * i] = three;
  out[2 * i + 1] = one;
}

[[kernel]] void stamp(volatile coherent(system) device uint* time, constant uint& now) {
  time[0] = now;
  metal::atomic_thread_fence(
      metal::mem_flags::mem_device, metal::memory_order_seq_cst, metal::thread_scope_system);
}
"""


@pytest.fixture(scope="module", params=[False, True], ids=["fast", "checked"])
def library(request: pytest.FixtureRequest) -> Library:
    made = compile(SOURCE, checked=request.param, constants={1: 3, 8: 2})
    made.build(made.kernels)
    return made


def test_an_instantiation_without_arguments_is_known_by_its_parameters(library: Library) -> None:
    assert [name for name in library.kernels if "gather" in name] == [
        "gather_float_1",
        "gather_float_2",
        "gather_half_2",
    ]
    for name, dtype in (("gather_float_2", np.float32), ("gather_half_2", np.float16)):
        x, out = np.arange(64, dtype=dtype), np.zeros(8, dtype)
        run = library[name].launch({0: x, 1: out, 2: np.array([0, 2], np.int32)}, grid=8, threads=8, outputs=(1,))
        assert run.faults == ()
        assert (out == x[2 : 2 + 8 * 6 : 6]).all()


def test_a_parameter_that_is_an_array_is_a_pointer(library: Library) -> None:
    kernel = library["weighted"]
    assert [(p.name, p.index, p.type_text) for p in kernel.parameters if p.kind == "buffer"][2:] == [
        ("strides", 2, "constant const int64_t[3]"),
        ("weights", 5, "constant const float[2][2]"),
    ]
    x, out = np.arange(20, dtype=np.float32), np.zeros(10, np.float32)
    weights = np.array([[1, 2], [3, 4]], np.float32)
    run = kernel.launch({0: x, 1: out, 2: np.array([7, 7, 2]), 5: weights}, grid=10, threads=5, outputs=(1,))
    assert run.faults == ()
    assert (out == 3 * x[::2]).all()


def test_zeros_for_threadgroup_memory_initialise_nothing(library: Library) -> None:
    x, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    run = library["turned"].launch({0: x, 1: out}, threadgroups=1, threads=64, outputs=(1,))
    assert run.faults == ()
    assert (out == x[::-1]).all()
    run = library["zeros"].launch({0: out}, threadgroups=1, threads=64, outputs=(0,))
    assert np.isnan(out).all()
    assert {fault.kind for fault in run.faults} <= {"uninitialised-read"}
    assert bool(run.faults) == library.checked


def test_braces_fill_a_vector_from_the_front(library: Library) -> None:
    x, out = np.arange(4, dtype=np.uint32), np.zeros((4, 2, 4), np.uint32)
    assert library["braces"].launch({0: x, 1: out}, grid=4, threads=4, outputs=(1,)).faults == ()
    assert (out[:, 0] == np.stack([x, x + 1, x ^ 5, 0 * x], 1)).all()
    assert (out[:, 1] == np.stack([x, 0 * x, 0 * x, 0 * x], 1)).all()


def test_the_systems_scope_is_known(library: Library) -> None:
    time = np.zeros(1, np.uint32)
    assert library["stamp"].launch({0: time, 1: np.uint32(7)}, threadgroups=1, threads=1).faults == ()
    assert time[0] == 7


def test_an_array_of_values_is_no_buffer() -> None:
    with pytest.raises(CompileError, match="'x' of k: float\\[3\\] has no attribute"):
        compile("kernel void k(float x[3]) {}")["k"]
