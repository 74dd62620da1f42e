"""What may be bound to a kernel's buffers: dtypes, missing buffers, arrays that share memory, seeds."""

import ctypes
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engine.metal.errors import MetalError
from engine.metal.library import Library, compile

SOURCE = """
#include <metal_stdlib>
using namespace metal;
constant bool masked [[function_constant(0)]];
constant bool has_mask = masked;
struct Pair { float a; int b; };

kernel void floats(device const float* x, device float4* y, uint i [[thread_position_in_grid]]) { y[i] = x[i]; }
kernel void halves(device half* x, device packed_half3* y) { y[0] = x[0]; }
kernel void bfloats(device bfloat* x) { x[0] = bfloat(2.0f); }
kernel void integers(device uint* x, device const short4* y, constant ulong& n) { x[0] = y[0].x + uint(n); }
kernel void counts(device atomic_uint* x, device atomic_float* y) {
  atomic_fetch_add_explicit(x, 1u, memory_order_relaxed);
  atomic_fetch_add_explicit(y, 1.0f, memory_order_relaxed);
}
kernel void raw(device void* x, device uchar* y, device Pair* z, device bool* w, device char* v) {
  ((device float*)x)[0] = y[0] + z[0].a + w[0] + v[0];
}
kernel void scalar(device float* x, constant float& k, constant int& n) { x[0] = k + n; }
template <typename T> [[kernel]] void typed(device const T* x, device T* y) { y[0] = x[0]; }
template [[host_name("typed_float")]] kernel void typed<float>(device const float*, device float*);
template [[host_name("typed_half")]] kernel void typed<half>(device const half*, device half*);

kernel void guarded(device float* x [[buffer(0)]], device const float* mask [[buffer(1), function_constant(masked)]],
                    device const float* bias [[buffer(2), function_constant(has_mask)]]) {
  x[0] = masked ? mask[0] : 5;
}
template <bool batched, bool strided> [[kernel]] void batches(device float* x [[buffer(0)]],
                                                              constant int& n [[buffer(1)]],
                                                              device const int* strides [[buffer(2)]],
                                                              device const int* unused [[buffer(3)]]) {
  int at = 0;
  if (batched) {
    if (n > 1) at = strides[0];
  } else if (strided) {
    at = strides[1];
  }
  if (n > 0) {
    x[at & 7] = n;
  }
}
#define BATCHES(name, strided)                                                                                        \\
  template [[host_name(name)]] kernel void batches<false, strided>(device float*, constant int&, device const int*,   \\
                                                                   device const int*);
BATCHES("batches", false)
BATCHES("strided_batches", true)
kernel void either(device float* x, device const int* maybe [[buffer(3)]], constant bool& use) {
  x[0] = use ? maybe[0] : 5;
}
kernel void add(device int* a, device const int* b, uint i [[thread_position_in_grid]]) { a[i] += b[i]; }
kernel void shifted(device const int* from, device int* to, uint i [[thread_position_in_grid]]) {
  to[i + 4] = from[i];
}
kernel void same(device const int* a, device const int* b, device bool* c) { c[0] = a == b; }
"""


@pytest.fixture(scope="module", params=[False, True], ids=["fast", "checked"])
def lib(request: pytest.FixtureRequest) -> Iterator[Library]:
    library = compile(SOURCE, checked=request.param, constants={"masked": False})
    library.build(library.kernels)
    yield library
    library.close()


def zeros(dtype: Any, count: int = 16) -> np.ndarray[Any, Any]:
    return np.zeros(count, dtype)


F4, F2, BF, U1 = np.float32, np.float16, ml_dtypes.bfloat16, np.uint8
FITS: list[tuple[str, list[Any]]] = [
    ("floats", [F4, F4]), ("floats", [U1, U1]), ("floats", [np.complex64, F4]), ("halves", [F2, F2]),
    ("bfloats", [BF]), ("bfloats", [np.uint16]), ("bfloats", [U1]),
    ("integers", [np.uint32, np.int16, np.uint64]), ("integers", [np.int32, np.uint16, np.int64]),
    ("counts", [np.uint32, F4]), ("raw", [np.float64, np.int32, BF, np.bool_, F2]), ("typed_half", [F2, F2]),
    ("raw", [U1, np.dtype([("a", "f4"), ("b", "i4")]), np.dtype([("a", "f4"), ("b", "i4")]), U1, U1]),
    ("floats", [np.dtype([("x", "f4"), ("y", "f4")]), F4]),
]  # fmt: skip
UNFIT: list[tuple[str, list[Any], str]] = [
    ("floats", [F2, F4], r"buffer\(0\) 'x' is a device const float \*, which holds float32; the array is float16"),
    ("floats", [np.float64, F4], "holds float32; the array is float64"),
    ("floats", [F4, BF], r"buffer\(1\) 'y' is a device float4 \*, which holds float32; the array is bfloat16"),
    ("floats", [np.int32, F4], "the array is int32"),
    ("halves", [F4, F2], "which holds float16; the array is float32"),
    ("halves", [F2, BF], "which holds float16; the array is bfloat16"),
    ("bfloats", [F2], r"holds bfloat16 \(ml_dtypes.bfloat16, or its bits as uint16\); the array is float16"),
    ("integers", [np.uint64, np.int16, np.uint64], "holds int32 or uint32; the array is uint64"),
    ("integers", [F4, np.int16, np.uint64], "holds int32 or uint32; the array is float32"),
    ("counts", [np.uint32, np.uint32], "holds float32; the array is uint32"),
    ("typed_float", [F2, F2], "holds float32; the array is float16"),
    ("typed_half", [F2, F4], "holds float16; the array is float32"),
]


@pytest.mark.parametrize(("kernel", "dtypes"), FITS)
def test_arrays_of_the_kernels_types_and_bytes_are_taken(lib: Library, kernel: str, dtypes: list[Any]) -> None:
    indices = [p.index for p in lib[kernel].parameters if p.kind == "buffer"]
    buffers: dict[int, Any] = {i: zeros(t) for i, t in zip(indices, dtypes, strict=True) if i is not None}
    assert lib[kernel].launch(buffers, threads=1, threadgroups=1).faults == ()


@pytest.mark.parametrize(("kernel", "dtypes", "message"), UNFIT)
def test_arrays_of_other_types_are_refused(lib: Library, kernel: str, dtypes: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        lib[kernel].launch({i: zeros(t) for i, t in enumerate(dtypes)}, threads=1, threadgroups=1)
    assert ".view(np.uint8)" in str(refused.value)


@pytest.mark.parametrize(
    ("k", "n", "message"),
    [
        (np.float32(1), np.int32(2), ""),
        (np.float32(1), np.uint32(2), ""),
        (ctypes.c_float(1), ctypes.c_int(2), ""),
        (b"\0\0\x80\x3f", np.array(2, np.int32), ""),
        (np.int32(1), np.int32(2), "buffer\\(1\\) 'k' is a constant float &, which holds float32; the array is int32"),
        (np.float32(1), np.float32(2), "holds int32 or uint32"),
        (np.float64(1), np.int32(2), "holds float32; the array is float64"),
        (np.float32(1), np.int64(2), "holds int32 or uint32; the array is int64"),
        (ctypes.c_double(1), np.int32(2), "holds float32; the array is float64"),
    ],
)
def test_scalars_have_the_kernels_type(lib: Library, k: object, n: object, message: str) -> None:
    x = zeros(F4)
    if not message:
        lib["scalar"].launch({0: x, 1: k, 2: n}, threads=1, threadgroups=1)
        assert x[0] == 3
        return
    with pytest.raises(MetalError, match=message):
        lib["scalar"].launch({0: x, 1: k, 2: n}, threads=1, threadgroups=1)


def test_a_buffer_that_nobody_mentions_is_an_error(lib: Library) -> None:
    with pytest.raises(ValueError, match=r"floats: nothing is bound to buffer\(0\) 'x', buffer\(1\) 'y'; pass {0: N"):
        lib["floats"].launch({}, threads=1, threadgroups=1)
    with pytest.raises(ValueError, match=r"either: nothing is bound to buffer\(3\) 'maybe'"):
        lib["either"].launch({0: zeros(F4), 1: np.bool_(False)}, threads=1, threadgroups=1)


def test_none_is_a_buffer_without_bytes(lib: Library) -> None:
    x = zeros(F4)
    run = lib["either"].launch({0: x, 1: np.bool_(False), 3: None}, threads=1, threadgroups=1)
    assert (x[0], run.faults) == (5, ())


def test_using_a_buffer_that_is_not_bound_is_a_fault(lib: Library) -> None:
    run = lib["either"].launch({0: zeros(F4), 1: np.bool_(True), 3: None}, threads=1, threadgroups=1)
    (fault,) = run.faults
    assert (fault.kind, fault.buffer, fault.offset) == ("out-of-bounds-read", 3, 0)
    assert fault.line == next(n for n, text in enumerate(SOURCE.splitlines(), 1) if "? maybe[0]" in text)
    assert "(it isn't bound)" in fault.message


def test_what_a_function_constant_takes_away_is_not_missing(lib: Library) -> None:
    x = zeros(F4)
    assert lib["guarded"].launch({0: x}, threads=1, threadgroups=1).faults == ()
    assert x[0] == 5
    active = compile(SOURCE, constants={"masked": True})["guarded"]
    with pytest.raises(MetalError, match=r"nothing is bound to buffer\(1\) 'mask'"):
        active.launch({0: x, 2: x}, threads=1, threadgroups=1)
    active.launch({0: x, 1: np.full(1, 3, F4)}, threads=1, threadgroups=1)
    assert x[0] == 3


def test_what_only_conditional_blocks_use_may_be_left_out(lib: Library) -> None:
    x = zeros(F4)
    assert lib["batches"].launch({0: x, 1: np.int32(3)}, threads=1, threadgroups=1).faults == ()
    assert x[0] == 3
    with pytest.raises(MetalError, match=r"batches: nothing is bound to buffer\(0\) 'x', buffer\(1\) 'n'; pass"):
        lib["batches"].launch({}, threads=1, threadgroups=1)
    (fault,) = lib["strided_batches"].launch({0: x, 1: np.int32(7)}, threads=1, threadgroups=1).faults
    assert (fault.kind, fault.buffer, fault.offset) == ("out-of-bounds-read", 2, 4)


def test_one_array_bound_twice_is_one_buffer(lib: Library) -> None:
    a = np.arange(32, dtype=np.int32)
    assert lib["add"].launch({0: a, 1: a}, threadgroups=1, threads=32).faults == ()
    np.testing.assert_array_equal(a, 2 * np.arange(32))
    seen = zeros(np.bool_, 1)
    lib["same"].launch({0: a, 1: a, 2: seen}, threadgroups=1, threads=1)
    assert seen[0], "kernels compare pointers"
    lib["same"].launch({0: a, 1: a.copy(), 2: seen}, threadgroups=1, threads=1)
    assert not seen[0]


def test_arrays_that_overlap_are_one_memory_at_two_offsets(lib: Library) -> None:
    memory = np.arange(20, dtype=np.int32)
    run = lib["shifted"].launch({0: memory[2:10], 1: memory[8:20]}, threadgroups=1, threads=4, schedule_seed=0)
    np.testing.assert_array_equal(memory, [*range(12), 2, 3, 4, 5, *range(16, 20)])
    assert run.faults == ()
    # Within what they span together the kernel may go; a fault counts from the array that begins first.
    run = lib["shifted"].launch({0: memory[2:14], 1: memory[0:12]}, threadgroups=1, threads=11)
    faults = [fault for fault in run.faults if fault.kind != "race"]
    assert {(fault.kind, fault.buffer, fault.offset) for fault in faults} == {("out-of-bounds-write", 1, 56)}


def test_inputs_that_overlap_keep_their_own_bounds(lib: Library) -> None:
    memory, out = np.arange(20, dtype=np.int32), zeros(np.int32, 8)
    lib["add"].launch({0: out, 1: memory[2:10]}, threadgroups=1, threads=8)
    np.testing.assert_array_equal(out, memory[2:10])
    seen = zeros(np.bool_, 1)
    lib["same"].launch({0: memory[2:10], 1: memory[2:12], 2: seen}, threadgroups=1, threads=1)
    assert not seen[0]


def test_a_strided_input_is_copied_but_not_beside_its_own_output(lib: Library) -> None:
    a, b = np.zeros(8, np.int32), np.arange(16, dtype=np.int32)
    lib["add"].launch({0: a, 1: b[::2]}, threadgroups=1, threads=8)
    np.testing.assert_array_equal(a, np.arange(0, 16, 2))
    lib["add"].launch({0: a, 1: np.broadcast_to(np.int32(1), 8)}, threadgroups=1, threads=8)
    np.testing.assert_array_equal(a, np.arange(0, 16, 2) + 1)
    with pytest.raises(MetalError, match=r"buffer\(1\) is not contiguous and shares memory with buffer\(0\)"):
        lib["add"].launch({0: b[:8], 1: b[::2]}, threadgroups=1, threads=8)


def test_outputs_are_not_poisoned_under_an_input(lib: Library) -> None:
    a = np.arange(8, dtype=np.int32)
    with pytest.raises(MetalError, match=r"outputs names buffer\(0\), but buffer\(1\) shares its memory"):
        lib["add"].launch({0: a, 1: a}, threadgroups=1, threads=8, outputs=(0,))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1", True, np.float32(2)])
def test_a_seed_is_an_integer_of_64_bits(lib: Library, seed: Any) -> None:
    with pytest.raises(MetalError, match=r"schedule_seed=.*: an integer from 0 to 2\*\*64 - 1 is wanted"):
        lib["floats"].launch({0: zeros(F4), 1: zeros(F4)}, threadgroups=1, threads=1, schedule_seed=seed)


@pytest.mark.parametrize("seed", [None, 0, 2**64 - 1, np.int64(3)])
def test_seeds_from_the_whole_range_are_taken(lib: Library, seed: Any) -> None:
    x, y = np.arange(16, dtype=F4), zeros(F4, 64)
    lib["floats"].launch({0: x, 1: y}, threadgroups=2, threads=8, schedule_seed=seed)
    np.testing.assert_array_equal(y, np.repeat(x, 4))
