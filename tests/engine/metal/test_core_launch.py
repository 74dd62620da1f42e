"""Launching kernels: builtins, scheduling, threadgroup memory, and every way in which a kernel can go wrong.

Long because it is a table: one short kernel and what must come of it, again and again, over one set of fixtures.
"""

import ctypes
import math
import re
import struct
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engine.metal.errors import CompileError, MetalError
from engine.metal.library import Kernel, Library, compile

SOURCE = """
#include <metal_stdlib>
using namespace metal;
struct args { int n; float k; };

kernel void scale(device const float* in, device float* out, constant args& a, uint i [[thread_position_in_grid]]) {
  if (int(i) < a.n) out[i] = in[i] * a.k;
}
kernel void meets_for_ever(device int* p) {
  while (p[0] == 0) { threadgroup_barrier(mem_flags::mem_none); }
}
kernel void positions(device uint* out, uint3 grid [[thread_position_in_grid]],
    uint3 in_group [[thread_position_in_threadgroup]],
    ushort3 group [[threadgroup_position_in_grid]], uint3 grid_size_ [[threads_per_grid]],
    uint3 groups [[threadgroups_per_grid]],
    ushort3 threads [[threads_per_threadgroup]], uint3 nominal [[dispatch_threads_per_threadgroup]],
    ushort index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simd [[simdgroup_index_in_threadgroup]],
    uint simds [[simdgroups_per_threadgroup]], uint all_simds [[dispatch_simdgroups_per_threadgroup]],
    ushort width [[threads_per_simdgroup]], uint quad_lane [[thread_index_in_quadgroup]],
    uint quad [[quadgroup_index_in_threadgroup]],
    uint quads [[quadgroups_per_threadgroup]]) {
  device uint* o = out + ((grid.z * grid_size_.y + grid.y) * grid_size_.x + grid.x) * 32;
  for (int d = 0; d < 3; d++) {
    o[d] = grid[d]; o[3 + d] = in_group[d]; o[6 + d] = group[d]; o[9 + d] = grid_size_[d]; o[12 + d] = groups[d];
    o[15 + d] = threads[d]; o[18 + d] = nominal[d];
  }
  o[21] = index; o[22] = lane; o[23] = simd; o[24] = simds; o[25] = all_simds; o[26] = width; o[27] = quad_lane;
    o[28] = quad;
  o[29] = quads; o[30] = 1;
}
kernel void flat(device uint* out, ushort2 at [[thread_position_in_grid]], uint2 size [[threads_per_grid]],
    ushort group [[threadgroup_position_in_grid]]) {
  out[at.y * size.x + at.x] = group;
}
kernel void reverse(device float* data, threadgroup float* shared [[threadgroup(0)]],
    ushort i [[thread_position_in_threadgroup]],
    ushort n [[threads_per_threadgroup]]) {
  threadgroup float again[1024];
  shared[i] = data[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  again[i] = shared[n - 1 - i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  data[i] = again[i];
}
kernel void group_sums(device const int* in, device int* out, uint i [[thread_position_in_grid]],
    ushort t [[thread_index_in_threadgroup]],
    uint g [[threadgroup_position_in_grid]]) {
  threadgroup int total;
  if (t == 0) total = 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (ushort turn = 0; turn < 64; turn++) {
    if (turn == t) total += in[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  out[g] = total;
}
kernel void order(device atomic_int* next, device int* out, uint i [[thread_position_in_grid]]) {
  out[i] = atomic_fetch_add_explicit(next, 1, memory_order_relaxed);
}
kernel void lockstep(device float* out, ushort i [[thread_position_in_threadgroup]]) {
  threadgroup float s[64];
  s[i] = 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  s[63 - i] = i;  // no barrier: right only when the other thread runs first
  out[i] = s[i];
}
kernel void staging(device float* out, threadgroup float* s [[threadgroup(0)]],
    ushort i [[thread_position_in_threadgroup]]) { out[i] = s[i]; }
kernel void diverged(device int* out, ushort i [[thread_index_in_simdgroup]]) {
  int sum = 0;
  if (i % 2) sum = simd_sum(1);
  else for (ushort turn = 0; turn <= i / 8; turn++) sum += simd_sum(100);
  out[i] = sum + simd_sum(0);
}
kernel void leavers(device int* out, ushort i [[thread_index_in_simdgroup]]) {
  out[i] = -1;
  if (i >= 20) return;
  out[i] = simd_sum(1);
}
kernel void vertical(device int* p, ushort i [[thread_position_in_threadgroup]]) {
  if (i < 40) {
    threadgroup_barrier(mem_flags::mem_none);
    p[0] = 1;
  } else {
    threadgroup_barrier(mem_flags::mem_none);
    p[1] = 1;
  }
}
kernel void shuffled(device int* out, ushort i [[thread_index_in_simdgroup]]) {
  if (i < 16) out[i] = simd_shuffle(int(i), ushort(i + 16));
}
kernel void forever(device int* p) {
  while (p[0] == 0)
    p[1] += 1;
}
kernel void wild(device int* p, constant ulong& at) { p[at] = 1; }
kernel void trapped(device int* p) { if (p[3] == 0) __builtin_trap(); p[1] = 5; }
kernel void over(device char* p, device int* q, constant int& at) { p[at] = 7; q[0] = 1; }
kernel void over_group(device int* p, threadgroup char* s [[threadgroup(0)]], constant int& at) { s[at] = 7;
    p[0] = s[0]; }
kernel void optional(device int* out, device const int* maybe [[buffer(3)]],
    constant bool& use) { out[0] = use ? maybe[0] : 5; }
kernel void add(device int* a, device const int* b, uint i [[thread_position_in_grid]]) { a[i] += b[i]; }
[[max_total_threads_per_threadgroup(64)]] kernel void small(device int* p) { p[0] = 1; }
kernel void big(device int* p, ushort i [[thread_position_in_threadgroup]]) {
  threadgroup int a[5000];
  threadgroup int b[5000];
  a[i] = b[i] = i;
  p[i] = a[i];
}
"""


@pytest.fixture(scope="module")
def lib() -> Iterator[Library]:
    library = compile(SOURCE)
    library.build(library.kernels)
    yield library
    library.close()


def test_a_kernel_reads_bytes_and_writes_an_array(lib: Library) -> None:
    x, y = np.arange(100, dtype=np.float32), np.zeros(100, np.float32)
    run = lib["scale"].launch({0: x, 1: y, 2: struct.pack("if", 90, 3.0)}, threadgroups=4, threads=32)
    np.testing.assert_array_equal(y, np.where(np.arange(100) < 90, 3 * x, 0))
    assert run.faults == ()
    assert (run.device, run.kernel, run.stats.threadgroups) == ("host", "scale", 4)


def test_arguments_may_be_ctypes_scalars_and_read_only_or_strided_inputs(lib: Library) -> None:
    class Args(ctypes.Structure):
        _fields_ = (("n", ctypes.c_int), ("k", ctypes.c_float))

    x = np.arange(64, dtype=np.float32)
    x.flags.writeable = False
    y = np.zeros(32, np.float32)
    lib["scale"].launch({0: x[::2], 1: y, 2: Args(32, 2.0)}, grid=32, threads=32)
    np.testing.assert_array_equal(y, x[::2] * 2)


@pytest.mark.parametrize(
    ("grid", "threads"), [((5, 3, 2), (2, 3, 1)), ((70, 1, 1), (40, 1, 1)), ((4, 4, 4), (4, 4, 4))]
)
def test_every_builtin_in_a_grid_of_threads(
    lib: Library, grid: tuple[int, int, int], threads: tuple[int, int, int]
) -> None:
    out = np.zeros((*grid[::-1], 32), np.uint32)
    run = lib["positions"].launch({0: out}, grid=grid, threads=threads)
    groups = [math.ceil(whole / part) for whole, part in zip(grid, threads, strict=True)]
    assert run.stats.threadgroups == math.prod(groups)
    for z, y, x in np.ndindex(*grid[::-1]):
        at, got = (x, y, z), out[z, y, x]
        group = [a // t for a, t in zip(at, threads, strict=True)]
        inside = [a % t for a, t in zip(at, threads, strict=True)]
        actual = [min(t, whole - g * t) for t, whole, g in zip(threads, grid, group, strict=True)]
        index = inside[0] + actual[0] * (inside[1] + actual[1] * inside[2])
        count, nominal = math.prod(actual), math.prod(threads)
        expected = [*at, *inside, *group, *grid, *groups, *actual, *threads, index, index % 32, index // 32]
        expected += [-(-count // 32), -(-nominal // 32), 32, index % 4, index // 4, -(-count // 4), 1]
        assert got[:31].tolist() == expected


def test_a_grid_of_threadgroups_and_builtins_of_two_dimensions(lib: Library) -> None:
    out = np.zeros((4, 6), np.uint32)
    lib["flat"].launch({0: out}, threadgroups=(3, 2), threads=(2, 2))
    np.testing.assert_array_equal(out, np.tile(np.repeat([0, 1, 2], 2), (4, 1)))


@pytest.mark.parametrize("threads", [1, 32, 33, 1024])
@pytest.mark.parametrize("seed", [None, 1, 2**63])
def test_barriers_order_threadgroup_memory(lib: Library, threads: int, seed: int | None) -> None:
    data = np.arange(threads, dtype=np.float32)
    memory = {0: 4 * threads}
    run = lib["reverse"].launch(
        {0: data}, threadgroups=1, threads=threads, threadgroup_memory=memory, schedule_seed=seed
    )
    np.testing.assert_array_equal(data, np.arange(threads)[::-1])
    assert run.faults == ()
    assert run.stats.barriers == 2
    assert run.stats.threadgroup_memory_bytes == 4 * threads + 4096


@pytest.mark.parametrize("seed", [None, 7])
def test_many_threadgroups_have_their_own_memory(lib: Library, seed: int | None) -> None:
    values = np.random.default_rng(0).integers(0, 1000, (300, 64), dtype=np.int32)
    out = np.zeros(300, np.int32)
    run = lib["group_sums"].launch({0: values, 1: out}, threadgroups=300, threads=64, schedule_seed=seed)
    np.testing.assert_array_equal(out, values.sum(1))
    assert run.faults == ()
    assert run.stats.barriers == 300 * 65


def orders(lib: Library, seed: int | None) -> list[int]:
    out = np.zeros(256, np.int32)
    lib["order"].launch({0: np.zeros(1, np.int32), 1: out}, threadgroups=4, threads=64, schedule_seed=seed)
    assert sorted(out) == list(range(256))
    return [int(i) for i in np.argsort(out)]


def test_the_seed_permutes_lanes_simdgroups_and_threadgroups_reproducibly(lib: Library) -> None:
    assert orders(lib, None) == list(range(256))
    assert orders(lib, 3) == orders(lib, 3)
    runs = [orders(lib, seed) for seed in range(12)]
    assert len({tuple(run) for run in runs}) == 12
    assert len({tuple(i // 64 for i in run[::64]) for run in runs}) > 4, "threadgroups"
    assert len({run[0] // 32 % 2 for run in runs}) == 2, "simdgroups"
    assert len({tuple(i % 32 for i in run[:32]) for run in runs}) > 8, "lanes"


def test_a_missing_barrier_shows_under_another_order(lib: Library) -> None:
    def run(seed: int | None) -> tuple[float, ...]:
        out = np.zeros(64, np.float32)
        lib["lockstep"].launch({0: out}, threadgroups=1, threads=64, schedule_seed=seed)
        return tuple(out)

    assert len({run(seed) for seed in range(6)}) > 1


def test_threadgroup_memory_starts_as_nan_or_zero(lib: Library) -> None:
    for poison in (True, False):
        out = np.ones(32, np.float32)
        lib["staging"].launch({0: out}, threadgroups=1, threads=32, threadgroup_memory={0: 128}, poison=poison)
        assert np.isnan(out).all() if poison else (out == 0).all()


def test_outputs_are_filled_with_nan_patterns(lib: Library) -> None:
    out = np.zeros(64, np.float32)
    args = struct.pack("if", 8, 1.0)
    lib["scale"].launch({0: np.ones(64, np.float32), 1: out, 2: args}, grid=64, threads=32, outputs=(1,))
    assert (out[:8] == 1).all()
    assert np.isnan(out[8:]).all()


def test_lanes_that_diverge_exchange_among_themselves_and_meet_again(lib: Library) -> None:
    out = np.zeros(32, np.int32)
    run = lib["diverged"].launch({0: out}, threadgroups=1, threads=32)
    assert run.faults == ()
    assert (out[1::2] == 16).all()
    even = np.arange(0, 32, 2)
    expected = [sum(100 * sum(1 for lane in even if lane // 8 >= turn) for turn in range(i // 8 + 1)) for i in even]
    assert out[::2].tolist() == expected


def test_lanes_that_have_returned_take_no_part(lib: Library) -> None:
    out = np.zeros(32, np.int32)
    lib["leavers"].launch({0: out}, threadgroups=1, threads=32)
    assert out.tolist() == [20] * 20 + [-1] * 12


def line_of(text: str) -> int:
    return SOURCE[: SOURCE.index(text)].count("\n") + 1


def only_fault(kernel: Kernel, buffers: dict[int, Any], **launch: Any) -> Any:
    run = kernel.launch(buffers, **{"threadgroups": 1, "threads": 1, **launch})
    assert len(run.faults) == 1, run.faults
    return run.faults[0]


def test_threads_at_different_barriers_are_reported_with_both_lines(lib: Library) -> None:
    fault = only_fault(lib["vertical"], {0: np.zeros(2, np.int32)}, threads=64)
    first = line_of("  if (i < 40) {") + 1
    assert fault.kind == "barrier-divergence"
    assert (fault.line, fault.other_line) == (first, first + 3)
    assert (fault.thread, fault.other_thread) == ((0, 0, 0), (40, 0, 0))


def test_reading_a_lane_that_takes_no_part_is_reported(lib: Library) -> None:
    fault = only_fault(lib["shuffled"], {0: np.zeros(32, np.int32)}, threads=32)
    assert fault.kind == "simdgroup-divergence"
    assert fault.line == line_of("if (i < 16) out[i] = simd_shuffle")
    assert fault.other_thread[0] >= 16


def test_a_kernel_that_never_ends_is_stopped(lib: Library) -> None:
    p = np.zeros(2, np.int32)
    began = time.perf_counter()
    fault = only_fault(lib["forever"], {0: p}, timeout=0.2)
    assert time.perf_counter() - began < 2
    assert fault.kind == "timeout"
    assert line_of("while (p[0] == 0)") <= fault.line <= line_of("p[1] += 1;")
    assert (p == 0).all(), "arrays stay as they were"


def test_a_crash_is_reported_and_the_next_launch_works(lib: Library) -> None:
    p = np.array([7, 1, 0, 0], np.int32)
    run = lib["trapped"].launch({0: p}, threadgroups=1, threads=1)
    (fault,) = run.faults
    assert (fault.kind, fault.line, fault.thread) == ("crash", line_of("kernel void trapped"), (0, 0, 0))
    assert "SIGILL" in fault.message or "SIGTRAP" in fault.message
    assert not run.completed
    test_a_kernel_reads_bytes_and_writes_an_array(lib)


def test_a_stack_that_overflows_is_reported(lib: Library) -> None:
    text = "int a[100000]; for (int i = 0; i < 100000; i++) a[i] = p[i % 4]; p[0] = a[p[1]];"
    library = compile("#include <metal_stdlib>\nkernel void deep(device int* p) { " + text + " }")
    fault = only_fault(library["deep"], {0: np.zeros(4, np.int32)})
    library.close()
    assert (fault.kind, fault.line) == ("crash", 2)
    assert "stack" in fault.message


def test_threads_that_only_meet_are_named_when_their_time_is_up(lib: Library) -> None:
    for _ in range(5):
        fault = only_fault(lib["meets_for_ever"], {0: np.zeros(1, np.int32)}, threads=64, timeout=0.05)
        assert (fault.kind, fault.line) == ("timeout", line_of("threadgroup_barrier(mem_flags::mem_none); }"))
        assert fault.thread is not None and fault.threadgroup == (0, 0, 0)


# Of dividend, divisor, quotient and remainder: what Metal leaves unspecified is what an ARM processor computes.
LEAST = -(2**31)
DIVISIONS = [(7, 0, 0, 7), (LEAST, 0, LEAST, 0), (LEAST, -1, LEAST, 0), (-7, 2, -3, -1), (0, 0, 0, 0)]


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize(("name", "bits"), [("int", 32), ("long", 64), ("short", 16), ("uchar", 8)])
def test_a_division_by_zero_goes_on(name: str, bits: int, checked: bool) -> None:
    text = f"""kernel void divide(device const {name} * a [[buffer(0)]], device const {name} * b [[buffer(1)]],
        device {name} * quotient [[buffer(2)]], device {name} * rest [[buffer(3)]], uint i [[thread_position_in_grid]])
        {{ quotient[i] = a[i] / b[i]; rest[i] = a[i] % b[i]; }}"""
    dtype = np.dtype(f"{'u' if name[0] == 'u' else 'i'}{bits // 8}")
    least = -(2 ** (bits - 1))
    rows = [[least if number == LEAST else number for number in row] for row in DIVISIONS]
    if bits < 32:  # divided as int, of which these are not the least
        rows = [row for row in rows if least not in row and min(row) >= np.iinfo(dtype).min]
    dividend, divisor, quotient, remainder = np.array(rows, dtype).T.copy()
    results = np.zeros_like(quotient), np.zeros_like(remainder)
    kernel = compile(text, checked=checked)["divide"]
    run = kernel.launch({0: dividend, 1: divisor, 2: results[0], 3: results[1]}, threads=len(rows), threadgroups=1)
    assert run.faults == () and run.completed
    assert np.array_equal(results[0], quotient)
    assert np.array_equal(results[1], remainder)


@pytest.mark.parametrize(("at", "offset"), [(10, 10), (500, 500), (-1, -1), (-300, -300)])
def test_writes_into_guard_gaps_name_the_buffer_and_the_offset(lib: Library, at: int, offset: int) -> None:
    fault = only_fault(lib["over"], {0: np.zeros(10, np.uint8), 1: np.zeros(4, np.int32), 2: np.int32(at)})
    assert (fault.kind, fault.address_space, fault.buffer, fault.offset) == ("out-of-bounds-write", "device", 0, offset)
    again = lib["over"].launch(
        {0: np.zeros(10, np.uint8), 1: np.zeros(4, np.int32), 2: np.int32(3)}, threadgroups=1, threads=1
    )
    assert again.faults == (), "the gap is whole again"


@pytest.mark.parametrize("at", [64, 100, -1])
def test_writes_past_threadgroup_memory_are_seen(lib: Library, at: int) -> None:
    buffers = {0: np.zeros(4, np.int32), 1: np.int32(at)}
    fault = only_fault(lib["over_group"], buffers, threadgroup_memory={0: 64})
    assert (fault.kind, fault.address_space, fault.buffer, fault.offset) == (
        "out-of-bounds-write",
        "threadgroup",
        0,
        at,
    )


ARGS = struct.pack("if", 0, 0.0)
REFUSED: list[tuple[str, dict[int, Any], dict[str, Any], str]] = [
    ("scale", {7: b""}, {}, r"scale has no buffer\(7\); it has \[0, 1, 2\]"),
    (
        "scale",
        {0: b"", 1: np.zeros((4, 4), np.float32).T, 2: ARGS},
        {},
        r"buffer\(1\) 'out' is written in place, so its array must be C-contiguous",
    ),
    (
        "scale",
        {0: b"", 1: np.frombuffer(b"1234", np.float32), 2: ARGS},
        {},
        r"buffer\(1\) 'out' is written in place, but its array is read-only",
    ),
    ("scale", {0: b"", 1: b"", 2: 3.0}, {}, r"a Python number has no size; pass np.uint32\(3.0\)"),
    ("scale", {0: [1, 2], 1: b"", 2: ARGS}, {}, "list can't be bound"),
    ("scale", {0: np.array([None]), 1: b"", 2: ARGS}, {}, "Python objects"),
    ("scale", {0: b"", 1: b"", 2: b"1234"}, {}, r"buffer\(2\) 'a' is a constant args & of 8 bytes, not of 4"),
    ("scale", {0: b"", 1: b"", 2: ARGS}, {"outputs": (1,)}, r"outputs names buffer\(1\)"),
    ("scale", {}, {"threads": (64, 17)}, "has at most 1024 threads"),
    ("scale", {}, {"threads": 0}, "positive integers"),
    ("scale", {}, {"threadgroups": (1, 0, 1)}, "positive integers"),
    ("scale", {}, {"grid": 3}, "either threadgroups"),
    ("scale", {}, {"timeout": 0}, "timeout=0"),
    ("small", {}, {"threads": 65}, "at most 64 threads"),
    ("scale", {}, {"threadgroups": (70000, 70000)}, "more than the host can count"),
    ("scale", {}, {"threadgroup_memory": {0: 4}}, r"scale has no threadgroup\(0\)"),
    ("staging", {}, {}, r"pass threadgroup_memory=\{0: bytes\} for its 's'"),
    ("staging", {}, {"threadgroup_memory": {0: 40000}}, "40000 bytes of threadgroup memory; a GPU has 32768"),
    ("big", {0: np.zeros(4, np.int32)}, {}, "40000 bytes of threadgroup memory; a GPU has 32768"),
]


@pytest.mark.parametrize(("name", "buffers", "launch", "message"), REFUSED)
def test_what_metal_could_not_launch_is_refused(
    lib: Library, name: str, buffers: dict[int, Any], launch: dict[str, Any], message: str
) -> None:
    with pytest.raises(MetalError, match=message):
        lib[name].launch(buffers, **{"threadgroups": 1, "threads": 1, **launch})


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("kernel void f(device int* p) {\n  p[0] = nowhere;\n}", 4, "nowhere"),
        ("kernel void f(device int* p,\n  texture2d<float> t [[texture(0)]]) {}", 4, "texture2d"),
        ("kernel void f(device int* p,\n  sampler s [[sampler(0)]]) {}", 4, "`?sampler`?.* is not supported"),
        ("template <typename T> void g(T x) {\n  x.no();\n}\nkernel void f(device int* p) { g(p[0]); }", 4, "int"),
        ("kernel void f(device float4* p) {\n  p[0] = dot(p[0]);\n}", 4, "dot"),
        ("kernel void f(device float* p) {\n  p[0] = simd_sum(p);\n}", 4, "simd_sum"),
    ],
)
def test_compile_errors_point_at_the_users_line(text: str, line: int, message: str) -> None:
    with pytest.raises(CompileError, match=message) as raised:
        compile("#include <metal_stdlib>\nusing namespace metal;\n" + text)["f"]
    assert (raised.value.file, raised.value.line) == ("program_source", line)
    assert re.match(rf"program_source:{line}: ", str(raised.value))


def test_other_devices_are_not_pretended() -> None:
    with pytest.raises(MetalError, match=r"'cuda' is unknown; pass 'host'"):
        compile(SOURCE, device="cuda")


def test_a_launch_costs_well_under_a_millisecond(lib: Library) -> None:
    x, y, args = np.ones(64, np.float32), np.zeros(64, np.float32), struct.pack("if", 64, 1.0)
    kernel = lib["scale"]
    times = [kernel.launch({0: x, 1: y, 2: args}, threadgroups=2, threads=32).stats.wall_seconds for _ in range(200)]
    assert sorted(times)[100] < 5e-4


PARTING = r"""
#include <metal_stdlib>
using namespace metal;
constant uint n [[function_constant(0)]];
#define KERNEL(name) kernel void name(device uint* out, uint i [[thread_index_in_simdgroup]])

KERNEL(skips) {
  uint sum = 0;
  for (uint j = 0; j < n; j++) { sum += simd_sum(1u); if (i < 16) sum += 100 * simd_sum(1u); }
  out[i] = sum;
}
KERNEL(goes_on) {
  uint sum = 0;
  for (uint j = 0; j < n; j++) { if (i == j) continue; sum += simd_sum(1u); }
  out[i] = sum;
}
KERNEL(nested) {
  uint sum = 0, j = 0;
  while (j++ < n)
    for (uint k = 0; k <= i % 5; k++)
      if (i % 2 == 0) sum += simd_sum(1u);
      else { uint m = 0; do sum += 100 * simd_sum(1u); while (++m <= i % 3); }
  out[i] = sum;
}
uint counted(uint i, uint sum) { return i % 2 ? sum + simd_sum(1u) : sum; }
KERNEL(calls) {
  uint sum = 0;
  for (uint j = 0; j < n; j++) { sum = counted(i + j, sum); sum = counted(i / 2, sum); }
  out[i] = sum;
}
// The compiler thinks the middle one unlikely, and the loop can be laid behind what follows it.
KERNEL(early) {
  uint sum = simd_sum(1u);
  if (i == 7) { sum += simd_sum(1u); if (sum == 77) { out[i] = 0; return; } }
  if (i % 2 == 0) { for (uint j = 0; j < i % 4; j++) sum += 10 * simd_sum(1u); }
  out[i] = sum + 1000 * simd_sum(1u);
}
"""


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("checked", [False, True])
def test_lanes_that_part_in_a_loop_meet_at_the_end_of_each_turn(checked: bool, seed: int | None) -> None:
    n, lanes = 3, np.arange(32)
    lib = compile(PARTING, constants={"n": n}, checked=checked)
    nested = np.zeros(32, np.int64)
    for k in range(5):
        active = (lanes % 2 == 0) & (k <= lanes % 5)
        nested[active] += n * active.sum()
        for m in range(3):
            active = (lanes % 2 == 1) & (k <= lanes % 5) & (m <= lanes % 3)
            nested[active] += n * 100 * active.sum()
    calls = np.zeros(32, np.int64)
    for j in range(n):
        for odd in ((lanes + j) % 2 == 1, lanes // 2 % 2 == 1):
            calls[odd] += odd.sum()
    expected = {
        "skips": np.where(lanes < 16, n * (32 + 1600), n * 32),
        "goes_on": np.where(lanes < n, (n - 1) * 31, n * 31),
        "nested": nested,
        "calls": calls,
        "early": 32 + (lanes == 7) + np.where(lanes % 4 == 2, 2 * 10 * 8, 0) + 32000,
    }
    for name, sums in expected.items():
        out = np.zeros(32, np.uint32)
        run = lib[name].launch({0: out}, threadgroups=1, threads=32, schedule_seed=seed)
        assert (run.faults, out.tolist()) == ((), sums.tolist()), name
