"""What llama.cpp's, ds4's and MLX's kernels and hosts rely on, in small kernels of the same idioms, checked and not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.metal.errors import MetalError
from engine.metal.library import Library, compile

SOURCE = r"""
#include <metal_stdlib>
using namespace metal;
#define MAX(x, y) ((x) > (y) ? (x) : (y))
#define FC_OP FC_bin_op
#define FC_RB FC_bin_rb
constant short FC_bin_op [[function_constant(1300)]];
constant bool  FC_bin_rb [[function_constant(1302)]];
constant bool  FC_bin_cb [[function_constant(1303)]];
constant short FC_bin_f  [[function_constant(1304)]];

typedef struct { int32_t ne00; int32_t ne10; uint64_t nb01; float scale; int32_t nef1[3]; } kargs;

// The softmax of a row; without a mask its host binds src0 in the mask's place.
template <typename T>
kernel void kernel_soft_max(
        constant kargs & args,
        device const char * src0,
        device const char * src1,
        device       char * dst,
        threadgroup float * buf [[threadgroup(0)]],
        uint3 tgpig[[threadgroup_position_in_grid]],
        uint3 tpitg[[thread_position_in_threadgroup]],
        uint  sgitg[[simdgroup_index_in_threadgroup]],
        uint  tiisg[[thread_index_in_simdgroup]],
        uint3  tptg[[threads_per_threadgroup]]) {
    device const float * x = (device const float *) (src0 + tgpig.x*args.nb01);
    device const     T * m = src1 != src0 ? (device const T *) src1 : nullptr;
    device       float * y = (device float *) (dst + tgpig.x*args.nb01);
    float lmax = -INFINITY;
    for (int i = tpitg.x; i < args.ne00; i += tptg.x) { lmax = MAX(lmax, x[i]*args.scale + (m ? m[i] : 0.0f)); }
    float max_val = simd_max(lmax);
    if (tptg.x > 32) {
        if (sgitg == 0) { buf[tiisg] = -INFINITY; }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (tiisg == 0) { buf[sgitg] = max_val; }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        max_val = simd_max(buf[tiisg]);
    }
    float lsum = 0.0f;
    for (int i = tpitg.x; i < args.ne00; i += tptg.x) {
        const float e = exp((x[i]*args.scale + (m ? m[i] : 0.0f)) - max_val);
        lsum += e;
        y[i] = e;
    }
#ifndef WITHOUT_BARRIER
    threadgroup_barrier(mem_flags::mem_none);
#endif
    float sum = simd_sum(lsum);
    if (tptg.x > 32) {
        if (sgitg == 0) { buf[tiisg] = 0.0f; }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (tiisg == 0) { buf[sgitg] = sum; }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        sum = simd_sum(buf[tiisg]);
    }
    for (int i = tpitg.x; i < args.ne00; i += tptg.x) { y[i] *= 1.0f/sum; }
}
typedef decltype(kernel_soft_max<float>) soft_max_t;
template [[host_name("kernel_soft_max_f32")]] kernel soft_max_t kernel_soft_max<float>;
template [[host_name("kernel_soft_max_f16")]] kernel soft_max_t kernel_soft_max<half>;

kernel void kernel_bin(constant kargs & args, device const float * a, device const float * b, device float * dst,
        uint i[[thread_position_in_grid]]) {
    if (FC_RB) {
        const uint i1 = FC_bin_cb ? i%args.ne10 : i;
        if (FC_OP == 0) { dst[i] = a[i] + b[i1]; }
        if (FC_OP == 2) { dst[i] = a[i] * b[i1]; }
    } else {
        for (short j = 0; j < FC_bin_f; ++j) { dst[i] = FC_OP == 0 ? a[i] + b[i] : a[i] * b[i]; }
    }
}

// RMS norm of float4s, rounded to bfloat in registers where asked for.
template <typename T, short F, bool ROUND_BF16 = false>
kernel void kernel_rms_norm_fuse(constant kargs & args, device const char * src, device const char * w,
        device char * dst,
        threadgroup float * shmem [[threadgroup(0)]], uint3 tgpig[[threadgroup_position_in_grid]],
        ushort3 tpitg[[thread_position_in_threadgroup]], ushort sgitg[[simdgroup_index_in_threadgroup]],
        ushort tiisg[[thread_index_in_simdgroup]], ushort3 ntg[[threads_per_threadgroup]]) {
    if (sgitg == 0) { shmem[tiisg] = 0.0f; }
    device const T * x = (device const T *) (src + tgpig.x*args.nb01);
    device const T * f = (device const T *) (w + (tgpig.x%args.nef1[1])*args.nb01);
    float sumf = 0.0f;
    for (int i = tpitg.x; i < args.ne00/4; i += ntg.x) { sumf += dot(x[i], x[i]); }
    sumf = simd_sum(sumf);
    threadgroup_barrier(mem_flags::mem_device_and_threadgroup);
    if (tiisg == 0) { shmem[sgitg] = sumf; }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sumf = simd_sum(shmem[tiisg]);
    const float scale = 1.0f/sqrt(sumf/args.ne00 + 1e-5f);
    device T * y = (device T *) (dst + tgpig.x*args.nb01);
    for (int i = tpitg.x; i < args.ne00/4; i += ntg.x) {
        const T value = F == 2 ? (x[i]*scale)*f[i] : x[i]*scale;
        if (ROUND_BF16) {
            uint4 bits = as_type<uint4>(value);
            const bool4 finite = (bits & 0x7f800000u) != 0x7f800000u;
            bits += select(uint4(0), uint4(0x7fffu) + ((bits >> 16u) & 1u), finite);
            y[i] = as_type<T>(bits & 0xffff0000u);
        } else {
            y[i] = value;
        }
    }
}
typedef decltype(kernel_rms_norm_fuse<float4, 1>) kernel_rms_norm_fuse_t;
template [[host_name("kernel_rms_norm_mul_f32_4")]] kernel kernel_rms_norm_fuse_t kernel_rms_norm_fuse<float4, 2>;
template [[host_name("kernel_rms_norm_mul_bf16_f32_4")]] kernel kernel_rms_norm_fuse_t
    kernel_rms_norm_fuse<float4, 2, true>;

// Lane 0 writes over what other lanes may still have to read: right only where lanes run in lockstep.
kernel void kernel_lockstep(device float * dst, threadgroup float * ss [[threadgroup(0)]],
        ushort tiisg[[thread_index_in_simdgroup]]) {
    ss[tiisg] = tiisg;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    float lo = 0;
    for (short cc = 0; cc < 32; ++cc) { lo += ss[cc]; }
    if (tiisg == 0) { ss[0] = -1; }
    dst[tiisg] = lo;
}
"""
KARGS = np.dtype([("ne00", "i4"), ("ne10", "i4"), ("nb01", "u8"), ("scale", "f4"), ("nef1", "i4", 3)], align=True)
BINARY: dict[int | str, object] = {1300: 2, 1302: False, 1304: 1}


def kargs(**fields: Any) -> bytes:
    made = np.zeros((), KARGS)
    for name, value in fields.items():
        made[name] = value
    return made.tobytes()


@pytest.fixture(scope="module", params=[False, True], ids=["fast", "checked"])
def lib(request: pytest.FixtureRequest) -> Library:
    made = compile(SOURCE, constants=BINARY, checked=request.param)
    made.build(made.kernels)
    return made


def softmax(x: Any) -> Any:
    wide = np.exp(x - x.max(-1, keepdims=True))
    return wide / wide.sum(-1, keepdims=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("threads", [32, 128])
def test_softmax_whose_host_binds_one_array_twice(lib: Library, masked: bool, threads: int) -> None:
    rng = np.random.default_rng(5)
    x, out = rng.standard_normal((3, 203)).astype(np.float32), np.empty((3, 203), np.float32)
    mask = np.where(rng.random(203) < 0.3, -np.inf, rng.standard_normal(203)).astype(np.float16)
    args = kargs(ne00=203, nb01=x.strides[0], scale=0.5)
    kernel = lib["kernel_soft_max_f16"]
    buffers: dict[int, object] = {0: args, 1: x, 2: mask if masked else x, 3: out}
    run = kernel.launch(buffers, threadgroups=3, threads=threads, threadgroup_memory={0: 128}, outputs=(3,))
    # The barrier of no memory stands between what all simdgroups read and what the first writes there: no race.
    assert run.faults == ()
    expected = softmax(x.astype(np.float64) * 0.5 + (mask.astype(np.float64) if masked else 0))
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=1e-7)


def test_the_same_softmax_without_that_barrier_has_a_race() -> None:
    kernel = compile(SOURCE, constants=BINARY, checked=True, defines={"WITHOUT_BARRIER": 1})["kernel_soft_max_f32"]
    x, out = np.zeros((1, 203), np.float32), np.empty((1, 203), np.float32)
    run = kernel.launch(
        {0: kargs(ne00=203, nb01=812, scale=1), 1: x, 2: x, 3: out},
        threadgroups=1, threads=128, threadgroup_memory={0: 128}, outputs=(3,),
    )  # fmt: skip
    assert {fault.kind for fault in run.faults} == {"race"}


def test_a_constant_that_only_a_dead_branch_reads_needs_no_value(lib: Library) -> None:
    a, b = np.arange(8, dtype=np.float32), np.full(8, 3, np.float32)
    out = np.empty(8, np.float32)
    run = lib["kernel_bin"].launch({0: kargs(ne10=8), 1: a, 2: b, 3: out}, threadgroups=1, threads=8, outputs=(3,))
    assert run.faults == ()
    assert out.tolist() == (a * 3).tolist()
    with pytest.raises(MetalError, match=r"kernel_bin reads the function constant 'FC_bin_cb' \(index 1303\)"):
        compile(SOURCE, constants={**BINARY, 1302: True})["kernel_bin"]
    with pytest.raises(MetalError, match=r"kernel_bin reads the function constant 'FC_bin_f' \(index 1304\)"):
        compile(SOURCE, constants={1300: 0, 1302: False})["kernel_bin"]
    compile(SOURCE, constants={1300: 0, 1302: True, 1303: False})["kernel_bin"]  # the other branch is dead now


@pytest.mark.parametrize("name", ["kernel_rms_norm_mul_f32_4", "kernel_rms_norm_mul_bf16_f32_4"])
def test_rms_norm_of_vectors(lib: Library, name: str) -> None:
    rng = np.random.default_rng(6)
    x, w = rng.standard_normal((3, 80)).astype(np.float32), rng.standard_normal((1, 80)).astype(np.float32)
    out = np.empty_like(x)
    args = kargs(ne00=80, nb01=x.strides[0], nef1=[3, 1, 1])
    # As many threads as float4s: the host's rule gives threadgroups whose last simdgroup is not full.
    run = lib[name].launch(
        {0: args, 1: x, 2: w, 3: out}, threadgroups=3, threads=20, threadgroup_memory={0: 128}, outputs=(3,)
    )
    assert run.faults == ()
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5) * w
    np.testing.assert_allclose(out, expected, rtol=2.0**-8 if "bf16" in name else 1e-5)
    assert np.any(out.view(np.uint32) & 0xFFFF) == ("bf16" not in name)


def test_reliance_on_lockstep_is_right_and_a_race_at_its_line(lib: Library) -> None:
    out = np.empty(32, np.float32)
    run = lib["kernel_lockstep"].launch({0: out}, threadgroups=1, threads=32, threadgroup_memory={0: 128}, outputs=(0,))
    assert out.tolist() == [sum(range(32))] * 32
    assert {fault.kind for fault in run.faults} == ({"race"} if lib.checked else set())
    if lib.checked:
        lines = SOURCE.splitlines()
        assert "ss[" in lines[run.faults[0].line - 1]  # type: ignore[operator]


def test_a_seed_shows_reliance_on_lockstep(lib: Library) -> None:
    """The lane that clears ss[0] is the last to run in one of 32 orders."""
    right = 0
    for seed in range(8):
        out = np.empty(32, np.float32)
        lib["kernel_lockstep"].launch(
            {0: out}, threadgroups=1, threads=32, threadgroup_memory={0: 128}, outputs=(0,), schedule_seed=seed
        )
        right += out.tolist() == [sum(range(32))] * 32
    assert right < 8


STEPS = """
#include <metal_stdlib>
using namespace metal;
// Sums without any barrier: each step reads what lanes of the step before wrote.
static void halves(threadgroup float * s, ushort lane) {
    for (ushort step = 16; step > 0; step /= 2)
        if (lane < step)
            s[lane] += s[lane + step];
}
kernel void kernel_halves(device float * x, ushort lane [[thread_index_in_simdgroup]],
        ushort group [[simdgroup_index_in_threadgroup]], ushort i [[thread_index_in_threadgroup]]) {
    threadgroup float s[64];
    s[i] = x[i];
    if (ushort n = lane; n == 99) { s[0] = lane; }
    else if (lane < 2) halves(s + 32 * group, lane);
    else { halves(s + 32 * group, lane); }
    x[i] = s[i];
}
"""


def test_a_reduction_in_lockstep() -> None:
    """Lanes come to each `if` together through two calls, of which C++ makes two loops."""
    x = np.random.default_rng(7).standard_normal(64).astype(np.float32)
    given = x.copy()
    assert compile(STEPS)["kernel_halves"].launch({0: x}, threadgroups=1, threads=64).faults == ()
    np.testing.assert_allclose(x[::32], given.reshape(2, 32).sum(1), rtol=1e-5)
