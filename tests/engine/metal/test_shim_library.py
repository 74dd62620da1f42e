"""The standard library's lesser-used corners: what is there, and that it computes what the specification says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.metal import library
from engine.metal.errors import CompileError

HEAD = "#include <metal_stdlib>\n#include <simd/simd.h>\nusing namespace metal;\n"

# A body each: it compiles, which is all that is asked here. Values are tested in the files by subject.
BODIES = {
    "fast_precise": """
        float f = fast::exp(1.0f) + precise::pow(2.f, 3.f) + precise::divide(1.f, 2.f) + fast::fmin3(1.f, 2.f, 3.f);
        float3 n = fast::normalize(float3(1)) + precise::cross(float3(1), float3(2));""",
    "integers": """
        int i = mulhi(3, 4) + mad24(1, 2, 3) + mul24(2, 3) + absdiff(3, 5) + popcount(7) + clz(7) + ctz(8)
          + rotate(1, 2) + extract_bits(7, 1u, 2u) + insert_bits(1, 2, 1u, 2u) + reverse_bits(3) + addsat(1, 2)
          + subsat(1, 2) + hadd(1, 2) + rhadd(1, 2) + madhi(1, 2, 3) + madsat(1, 2, 3) + median3(1, 2, 3);
        uint4 u = mulhi(uint4(3), uint4(4)) + popcount(uint4(3)) + extract_bits(uint4(7), 1u, 2u);
        char c = addsat(char(1), char(2)); ushort s = rotate(ushort(1), ushort(3)) + clz(ushort(1));""",
    "relational": """
        bool b = isfinite(1.f) && isinf(1.f) && isnormal(1.f) && isordered(1.f, 2.f) && signbit(1.f);
        bool2 v = isnan(half2(1)); bool d = all(v) || any(!v);
        uint4 bits = as_type<uint4>(float4(1));
        const bool4 finite = (bits & 0x7f800000u) != 0x7f800000u;
        bits += select(uint4(0), uint4(0x7fffu) + ((bits >> 16u) & 1u), finite);""",
    "barriers": """
        threadgroup_barrier(mem_flags::mem_device_and_threadgroup);
        threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
        threadgroup_barrier(mem_flags::mem_threadgroup, memory_scope_threadgroup);
        simdgroup_barrier(mem_flags::mem_none, memory_scope::memory_scope_simdgroup);
        atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);""",
    "atomics": """
        device atomic_bool* flag = (device atomic_bool*)o;
        bool was = atomic_exchange_explicit(flag, true, memory_order_relaxed);
        device atomic_ulong* wide = (device atomic_ulong*)o; atomic_max_explicit(wide, 5ul, memory_order_relaxed);
        device atomic<int>* i = (device atomic<int>*)o; int old = atomic_fetch_and_explicit(i, 1, memory_order_relaxed);
        threadgroup atomic_uint local[4]; atomic_fetch_or_explicit(&local[1], 1u, memory_order_relaxed);""",
    "matrices": """
        simdgroup_half8x8 b = make_filled_simdgroup_matrix<half, 8, 8>(0.h);
        simdgroup_bfloat8x8 c = make_filled_simdgroup_matrix<bfloat, 8>(bfloat(0.f));
        simdgroup_matrix<float, 8, 8> d(1.f), m[2][2] = { { simdgroup_matrix<float, 8, 8>(0) } };
        m[1][0].thread_elements()[0] = 1; simdgroup_multiply_accumulate(d, b, c, d);
        float4x4 w = float4x4(1) * 2.f; w[2] = float4(1);
        float3x3 r = transpose(float3x3(float3(1), float3(2), float3(3)));""",
    "limits_and_types": """
        half h = metal::numeric_limits<half>::infinity() + numeric_limits<half>::epsilon() + HALF_MAX + M_PI_H;
        constexpr array<float, 4> a = {1, 2, 3, 4}; float f = a[2] + a.size(); for (auto x : a) f += x;
        static_assert(extent<int[3]>::value == 3 && rank<float[2][2]>::value == 2, "arrays");
        enum class Mode : uint { a, b = 4 }; Mode m = Mode::b; union { float x; uint u; } both; both.x = 1;""",
    "logging": 'os_log_default.log("value %d", 3); os_log_default.log_debug("x");',
    "names_of_simd_h": """
        simd_float4 v = simd_float4(1); vector_uint2 u; matrix_float4x4 m; simd_float3x3 n; simd::float2 q = v.xy;
        static_assert(sizeof(vector_float3) == 16 && sizeof(simd_half4x4) == 32, "Metal's layouts");""",
}


@pytest.mark.parametrize("name", BODIES)
def test_compiles(name: str) -> None:
    made = library.compile(f"{HEAD}kernel void k(device float* o) {{ {BODIES[name]} o[0] = 1; }}")
    assert [parameter.name for parameter in made["k"].parameters] == ["o"]


@pytest.mark.parametrize("statement", ["double x = 1;", "goto a; a:;", 'printf("x");', "o[0] = erf(1.0f);"])
def test_what_metal_lacks_is_refused_at_its_line(statement: str) -> None:
    with pytest.raises(CompileError) as raised:
        library.compile(f"{HEAD}kernel void k(device float* o) {{\n  {statement}\n}}")["k"]
    assert raised.value.line == 5


QUADS = (
    HEAD
    + """
kernel void quads(device const int* in, device int* out, uint t [[thread_position_in_grid]]) {
  const int x = in[t];
  device int* to = out + t * 6;
  to[0] = quad_broadcast_first(x), to[1] = quad_is_first(), to[2] = quad_shuffle_and_fill_up(x, -x, 1);
  to[3] = quad_shuffle_and_fill_down(x, -x, 3), to[4] = quad_shuffle_and_fill_down(x, -x, 1, 2);
  to[5] = int(quad_vote::vote_t(quad_active_threads_mask()));
}
"""
)


def test_quads() -> None:
    x = np.arange(1, 33, dtype=np.int32)
    out = np.zeros((32, 6), np.int32)
    run = library.compile(QUADS)["quads"].launch({0: x, 1: out}, threadgroups=1, threads=32)
    assert run.faults == ()
    quad, lane = x.reshape(8, 4), np.arange(4)
    up = np.where(lane < 1, -quad[:, [3, 0, 1, 2]], quad[:, [3, 0, 1, 2]])
    down = np.where(lane + 3 > 3, -quad[:, [3, 0, 1, 2]], quad[:, [3, 0, 1, 2]])
    pairs = np.where(lane % 2 == 1, -quad[:, [1, 0, 3, 2]], quad[:, [1, 0, 3, 2]])
    expected = [np.repeat(quad[:, :1], 4, 1), np.tile([1, 0, 0, 0], (8, 1)), up, down, pairs, np.full((8, 4), 15)]
    assert np.array_equal(out, np.stack([part.ravel() for part in expected], 1))


PACKS = (
    HEAD
    + """
kernel void packs(device const float4* in, device uint* words, device float4* back) {
  const float4 v = in[0];
  words[0] = pack_float_to_unorm10a2(v), words[1] = pack_float_to_unorm565(v.xyz);
  words[2] = pack_float_to_srgb_unorm4x8(v), words[3] = pack_half_to_unorm10a2(half4(v));
  back[0] = unpack_unorm10a2_to_float(words[0]), back[1] = float4(unpack_unorm565_to_float(ushort(words[1])), 0);
  back[2] = unpack_unorm4x8_srgb_to_float(words[2]), back[3] = float4(unpack_unorm10a2_to_half(words[3]));
}
"""
)


def packed(values: Any, widths: list[int]) -> int:
    word = at = 0
    for value, width in zip(values, widths, strict=True):
        word |= round(float(np.clip(value, 0, 1)) * (2**width - 1)) << at
        at += width
    return word


def test_packed_fields_of_unequal_widths() -> None:
    v = np.array([0.25, 0.75, 1.5, 0.34], np.float32)
    words, back = np.zeros(4, np.uint32), np.zeros((4, 4), np.float32)
    run = library.compile(PACKS)["packs"].launch({0: v, 1: words, 2: back}, threadgroups=1, threads=1)
    assert run.faults == ()
    # IEC 61966-2-1 above its linear part; alpha stays linear.
    srgb = np.append(1.055 * np.clip(v[:3], 0, 1) ** (1 / 2.4) - 0.055, v[3])
    assert words[:3].tolist() == [packed(v, [10, 10, 10, 2]), packed(v[:3], [5, 6, 5]), packed(srgb, [8] * 4)]
    assert words[3] == words[0]
    clipped = np.clip(v, 0, 1)
    for row, steps in zip(back[[0, 1, 3]], ([1023, 1023, 1023, 3], [31, 63, 31], [1023, 1023, 1023, 3]), strict=True):
        n = len(steps)
        assert np.all(np.abs(row[:n] - clipped[:n]) <= 0.5 / np.array(steps) + 2.0**-11)
    assert np.all(np.abs(back[2] - clipped) <= 1 / 255)
