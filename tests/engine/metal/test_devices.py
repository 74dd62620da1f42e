"""What both devices must do alike: the same kernels, launches and expectations on the host CPU and on an Apple GPU."""

import struct
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from engine.metal import gpu
from engine.metal.errors import CompileError, MetalError
from engine.metal.library import Kernel, Library, compile

SOURCE = """
#include <metal_stdlib>
using namespace metal;
constant int addend [[function_constant(0)]];
constant bool negate [[function_constant(1)]];
constant float4 weights [[function_constant(2)]];
struct Args { int n; float scale; };

kernel void copy(device const float * in, device float * out, constant Args & args,
                 uint i [[thread_position_in_grid]]) {
    if (int(i) < args.n) { out[i] = in[i] * args.scale; }
}
kernel void group_sum(device const float * in, device float * out, threadgroup float * staged [[threadgroup(0)]],
                      ushort i [[thread_position_in_threadgroup]], ushort n [[threads_per_threadgroup]],
                      uint group [[threadgroup_position_in_grid]]) {
    staged[i] = in[group * n + i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (ushort half_way = n / 2; half_way > 0; half_way /= 2) {
        if (i < half_way) { staged[i] += staged[i + half_way]; }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (i == 0) { out[group] = staged[0]; }
}
kernel void lane_sums(device int * data, uint i [[thread_position_in_grid]]) { data[i] = simd_sum(data[i]); }
kernel void specialised(device int * data, uint i [[thread_position_in_grid]]) {
    data[i] = negate ? -(data[i] + addend) : data[i] + addend;
}
kernel void dotted(device const float4 * in, device float * out, uint i [[thread_position_in_grid]]) {
    out[i] = dot(in[i], weights);
}
kernel void histogram(device const uint * in, device atomic_uint * bins, uint i [[thread_position_in_grid]]) {
    atomic_fetch_add_explicit(bins + in[i], 1u, memory_order_relaxed);
}
kernel void place(device uint * out, uint2 at [[thread_position_in_grid]], uint2 size [[threads_per_grid]]) {
    out[at.y * size.x + at.x] = at.y * 1000 + at.x;
}
kernel void untouched(device float * out) {}
"""
CONSTANTS = {0: 7, "negate": True, 2: (1.0, 2.0, 3.0, 4.0)}
GPU = pytest.param("gpu", marks=pytest.mark.skipif(bool(gpu.unavailable()), reason=gpu.unavailable() or "it is here"))


@pytest.fixture(scope="module", params=["host", GPU])
def lib(request: pytest.FixtureRequest) -> Iterator[Library]:
    library = compile(SOURCE, device=request.param, constants=CONSTANTS)
    library.build(library.kernels)
    yield library
    library.close()


@pytest.fixture
def kernel(lib: Library) -> Callable[[str], Kernel]:
    return lambda name: lib[name]


def test_both_name_the_same_kernels_and_parameters(lib: Library) -> None:
    assert lib.kernels == [
        "copy", "group_sum", "lane_sums", "specialised", "dotted", "histogram", "place", "untouched"
    ]  # fmt: skip
    known = [(p.name, p.index, p.kind, p.address_space) for p in lib["group_sum"].parameters[:3]]
    assert known == [
        ("in", 0, "buffer", "device"),
        ("out", 1, "buffer", "device"),
        ("staged", 0, "threadgroup", "threadgroup"),
    ]


def test_a_copy_with_a_struct(kernel: Callable[[str], Kernel]) -> None:
    x, y = np.arange(100, dtype=np.float32), np.zeros(100, np.float32)
    run = kernel("copy").launch({0: x, 1: y, 2: struct.pack("if", 90, 2.0)}, threadgroups=4, threads=32)
    np.testing.assert_array_equal(y, np.where(np.arange(100) < 90, 2 * x, 0))
    assert run.faults == ()
    assert run.kernel == "copy"
    assert run.stats.threadgroups == 4


def test_a_reduction_in_threadgroup_memory(kernel: Callable[[str], Kernel]) -> None:
    x = np.random.default_rng(0).integers(-99, 99, (5, 128)).astype(np.float32)  # whole numbers: any order is exact
    y = np.empty(5, np.float32)
    run = kernel("group_sum").launch(
        {0: x, 1: y}, threadgroups=5, threads=128, threadgroup_memory={0: 4 * 128}, outputs=(1,)
    )
    np.testing.assert_array_equal(y, x.sum(1))
    assert run.stats.threadgroup_memory_bytes == 512


def test_simd_sum(kernel: Callable[[str], Kernel]) -> None:
    data = np.arange(64, dtype=np.int32)
    kernel("lane_sums").launch({0: data}, threadgroups=1, threads=64)
    np.testing.assert_array_equal(data, np.repeat(np.arange(64).reshape(2, 32).sum(1), 32))


def test_function_constants_by_index_and_by_name(kernel: Callable[[str], Kernel]) -> None:
    data = np.arange(32, dtype=np.int32)
    kernel("specialised").launch({0: data}, threadgroups=1, threads=32)
    np.testing.assert_array_equal(data, -(np.arange(32) + 7))


def test_a_vector_as_function_constant(kernel: Callable[[str], Kernel]) -> None:
    x, y = np.arange(128, dtype=np.float32).reshape(32, 4), np.zeros(32, np.float32)
    kernel("dotted").launch({0: x, 1: y}, threadgroups=1, threads=32)
    np.testing.assert_array_equal(y, x @ np.array([1, 2, 3, 4], np.float32))


def test_atomics(kernel: Callable[[str], Kernel]) -> None:
    values = np.random.default_rng(0).integers(0, 10, 1000, dtype=np.uint32)
    bins = np.zeros(10, np.uint32)
    kernel("histogram").launch({0: values, 1: bins}, grid=1000, threads=64)
    np.testing.assert_array_equal(bins, np.bincount(values, minlength=10))


def test_a_grid_of_threads_ends_where_it_should(kernel: Callable[[str], Kernel]) -> None:
    out = np.zeros((5, 7), np.uint32)
    run = kernel("place").launch({0: out}, grid=(7, 5), threads=(4, 4))
    np.testing.assert_array_equal(out, np.arange(5)[:, None] * 1000 + np.arange(7))
    assert run.stats.threadgroups == 4


def test_outputs_start_as_nans(kernel: Callable[[str], Kernel]) -> None:
    out = np.zeros(8, np.float32)
    kernel("untouched").launch({0: out}, threadgroups=1, threads=1, outputs=(0,))
    assert np.isnan(out).all()


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ({"threads": 2048, "threadgroups": 1}, "at most"),
        ({"threads": 32}, "either threadgroups"),
        ({"threads": 32, "threadgroups": 1, "threadgroup_memory": {3: 16}}, "no threadgroup"),
        ({"threads": 32, "threadgroups": 1, "outputs": (9,)}, "9"),
    ],
)
def test_a_launch_that_metal_could_not_issue_is_refused(
    kernel: Callable[[str], Kernel], launch: dict[str, object], words: str
) -> None:
    with pytest.raises(MetalError, match=words):
        kernel("untouched").launch({0: np.zeros(8, np.float32)}, **launch)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["host", GPU])
def test_wrong_source_is_refused(device: str) -> None:
    with pytest.raises(CompileError):
        compile("kernel void k(device int * p) { p[0] = nonsense; }", device=device)["k"]


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(MetalError, match=r"'host'.*'gpu'"):
        compile(SOURCE, device="tpu")


@pytest.mark.skipif(not gpu.unavailable(), reason="an Apple GPU is here")
def test_without_a_gpu_the_reason_is_one_line() -> None:
    with pytest.raises(MetalError, match=r"can't be used: .*(device='host'|pip install)") as raised:
        compile(SOURCE, device="gpu")
    assert "\n" not in str(raised.value)


def test_checked_mode_is_the_hosts() -> None:
    with pytest.raises(MetalError, match="device='host'"):
        compile(SOURCE, device="gpu", checked=True)
