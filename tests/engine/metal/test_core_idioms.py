"""The idioms of llama.cpp's and ds4's kernels: byte pointers, quantised blocks, functions as template arguments."""

import ml_dtypes
import numpy as np
import pytest

from engine.metal.library import Library, compile

SOURCE = r"""
#include <metal_stdlib>
using namespace metal;
#define MAX(x, y) ((x) > (y) ? (x) : (y))
#define PAD2(x, n) (((x) + (n) - 1) & ~((n) - 1))
#define FOR_UNROLL(x) _Pragma("clang loop unroll(full)") for (x)
#define QK4_0 32
#define FC_BASE 100
typedef struct { half d; uint8_t qs[QK4_0 / 2]; } block_q4_0;
static_assert(sizeof(block_q4_0) == 2 + 16, "wrong");
constexpr constant static float kvalues[16] = { 0.f, .5f, 1.f, 1.5f, [4 ... 14] = 2.f, 9.f };
constant short nsg [[function_constant(FC_BASE + 2)]];
constant bool has_kv = is_function_constant_defined(nsg);
struct kargs { int32_t ne00; uint64_t nb01; };
template <typename type4x4>
void dequantize_q4_0(device const block_q4_0 * xb, short il, thread type4x4 & reg) {
    device const uint16_t * qs = ((device const uint16_t *)xb + 1);
    const float d1 = il ? (xb->d / 16.h) : xb->d;
    const float d2 = d1 / 256.f;
    const float md = -8.h * xb->d;
    const ushort mask0 = il ? 0x00F0 : 0x000F;
    const ushort mask1 = mask0 << 8;
    float4x4 reg_f;
    for (int i = 0; i < 8; i++) {
        reg_f[i/2][2*(i%2) + 0] = d1 * (qs[i] & mask0) + md;
        reg_f[i/2][2*(i%2) + 1] = d2 * (qs[i] & mask1) + md;
    }
    reg = (type4x4) reg_f;
}
template<typename block_q, short nl, void (*dequantize_func)(device const block_q *, short, thread float4x4 &)>
kernel void kernel_get_rows_q(
        constant kargs & args,
        device const  void * src0,
        device       float * dst,
        uint3                tgpig[[threadgroup_position_in_grid]],
        ushort               tiitg[[thread_index_in_threadgroup]],
        ushort3              ntg [[threads_per_threadgroup]]) {
    for (int64_t ind = tiitg; ind < args.ne00/16; ind += ntg.x) {
        float4x4 temp;
        device const block_q * row = (device const block_q *) ((const device char *) src0 + tgpig.x*args.nb01);
        dequantize_func(row + ind/nl, ind%nl, temp);
        *(((device float4x4 *) ((device char *) dst + tgpig.x*args.ne00*4)) + ind) = temp;
    }
}
typedef decltype(kernel_get_rows_q<block_q4_0, 2, dequantize_q4_0>) get_rows_q_t;
template [[host_name("kernel_get_rows_q4_0")]] kernel get_rows_q_t kernel_get_rows_q<block_q4_0, 2, dequantize_q4_0>;

// What another thread has written is read anew, as a vector and by element.
kernel void kernel_reload(
        device const float4 * x,
        device float * out,
        threadgroup volatile float * row [[threadgroup(0)]],
        ushort i [[thread_position_in_threadgroup]]) {
    volatile device float4 * staged = (volatile device float4 *) out;
    staged[i] = x[i];
    row[i] = staged[i].y;
    threadgroup_barrier(mem_flags::mem_device_and_threadgroup);
    const float4 r = *((device volatile const float4 *) (out + 4*(1 - i))) * 2.0f + x[i];
    const float sum = r.x + r.w + row[1 - i];
    threadgroup_barrier(mem_flags::mem_device);
    staged[i] = 0.0f;
    staged[i].z = sum;
}

kernel void kernel_shmem(constant kargs & args, device const char * src, device char * dst,
  threadgroup char * shmem [[threadgroup(0)]], uint3 tgpig[[threadgroup_position_in_grid]],
  ushort sgitg[[simdgroup_index_in_threadgroup]], ushort tiisg[[thread_index_in_simdgroup]]) {
    threadgroup half4 * sa = (threadgroup half4 *)(shmem);
    threadgroup float * sb = (threadgroup float *)(shmem + 256);
    sa[tiisg] = half4(tiisg);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    float4 acc = (float4) sa[31 - tiisg];
    FOR_UNROLL (short i = 0; i < 4; ++i) acc[i] += kvalues[i] + (has_kv ? nsg : 0);
    ((device float4 *) dst)[tiisg] = acc.wzyx;
}
"""


@pytest.fixture(scope="module", params=[False, True], ids=["fast", "checked"])
def lib(request: pytest.FixtureRequest) -> Library:
    library = compile(SOURCE, constants={102: 7}, checked=request.param)
    library.build(library.kernels)
    return library


ARGS = np.array([(64, 36)], dtype=[("ne00", np.int64), ("nb01", np.uint64)]).tobytes()


def test_rows_of_quantised_blocks_through_a_function_as_template_argument(lib: Library) -> None:
    rng = np.random.default_rng(0)
    blocks = np.zeros((3, 2), dtype=[("d", np.float16), ("qs", np.uint8, 16)])
    blocks["d"] = rng.random((3, 2))
    blocks["qs"] = rng.integers(0, 256, (3, 2, 16))
    out = np.zeros((3, 64), np.float32)
    kernel = lib["kernel_get_rows_q4_0"]
    run = kernel.launch({0: ARGS, 1: blocks, 2: out}, threadgroups=3, threads=2, outputs=(2,))
    nibbles = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], -1).astype(np.float32)
    expected = (nibbles - 8) * blocks["d"].astype(np.float32)[..., None]
    np.testing.assert_array_equal(out, expected.reshape(3, 64))
    assert run.faults == ()


def test_typed_views_of_one_threadgroup_allocation(lib: Library) -> None:
    out = np.zeros((32, 4), np.float32)
    run = lib["kernel_shmem"].launch(
        {0: ARGS, 1: b"", 2: out}, threadgroups=1, threads=32, threadgroup_memory={0: 1024}, outputs=(2,)
    )
    table = np.array([0, 0.5, 1, 1.5]) + 7
    np.testing.assert_array_equal(out, (31 - np.arange(32))[:, None] + table[::-1])
    assert run.faults == ()


def test_volatile_vectors(lib: Library) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    out = np.empty_like(x)
    run = lib["kernel_reload"].launch(
        {0: x, 1: out.reshape(-1)}, threadgroups=1, threads=2, threadgroup_memory={0: 16}, outputs=(1,)
    )
    swapped = x[::-1]
    sums = 2 * (swapped[:, 0] + swapped[:, 3]) + x[:, 0] + x[:, 3] + swapped[:, 1]
    np.testing.assert_array_equal(out, np.stack([0 * sums, 0 * sums, sums, 0 * sums], -1))
    assert run.faults == ()


SORTED = r"""
#include <metal_stdlib>
using namespace metal;
template <typename T, typename U, bool INDICES>
struct Pick {
  static void store(device const T* in, device U* out, uint i) {
    if (INDICES) out[i] = i;
    else { out[i] = in[i]; }
  }
};
template <typename T, typename U, bool INDICES>
kernel void pick(device const T* in, device U* out, uint i [[thread_position_in_grid]]) {
  Pick<T, U, INDICES>::store(in, out, i);
  if (INDICES) { out[i] += 1; } else out[i] = in[i];
}
template [[host_name("indices")]] kernel void pick<bfloat, uint, true>(device const bfloat*, device uint*, uint);
template [[host_name("values")]] kernel void pick<bfloat, bfloat, false>(device const bfloat*, device bfloat*, uint);
"""


@pytest.mark.parametrize("checked", [False, True])
def test_one_text_for_values_and_indices(checked: bool) -> None:
    lib = compile(SORTED, checked=checked)
    values = np.arange(8).astype(ml_dtypes.bfloat16)
    for name, expected in (("indices", np.arange(8, dtype=np.uint32) + 1), ("values", values)):
        out = np.zeros_like(expected)
        run = lib[name].launch({0: values, 1: out}, threadgroups=1, threads=8)
        assert run.faults == ()
        assert out.tolist() == expected.tolist()
